"""Every example that a reader can see runs, and every public name is documented."""

import inspect
import os
import re
import runpy
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import helpers
import pytest
from jax import lax

import eqquant as eqq
from eqquant import _dispatch, coding, kernels, rounding, testing, tiles


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def public(namespace: Any) -> dict[str, Any]:
    """What a module or class itself defines under public names, but for modules."""
    return {
        name: value
        for name, value in vars(namespace).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


NAMES = {f"eqquant.{name}": x for name, x in public(eqq).items()} | {
    f"eqquant.kernels.{name}": x for name, x in public(kernels).items() if name in kernels.__all__
}
CALLABLES = {name: x for name, x in NAMES.items() if callable(x)}
ARRAYS = {
    name: x
    for name, x in CALLABLES.items()
    if isinstance(x, type) and issubclass(x, eqq.ImplicitArray)
}
METHODS = {  # an override means what the method it overrides means
    f"{owner}.{name}": getattr(x, "__func__", x)
    for owner, cls in ARRAYS.items()
    for name, x in public(cls).items()
    if isinstance(x, (property, classmethod, types.FunctionType))
    and not any(name in vars(base) for base in cls.__mro__[1:])
}
TOOLS = {  # for the authors of formats
    f"eqquant.{module}.{name}": x
    for module, namespace in (
        ("coding", coding),
        ("rounding", rounding),
        ("testing", testing),
        ("tiles", tiles),
    )
    for name, x in public(namespace).items()
    if (from_where := getattr(x, "__module__", "eqquant")).split(".")[0] == "eqquant"
    and (namespace is testing or from_where in ("eqquant", namespace.__name__))
}
TOOLS |= {
    f"{owner}.{name}": x
    for owner, cls in TOOLS.items()
    if isinstance(cls, type)
    for name, x in public(cls).items()
    if isinstance(x, types.FunctionType) and not any(name in vars(b) for b in cls.__mro__[1:])
}
DOCUMENTED = CALLABLES | METHODS | {name: x for name, x in TOOLS.items() if callable(x)}


def examples(text: str) -> list[tuple[int, str]]:
    """The Python blocks of a page or docstring, with the line that each begins on."""
    return [
        (text[: m.start()].count("\n") + 1, textwrap.dedent(m.group(2)))
        for m in BLOCK.finditer(text)
    ]


def run(text: str, name: str) -> None:
    """Runs the blocks of a page in order, in one namespace."""
    namespace: dict[str, Any] = {"__name__": name}
    for line, code in examples(text):
        exec(compile("\n" * line + code, name, "exec"), namespace)


@pytest.mark.usefixtures("own_table")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path) -> None:
    run(page.read_text(encoding="utf-8"), str(page))


@pytest.mark.usefixtures("own_table")
@pytest.mark.parametrize(
    "name", [n for n, x in DOCUMENTED.items() if examples(inspect.getdoc(x) or "")]
)
def test_example_of(name: str) -> None:
    run(inspect.getdoc(DOCUMENTED[name]) or "", name)


def test_examples_leave_no_rule_behind() -> None:
    def table() -> dict[str, int]:
        return {name: len(rules) for name, rules in _dispatch.rules().items()}

    before = table()
    with helpers.own_table():
        eqq.register(lax.neg_p, lax.sort_p)(_no_packed_form)
        assert table() == before | {"neg": before["neg"] + 1, "sort": 1}
    assert table() == before


def _no_packed_form(primitive: Any, x: eqq.Array8B, **params: Any) -> Any:
    return NotImplemented


@pytest.mark.parametrize("name", DOCUMENTED)
def test_has_a_docstring(name: str) -> None:
    assert DOCUMENTED[name].__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("name", CALLABLES)
def test_functions_and_formats_have_an_example(name: str) -> None:
    function = CALLABLES[name]
    if isinstance(function, type) and not hasattr(function, "quantize"):
        return  # a base class, a result, a warning: shown where it is used
    assert examples(inspect.getdoc(function) or ""), f"the docstring of {name} has no example"


def test_every_public_name_has_an_entry_in_the_api_pages() -> None:
    pages = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs/pages/api").glob("*.md"))
    entries = set(re.findall(r"(?m)^::: (eqquant\S+)$", pages))
    names = NAMES.keys() | {name for name in TOOLS if name.count(".") == 2}
    missing = names - entries
    assert not missing, f"no entry in docs/pages/api for: {', '.join(sorted(missing))}"


def test_every_rule_that_keeps_packed_has_a_program_in_the_table() -> None:
    programs = runpy.run_path(str(ROOT / "docs/programs.py"))
    shown = {program.primitive for program in programs["PROGRAMS"]} | set(programs["NOT_SHOWN"])
    files = ("structural", "indexing", "elementwise", "contraction")
    missing = {
        primitive
        for primitive, rules in _dispatch.rules().items()
        for _, rule in rules
        if rule.__module__.split(".")[-1] in files and not rule.__name__.endswith("_dense")
    } - shown
    assert not missing, f"no program in docs/programs.py for: {', '.join(sorted(missing))}"


def test_the_tables_of_the_pages_are_those_of_the_results() -> None:
    show = runpy.run_path(str(ROOT / "benchmarks" / "show.py"))
    pages = [page.read_text(encoding="utf-8") for page in show["PAGES"]]
    assert all("| Array8B |" in page for page in pages) and "| eformer Array8B |" in pages[1]
    for page in pages:
        assert show["with_tables"](page) == page, "run benchmarks/show.py"


def test_the_drawing_of_tiles_is_current() -> None:
    draw = runpy.run_path(str(ROOT / "docs" / "draw_tiles.py"))
    assert draw["drawing"]() == draw["IMAGE"].read_text(encoding="utf-8"), "run docs/draw_tiles.py"


def test_the_table_of_covered_primitives_is_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs/generate_coverage.py", "--check"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def fenced(page: str, language: str) -> list[str]:
    """The blocks of a page in a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = [block for block in fenced("README.md", "bash") if "pytest" in block]
    printed = subprocess.run(
        [ROOT / ".ci/run", "--print-test-command"], capture_output=True, text=True, check=True
    )
    assert [printed.stdout] == commands


def test_the_readme_and_the_example_page_show_the_same_run() -> None:
    page = "docs/pages/examples.md"
    assert set(fenced("README.md", "text")) <= set(fenced(page, "text"))
    assert fenced("README.md", "bash")[0] == fenced(page, "bash")[0]
