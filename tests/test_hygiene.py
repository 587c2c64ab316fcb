"""What the source must not do: import upwards, reach into private modules, wake a device."""

import ast
import importlib
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
    "_facts": "coding tiles",
    "_exporting": "_compat _facts",
    "_implicit_array": "_exporting",
    "_daylight": "_compat _implicit_array _table",
    "_dispatch": "_compat _daylight _implicit_array",
    "_implicit": "_compat _dispatch _implicit_array",
    "coding": "_sharding",
    "_eager": "_compat _daylight _dispatch _implicit _implicit_array",
    "_array": "_daylight _eager _implicit _implicit_array",
    "_scaled": "_compat _array _exporting _sharding coding tiles",
    "_checks": "_array _scaled tiles",
    "rounding": "_compat _sharding coding tiles",
    "_transposed": "_array _implicit_array _scaled _sharding tiles",
    "formats": "_compat _checks _implicit _scaled _sharding coding rounding tiles formats",
    "native": "",
    "kernels": "_compat _daylight _dispatch _scaled coding native rounding tiles kernels",
    "rules": "_adapted _array _compat _daylight _dispatch _implicit _implicit_array _scaled _sharding _transposed tiles kernels rules",
    "_matmul": "formats kernels",
    "_training": "_checks _exporting _implicit _implicit_array _scaled _transposed formats tiles",
    "_uses": "_compat _implicit",
    "_model": "_array _implicit _implicit_array _uses",
    "_report": "_compat _array _implicit _model _table",
    "_audit": "_daylight _implicit _table",
    "_adapted": "_array _compat _implicit_array",
    "lora": "_adapted _implicit _model _report",
    "_description": "_facts _implicit_array",
    "_registry": "_transposed formats",
    "testing": "_array _daylight _implicit _model _registry _scaled formats testing tiles",
    "__init__": "_array _audit _daylight _description _dispatch _implicit _implicit_array _matmul _model _report _scaled _training "
    "_transposed formats lora rules",
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


def file_of(name: str) -> str:
    """The module that defines an absolute name; where a package passes the name on, the module that it has
    it from."""
    parts = name.removeprefix("eqquant").strip(".").split(".")
    module = next(
        (m for n in range(len(parts), 0, -1) if (m := ".".join(parts[:n])) in MODULES), "__init__"
    )
    rest = parts if module == "__init__" else parts[module.count(".") + 1 :]
    if MODULES[module].name == "__init__.py" and rest:
        for passed_on, _ in imports(MODULES[module]):
            if passed_on.split(".")[-1] == rest[0] and passed_on != name:
                return file_of(passed_on)
    return module


def imported_files(module: str) -> set[str]:
    """The modules that a module imports from, anywhere in it."""
    names = [name for name, _ in imports(MODULES[module]) if name.split(".")[0] == "eqquant"]
    return {file_of(name) for name in names} - {module}


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Some path in a graph that ends where it begins; None if there is none."""
    done: set[str] = set()

    def walk(path: list[str]) -> list[str] | None:
        if path[-1] in path[:-1]:
            return path[path.index(path[-1]) :]
        if path[-1] in done:
            return None
        found = next(filter(None, (walk([*path, n]) for n in sorted(graph[path[-1]]))), None)
        done.add(path[-1])
        return found

    return next(filter(None, (walk([node]) for node in sorted(graph))), None)


def test_no_files_import_each_other() -> None:
    graph = {module: imported_files(module) for module in MODULES}
    found = circle(graph)
    assert found is None, f"these import each other: {' -> '.join(found or ())}"


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b", "c"}, "b": set(), "c": {"d"}, "d": {"c"}}) == ["c", "d", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert file_of("eqquant.kernels.convolve") == "kernels.convolution"
    assert file_of("eqquant.audit") == "_audit"


PACKAGES = [
    ".".join(["eqquant", *file.parent.relative_to(PACKAGE).parts])
    for file in MODULES.values()
    if file.name == "__init__.py"
]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_module_has_the_name_of_a_function(package: str) -> None:
    exported = {
        name
        for name, value in vars(importlib.import_module(package)).items()
        if not name.startswith("_") and callable(value)
    }
    modules = {part for module in MODULES for part in module.split(".") if part[0] != "_"}
    assert not exported & modules, f"{package} exports functions with the names of modules"


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
