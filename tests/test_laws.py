"""Every law holds for every format, in every mode, on arrays of stored leaves that nobody quantized."""

import dataclasses
from functools import partial
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from formats import DTYPES, FORMATS, SHAPES
from jax import lax
from laws import DENSE_PROGRAMS, Law, LAWS, NO_QUANTIZED_OPERAND

import eqquant as eqq
from eqquant import _compat, _dispatch


EXAMPLES = {"eager": 1.0, "jit": 0.4, "grad": 0.4, "vmap": 0.4, "scan": 0.3}


def examples(share: float) -> hypothesis.settings:
    base = hypothesis.settings()
    return hypothesis.settings(base, max_examples=max(3, int(base.max_examples * share)))


def assert_same(got: Any, want: Any) -> None:
    """Equal bit for bit, any NaN for any NaN."""
    wide = np.complex128 if jnp.issubdtype(want.dtype, jnp.complexfloating) else np.float64
    np.testing.assert_array_equal(np.asarray(got).astype(wide), np.asarray(want).astype(wide))


@dataclasses.dataclass
class Program:
    """A drawn program, and the bound of its rounding errors."""

    law: Law
    run: Any
    x: Any
    others: tuple[Any, ...]

    @staticmethod
    def drawn(draw: Any, law: Law, format: str, dtypes: Any = DTYPES) -> "Program":
        shape = draw(st.sampled_from([s for rank in law.ranks for s in SHAPES[rank]]))
        x = draw(FORMATS[format](shape, draw(st.sampled_from(dtypes))))
        made = law.draw(draw, x)
        run, others = made if isinstance(made, tuple) else (made, ())
        return Program(law, run, x, tuple(others))

    def check(self, got: Any, want: Any, dense: Any) -> None:
        got, want = eqq.materialize(got), want
        assert jtu.tree_structure(got) == jtu.tree_structure(want)
        magnitude = (
            self.run(jnp.abs(dense), *map(jnp.abs, self.others)) if not self.law.exact else want
        )
        for g, w, m in zip(*map(jtu.tree_leaves, (got, want, magnitude)), strict=True):
            assert (g.shape, g.dtype) == (w.shape, w.dtype)
            if self.law.exact or not jnp.issubdtype(w.dtype, jnp.inexact):
                assert_same(g, w)
                continue
            # Each of the summed terms may be rounded: terms x epsilon x sum of magnitudes.
            eps = max(float(jnp.finfo(d).eps) for d in (self.x.dtype, w.dtype))
            g64, w64, m64 = (np.asarray(a).astype(np.float64) for a in (g, w, m))
            fits = np.isfinite(m64) & np.isfinite(w64)  # where nothing overflows on the way
            bound = (self.law.terms(self.x) + 2) * eps * np.abs(m64) + jnp.finfo(w.dtype).tiny
            assert (np.abs(g64[fits] - w64[fits]) <= bound[fits]).all(), (g, w)


def each_law(function: Any) -> Any:
    cases = [(law, format) for law in LAWS.values() for format in FORMATS]
    return pytest.mark.parametrize(
        ("law", "format"), cases, ids=[f"{law.name}-{format}" for law, format in cases]
    )(function)


@each_law
def test_eager(law: Law, format: str) -> None:
    kept_packed = 0

    @hypothesis.given(st.data())
    @examples(EXAMPLES["eager"])
    def holds(data: st.DataObject) -> None:
        nonlocal kept_packed
        program = Program.drawn(data.draw, law, format)
        dense = program.x.materialize()
        with _dispatch.recording() as records:
            got = eqq.implicit(program.run)(program.x, *program.others)
        kept_packed += not any(record.densified for record in records)
        program.check(got, program.run(dense, *program.others), dense)

    holds()
    assert bool(kept_packed) == law.packed, f"{law.name} kept {kept_packed} programs packed"


@each_law
def test_jit(law: Law, format: str) -> None:
    @hypothesis.given(st.data())
    @examples(EXAMPLES["jit"])
    def holds(data: st.DataObject) -> None:
        program = Program.drawn(data.draw, law, format)
        dense = program.x.materialize()
        with eqq.on_materialize("ignore"):
            got = jax.jit(eqq.implicit(program.run))(program.x, *program.others)
        program.check(got, program.run(dense, *program.others), dense)

    holds()


@each_law
def test_vmap_and_scan_over_stacked_arrays(law: Law, format: str) -> None:
    @hypothesis.given(st.data())
    @examples(EXAMPLES["vmap"])
    def holds(data: st.DataObject) -> None:
        program = Program.drawn(data.draw, law, format)
        stacked = jtu.tree_map(
            lambda leaf: jnp.stack([leaf, leaf[..., ::-1] if leaf.shape[-1:] != (1,) else leaf]),
            program.x,
        )
        dense = jax.vmap(lambda x: x.materialize())(stacked)

        def one(x: Any) -> Any:
            return eqq.materialize(eqq.implicit(program.run)(x, *program.others))

        want = [program.run(x, *program.others) for x in dense]
        with eqq.on_materialize("ignore"):
            mapped = jax.vmap(one)(stacked)
            _, scanned = lax.scan(lambda _, x: (None, one(x)), None, stacked)
            inside = eqq.implicit(lambda x: lax.map(lambda x: program.run(x, *program.others), x))(
                stacked
            )
        for i in range(2):
            for got in (mapped, scanned, eqq.materialize(inside)):
                program.check(jtu.tree_map(lambda leaf: leaf[i], got), want[i], dense[i])  # noqa: B023

    holds()


@each_law
def test_grad(law: Law, format: str) -> None:
    """Derivatives with respect to the float leaves and the other operands."""

    @hypothesis.given(st.data())
    @examples(EXAMPLES["grad"])
    def holds(data: st.DataObject) -> None:
        program = Program.drawn(data.draw, law, format, [jnp.float32])
        leaves, treedef = jtu.tree_flatten(program.x)
        values = [*leaves, *program.others]
        moving = [i for i, v in enumerate(values) if jnp.issubdtype(v.dtype, jnp.floating)]

        def loss(evaluate: Any, *moved: Any) -> Any:
            filled = list(values)
            for i, v in zip(moving, moved, strict=True):
                filled[i] = v
            x = jtu.tree_unflatten(treedef, filled[: len(leaves)])
            out = jtu.tree_leaves(eqq.materialize(evaluate(x, *filled[len(leaves) :])))
            return sum(
                jnp.sum(
                    jnp.where(jnp.isfinite(y), y, 0) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)
                )
                for y in out
                if jnp.issubdtype(y.dtype, jnp.floating)
            ) + 0.0 * sum(jnp.sum(v) for v in moved)

        def packed(x: Any, *others: Any) -> Any:
            return eqq.implicit(program.run)(x, *others)

        def reference(x: Any, *others: Any) -> Any:
            return program.run(x.materialize(), *others)

        arguments = [values[i] for i in moving]
        every = tuple(range(len(arguments)))
        with eqq.on_materialize("ignore"):
            got = jax.jit(jax.grad(partial(loss, packed), every))(*arguments)
        want = jax.jit(jax.grad(partial(loss, reference), every))(*arguments)
        dense = program.x.materialize()
        # Every partial derivative is a sum of at most `terms` products of these.
        size = (
            max(
                float(jnp.max(jnp.abs(v.astype(jnp.float32))))
                for v in (dense, *leaves, *program.others)
            )
            + 1
        )
        for g, w in zip(got, want, strict=True):
            largest = max(float(jnp.max(jnp.abs(w))), size)
            bound = (4 * dense.size + 8) * float(jnp.finfo(jnp.float32).eps) * largest * size
            assert g.shape == w.shape
            np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=1e-4, atol=bound)

    holds()


# ------------------------------------------------------------------------------- every primitive


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", sorted(DENSE_PROGRAMS))
def test_dense_answer(name: str, format: str) -> None:
    """Primitives without a packed form give the dense answer, and say that they made it dense."""
    if name in _compat.primitive_names() or name in (
        "log2",
        "while_scalar",
        "linear_call",
        "cholesky",
    ):

        @hypothesis.given(st.data())
        @examples(0.3)
        def holds(data: st.DataObject) -> None:
            x = data.draw(FORMATS[format]((4, 6), jnp.float32))
            run = DENSE_PROGRAMS[name]
            with _dispatch.recording() as records:
                got = eqq.materialize(eqq.implicit(run)(x))
            want = run(x.materialize())
            for g, w in zip(*map(jtu.tree_leaves, (got, want)), strict=True):
                assert (g.shape, g.dtype) == (w.shape, w.dtype)
                assert_same(g, w)
            assert any(record.densified for record in records)

        holds()


def test_every_primitive_of_lax_has_a_law() -> None:
    known = {p for law in LAWS.values() for p in law.primitives} | set(DENSE_PROGRAMS)
    missing = set(_compat.primitive_names()) - known - set(NO_QUANTIZED_OPERAND)
    assert not missing, f"no law in tests/laws.py for: {', '.join(sorted(missing))}"


def test_every_rule_has_a_law() -> None:
    known = {p for law in LAWS.values() for p in law.primitives} | set(DENSE_PROGRAMS)
    elsewhere = set(NO_QUANTIZED_OPERAND) | {
        "jit", "pjit", "closed_call",
        "eval_jaxpr", "core_call", "call", "remat2", "checkpoint", "remat",
        "custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "shard_map", "pvary", "pcast",
        "reshard",
    }  # fmt: skip
    missing = set(_dispatch.rules()) - known - elsewhere
    assert not missing, f"rules without a law in tests/laws.py: {', '.join(sorted(missing))}"


def test_every_format_has_a_strategy() -> None:
    missing = set(eqq.formats.__all__) - set(FORMATS)
    assert not missing, f"formats without a strategy in tests/formats.py: {missing}"


def test_no_pair_of_formats_is_ambiguous() -> None:
    classes = [eqq.Array8B, eqq.AbstractScaledArray, eqq.QuantizedArray, jax.Array]
    for name in _dispatch.rules():
        primitive = _compat.find_primitive(name)
        for first in classes:
            _dispatch.resolve(primitive, first)
            for second in classes:
                _dispatch.resolve(primitive, first, second)
                for third in classes:
                    _dispatch.resolve(primitive, first, second, third)


SEED_HANDLERS = (
    "add broadcast_in_dim concatenate conv_general_dilated convert_element_type div dot_general exp "
    "gather integer_pow log lt max mul reduce reshape sqrt transpose"
).split()


@pytest.mark.parametrize("name", SEED_HANDLERS)
def test_handlers_of_the_family_are_explicit_and_named(name: str) -> None:
    rules = _dispatch.rules().get(name, [])
    assert rules, f"no rule for {name}"
    assert all(rule.__name__.isidentifier() and rule.__name__ != "_" for _, rule in rules)
