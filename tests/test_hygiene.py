"""What the source must not do: import upwards, reach into private modules, wake a device."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "eqquant"
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}

# Who may import whom. A name stands for the module and, if it is a package, for all in it.
MAY_IMPORT = {
    "_compat": "",
    "tiles": "",
    "_table": "",
    "_sharding": "tiles",
    "_dispatch": "_compat _table",
    "_implicit": "_compat _dispatch",
    "_array": "_dispatch _implicit _sharding tiles",
    "_quantize": "_array _sharding",
    "column_major": "_array _dispatch _sharding tiles",
    "formats": "_array _implicit _quantize _sharding tiles formats",
    "kernels": "_array _compat _dispatch tiles kernels",
    "rules": "_array _compat _dispatch _implicit _sharding column_major tiles kernels rules",
    "matmul": "formats kernels",
    "training": "_array column_major _dispatch _implicit _quantize formats tiles",
    "lora": "_array _dispatch _implicit model report",
    "model": "_array _dispatch _implicit",
    "report": "_array _implicit _table model",
    "audit": "_dispatch _implicit _table",
    "_registry": "column_major formats",
    "testing": "_array _dispatch _implicit _registry formats model testing tiles",
    "__init__": "_array _dispatch _implicit audit column_major formats lora matmul model report rules training",
}
PRIVATE = re.compile(r"^(jax\._src|equinox\._|plum\._)")
FORBIDDEN_TEXT = {
    "a path of a machine": re.compile(r"(?<![\w./~-])/(work|root|home|Users|opt|tmp|mnt)/\w"),
    "the host of a registry": re.compile(
        r"pypi\.org|pythonhosted\.org|npmjs\.(org|com)|conda\.anaconda\.org|index-url|"
        r"artifactory|jfrog"
    ),
}


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """The absolute names of all that a file imports, anywhere in it, with their lines."""
    package = ["eqquant", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def layer(module: str) -> str:
    """The entry of `MAY_IMPORT` for a module inside the package."""
    return module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    assert layer(module) in MAY_IMPORT, f"eqquant.{module} has no line in MAY_IMPORT"
    allowed = MAY_IMPORT[layer(module)].split()
    upward = []
    for name, line in imports(MODULES[module]):
        if name.split(".")[0] == "eqquant":
            target = name.removeprefix("eqquant.")
            if layer(target) not in allowed:
                upward.append(f"{MODULES[module].relative_to(ROOT)}:{line} imports {target}")
    assert not upward, f"eqquant.{module} may import {allowed or 'nothing'} of eqquant: {upward}"


def test_every_line_of_the_table_is_a_module() -> None:
    gone = set(MAY_IMPORT) - {layer(module) for module in MODULES}
    assert not gone, f"MAY_IMPORT names modules that do not exist: {gone}"


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"_compat"}))
def test_private_names_of_others_are_in_compat_alone(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    used = {name for name, _ in imports(MODULES[module])}
    used |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    private = sorted(name for name in used if PRIVATE.match(name))
    assert not private, f"eqquant.{module} uses {private}: put them in eqquant/_compat.py"


# `_compat` may ask its private parts what they support.
@pytest.mark.parametrize("module", [m for m in MODULES if layer(m) not in ("kernels", "_compat")])
def test_pallas_is_imported_in_kernels_alone(module: str) -> None:
    found = [f"{name}, line {line}" for name, line in imports(MODULES[module]) if "pallas" in name]
    assert not found, f"eqquant.{module} imports {found}"


@pytest.mark.parametrize("module", MODULES)
def test_module_has_a_docstring(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"eqquant.{module} has no docstring"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def test_importing_loads_no_pallas() -> None:
    done = python("import sys, eqquant; assert 'jax.experimental.pallas' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_the_registry_is_read_without_hypothesis_and_not_by_the_package() -> None:
    done = python(
        "import sys, eqquant; assert 'eqquant._registry' not in sys.modules\n"
        "import eqquant._registry; assert 'hypothesis' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_importing_initialises_no_backend() -> None:
    # With a platform that does not exist, whatever needs a backend fails.
    assert python("import jax; jax.devices()", JAX_PLATFORMS="no_such_platform").returncode != 0
    done = python("import eqquant", JAX_PLATFORMS="no_such_platform")
    assert done.returncode == 0, done.stderr


def tracked_files() -> list[Path]:
    """The text files of the repository; all that lie here, if this is no clone."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        folders = ("eqquant", "tests", "docs", "benchmarks", ".ci")
        files = [*ROOT.glob("*.*"), *(f for name in folders for f in (ROOT / name).rglob("*"))]
    binary = {".npz", ".npy", ".safetensors", ".png", ".gguf", ".pyc"}
    return [file for file in files if file.is_file() and file.suffix not in binary]


def test_no_file_is_over_600_lines() -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for file in tracked_files()
        if file.suffix == ".py" and (lines := file.read_text(encoding="utf-8").count("\n")) > 600
    }
    assert not long, f"over 600 lines (is each one thing?): {long}"


@pytest.mark.parametrize("what", FORBIDDEN_TEXT)
def test_no_tracked_file_holds(what: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in tracked_files()
        if file != Path(__file__)
        for number, line in enumerate(file.read_text("utf-8", "replace").splitlines(), start=1)
        if FORBIDDEN_TEXT[what].search(line)
    ]
    assert not found, f"{what} stands in {found}"
