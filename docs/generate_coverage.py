"""Writes the table of covered primitives into `pages/rules.md`, from the rules themselves.

    python docs/generate_coverage.py            # write the page
    python docs/generate_coverage.py --check    # fail if the page is not current

The first table is what the programs of `programs.py` do when they run. The others come from the opening
docstrings of `eqquant.rules` and from the rules that are registered. Which primitives exist depends on
the version of JAX, so the page names the one it was written with; `--check` on another version only
looks for rows that the page lacks.
"""

import inspect
import re
import sys
import typing
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jax
from programs import COLUMNS, outcome, PROGRAMS

import eqquant as eqq
from eqquant import _compat, _dispatch


PAGE = Path(__file__).parent / "pages" / "rules.md"
BEGIN = "<!-- The rest of this page is written by docs/generate_coverage.py. -->\n"
FORMATS = """\
## What stays packed, by format

Found by running a program for each row. Its operand has 16 rows of 640 elements, or is a stack of such
matrices, quantized with default options: so the last axis is packed, except in `Array8B` and `ArrayFP8`. 320
elements are whole tiles in every format.

- *packed*: the result is of the same format.
- *read packed*: the result is dense, and a rule computes it from the stored codes.
- *dense*: the operand is made dense, with a warning.

¹ The quantized scales become float32. In this table they stay quantized more often than they do in larger arrays: all 160 scales of a matrix
are in one group of 256. [When they stay so](formats.md#arraynf4) depends on the shape.
"""
KINDS = {
    eqq.AbstractScaledArray: "quantized",
    eqq.QuantizedArray: "quantized",
    eqq.ImplicitArray: "quantized",
    jax.Array: "dense",
}


def generate() -> str:
    """The generated part of the page."""
    out = [BEGIN, f"Written with JAX {_version()}.\n", FORMATS, _table_of_programs()]
    by_module = defaultdict(list)
    for primitive, found in sorted(_dispatch.rules().items()):
        for _, rule in found:
            by_module[rule.__module__].append((rule, primitive))
    for name in eqq.rules.__all__:
        module = getattr(eqq.rules, name)
        out += [f"## {name.replace('_', ' ').capitalize()}\n", f"{inspect.getdoc(module)}\n"]
        out += [f"The rules in `eqquant/rules/{name}.py`:\n", _table(by_module[module.__name__])]
    covered = _dispatch.rules()
    others = ", ".join(f"`{p}`" for p in _compat.primitive_names() if p not in covered)
    out += ["## No rule\n", f"Dense, with a warning if an operand is quantized: {others}."]
    return "\n".join(out) + "\n"


def _table_of_programs() -> str:
    """One row for each program whose primitive this JAX has."""
    lines = [f"| primitive | program | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for program in PROGRAMS:
        if _compat.find_primitive(program.primitive) is not None:
            cells = [f"`{program.primitive}`", program.label]
            cells += [outcome(program, quantize) for quantize in COLUMNS.values()]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _table(rules: list[tuple[Callable, str]]) -> str:
    """One row for each rule, with its primitives."""
    rows = defaultdict(list)
    for rule, primitive in rules:
        rows[rule].append(f"`{primitive}`")
    lines = ["| primitives | operands | quantized operands | rule |", "|---|---|---|---|"]
    for rule, primitives in rows.items():
        cells = ", ".join(primitives), _operands(rule), _fate(rule), f"`{rule.__name__}`"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _operands(rule: Callable) -> str:
    """`dense, quantized`, from the annotations of the rule."""
    hints, cells = typing.get_type_hints(rule), []
    for operand in list(inspect.signature(rule).parameters.values())[1:]:
        if operand.kind not in (operand.KEYWORD_ONLY, operand.VAR_KEYWORD):
            kinds = typing.get_args(hints[operand.name]) or (hints[operand.name],)
            cells.append(" or ".join(KINDS.get(kind, f"`{kind.__name__}`") for kind in kinds))
            cells += ["…"] * (operand.kind == operand.VAR_POSITIONAL)
    return ", ".join(cells)


def _fate(rule: Callable) -> str:
    """What becomes of a quantized operand."""
    if rule.__name__.endswith("_dense"):
        return "dense"
    if rule.__module__.endswith("control_flow"):
        return "packed in the body"
    if "report_materialized(" in inspect.getsource(rule):
        return "one packed, one dense"
    return "packed"


def _version() -> str:
    return ".".join(jax.__version__.split(".")[:2])


def _rows(text: str) -> set[str]:
    """The rows of programs, and those of rules without the primitives, which depend on the version
    of JAX."""
    rules = re.findall(r"(?m)^\| `.*(\|[^|]*\|[^|]*\| `\w+` \|)$", text)
    return {*rules, *re.findall(r"(?m)^\| `.*(?:packed|dense|¹) \|$", text)}


def main(arguments: list[str]) -> None:
    """Write or check the page."""
    intro, begin, committed = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    if not begin:
        raise SystemExit(f"{PAGE} lacks the line {BEGIN.strip()!r}: put it where the tables begin.")
    committed, generated = begin + committed, generate()
    if arguments != ["--check"]:
        PAGE.write_text(intro + generated, encoding="utf-8")
        return
    if f"Written with JAX {_version()}." in committed:
        is_current = committed == generated
    else:
        is_current = _rows(generated) <= _rows(committed)
    if not is_current:
        raise SystemExit(f"{PAGE.name} is not current: run `python docs/generate_coverage.py`.")


if __name__ == "__main__":
    main(sys.argv[1:])
