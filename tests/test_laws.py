"""Every law holds for every format, in every mode, on arrays of stored leaves that nobody quantized."""

import math
import re

import hypothesis
import jax
import pytest
from helpers import in_turns, NIGHTLY

import eqquant as eqq
from eqquant import _compat, _dispatch, _registry, testing
from eqquant.testing import DENSE_PROGRAMS, FORMATS, LAWS, MODES, NO_QUANTIZED_OPERAND


SIMPLEST = next(iter(FORMATS))
"""The format for which the simplest programs are drawn, too; they say little."""


def share(part: float) -> int:
    """So many of the examples of the profile; of those that run nightly, twice as many."""
    return math.ceil(hypothesis.settings().max_examples * part * (1 + NIGHTLY))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("law", LAWS)
def test_eager(law: str, format: str) -> None:
    few, simplest = share(3 / 5), format == SIMPLEST
    kept_packed = testing.check_law(
        law, FORMATS[format], max_examples=few + simplest, simplest=simplest
    )
    if format == "Array8B":  # it is packed along no axis: whatever has a rule keeps it
        for more in (10, 100):  # of some laws, one program in ten
            if LAWS[law].packed and not kept_packed:
                kept_packed = testing.check_law(law, FORMATS[format], max_examples=more)
        assert bool(kept_packed) == LAWS[law].packed, f"{kept_packed} programs made nothing dense"


# Compiling takes its time: here the formats take turns, other ones in each mode.
TRANSFORMED = [
    (law, mode, format)
    for i, mode in enumerate(mode for mode in MODES if mode != "eager")
    for law, format in in_turns(LAWS, [*FORMATS][3 * i :] + [*FORMATS][: 3 * i], each=1)
]


@pytest.mark.parametrize(("law", "mode", "format"), TRANSFORMED)
def test_transformed(law: str, mode: testing.Mode, format: str) -> None:
    few, simplest = share(1 / 5), format == SIMPLEST
    testing.check_law(law, FORMATS[format], mode, max_examples=few + simplest, simplest=simplest)


@pytest.mark.parametrize(("name", "format"), in_turns(sorted(DENSE_PROGRAMS), [*FORMATS], each=1))
def test_dense_answer(name: str, format: str) -> None:
    few, simplest = share(1 / 5), format == SIMPLEST
    by_other_primitives = ("log2", "while_scalar", "linear_call", "cholesky")
    if name in _compat.primitive_names() or name in by_other_primitives:
        testing.check_dense_answer(
            name, FORMATS[format], max_examples=few + simplest, simplest=simplest
        )


# -------------------------------------------------------------------------------- completeness


def test_every_primitive_of_lax_has_a_law() -> None:
    known = {p for law in LAWS.values() for p in law.primitives} | set(DENSE_PROGRAMS)
    missing = set(_compat.primitive_names()) - known - set(NO_QUANTIZED_OPERAND)
    assert not missing, f"no law in eqquant/testing for: {', '.join(sorted(missing))}"


def test_every_rule_has_a_law() -> None:
    known = {p for law in LAWS.values() for p in law.primitives} | set(DENSE_PROGRAMS)
    elsewhere = set(NO_QUANTIZED_OPERAND) | {
        "jit", "pjit", "closed_call",
        "eval_jaxpr", "core_call", "call", "remat2", "checkpoint", "remat",
        "custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "shard_map", "pvary", "pcast",
        "reshard",
    }  # fmt: skip
    missing = set(_dispatch.rules()) - known - elsewhere
    assert not missing, f"rules without a law in eqquant/testing: {', '.join(sorted(missing))}"


@pytest.mark.parametrize("format", eqq.formats.__all__)
def test_every_format_has_a_strategy_and_is_registered(format: str) -> None:
    assert format in FORMATS, f"{format} has no strategy in eqquant/testing/strategies.py"
    registered = {each.format.__name__ for each in testing.QUANTIZERS.values()}
    assert format in registered, f"{format} has no entry in eqquant/_registry.py"


def test_every_entry_of_the_registry_is_of_a_format() -> None:
    entries = _registry._ENTRIES
    assert len(entries) == len(testing.QUANTIZERS) == len({each.title for each in entries})
    assert {each.format.__name__ for each in entries} <= set(eqq.formats.__all__)
    assert {each.like for each in entries if each.like} <= set(testing.LAYOUTS)


def test_no_pair_of_formats_is_ambiguous() -> None:
    formats = [getattr(eqq, name) for name in FORMATS]
    classes = [*formats, eqq.AbstractScaledArray, eqq.ColumnMajor, eqq.lora.AdaptedArray]
    classes += [eqq.QuantizedArray, jax.Array]
    for name in _dispatch.rules():
        primitive = _compat.find_primitive(name)
        for first in classes:
            _dispatch.resolve(primitive, first)
            for second in classes:
                _dispatch.resolve(primitive, first, second)
    for name in ("select_n", "concatenate", "clamp", "dynamic_update_slice"):
        primitive = _compat.find_primitive(name)
        for first in classes:
            for second in classes:
                for third in classes:
                    _dispatch.resolve(primitive, first, second, third)


# ----------------------------------------------------------------------------- what failures say


def check_and_fail(error: type[Exception], mode: testing.Mode) -> str:
    """What is said when the law of `neg` does not hold for Array8B."""
    with pytest.raises(error) as caught:
        testing.check_law("neg", FORMATS["Array8B"], mode, max_examples=10)
    return "\n".join([str(caught.value), *caught.value.__notes__])


@pytest.mark.usefixtures("own_table")
@pytest.mark.parametrize(
    ("mode", "where"),
    [
        ("eager", "result"),
        ("jit", "result"),
        ("vmap", "vmap, array 0 of the stack, result"),
        ("grad", "derivative with respect to scale"),
    ],
)
def test_a_law_that_does_not_hold_says_all(mode: testing.Mode, where: str) -> None:
    @eqq.register("neg")
    def neg_wrong(primitive, x: eqq.Array8B, **params):
        return x.replace(scale=2 * x.scale)

    said = check_and_fail(AssertionError, mode)
    number = r"-?[\d.e+-]+"
    bound = rf"to {number}\." if mode == "grad" else r"bit for bit\."
    assert re.search(
        rf"^{where}, \w+\[[\d, ]+\]: \d+ of \d+ elements are off\. "
        rf"The worst, \[[\d, ]+\]: got {number}, want {number}, {bound}$",
        said,
        re.MULTILINE,
    ), said
    for words in (
        "law: neg (neg)",
        f"mode: {mode}",
        "array: Array8B, Array8B(",
        "scale=float32[",
        "program: { lambda",
        "= neg a",
        "reproduce_failure",
    ):
        assert words in said, said


@pytest.mark.usefixtures("own_table")
def test_a_program_that_raises_says_all_but_its_result() -> None:
    @eqq.register("neg")
    def neg_raising(primitive, x: eqq.Array8B, **params):
        raise ZeroDivisionError("of all things")

    said = check_and_fail(ZeroDivisionError, "eager")
    assert said.startswith("of all things")
    for words in ("law: neg (neg)", "mode: eager", "array: Array8B, Array8B(", "= neg a"):
        assert words in said, said


@pytest.mark.usefixtures("own_table")
def test_a_program_that_cannot_be_traced_is_named_all_the_same() -> None:
    @testing.law("transpose")
    def reversed_by_mistake(draw, x):
        return lambda x: x if isinstance(x, jax.Array) and not _is_traced(x) else -x.no_such_name

    with pytest.raises(AttributeError) as caught:
        testing.check_law("reversed_by_mistake", FORMATS["Array8B"], max_examples=3)
    (note,) = (note for note in caught.value.__notes__ if "law: reversed_by_mistake" in note)
    assert "program: which JAX cannot trace:" in note


@pytest.mark.usefixtures("own_table")
def test_a_dense_answer_that_is_wrong_says_all() -> None:
    @eqq.register("exp")
    def exp_wrong(primitive, x: eqq.Array8B, **params):
        return x.materialize()

    with pytest.raises(AssertionError, match="elements are off") as caught:
        testing.check_dense_answer("exp", FORMATS["Array8B"], max_examples=3)
    assert any("dense answer: exp\narray: Array8B" in note for note in caught.value.__notes__)


def _is_traced(x: object) -> bool:
    return isinstance(x, jax.core.Tracer)


SEED_HANDLERS = (
    "add broadcast_in_dim concatenate conv_general_dilated convert_element_type div dot_general exp "
    "gather integer_pow log lt max mul reduce reshape sqrt transpose"
).split()


@pytest.mark.parametrize("name", SEED_HANDLERS)
def test_handlers_of_the_family_are_explicit_and_named(name: str) -> None:
    rules = _dispatch.rules().get(name, [])
    assert rules, f"no rule for {name}"
    assert all(rule.__name__.isidentifier() and rule.__name__ != "_" for _, rule in rules)
