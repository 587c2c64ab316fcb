"""Operators outside of transformations: traced once, and otherwise as inside."""

import operator
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import adapted_array, normal
from jax import Array, lax

import eqquant as eqq
from eqquant import _eager


X, ROWS = normal(6), jnp.array([3, 1, 3])
Y = normal(4, 6)
OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "q @ x": lambda q: q @ X,
    "x @ q": lambda q: np.ones(4, np.float32) @ q,
    "q * 2": lambda q: q * 2,
    "2 * q": lambda q: 2.0 * q,
    "q + y": lambda q: q + Y,
    "q - q": lambda q: q - q,
    "q ** 2": lambda q: q**2,
    "q ** 0.5": lambda q: abs(q) ** 0.5,
    "divmod": lambda q: divmod(q, 0.3)[1],
    "-q": operator.neg,
    "abs": abs,
    "round": lambda q: round(q, 1),
    "q > 0": lambda q: q > 0,
    "transposed": lambda q: q.T,
    "row": lambda q: q[0],
    "last column": lambda q: q[:, -1],
    "slice": lambda q: q[1:3, None],
    "NumPy index": lambda q: q[np.int64(2)],
    "rows": lambda q: q[ROWS],
    "elements": lambda q: q[ROWS, np.array([0, 5, 2])],
    "any axis": lambda q: q[..., 2],
    "reshape": lambda q: q.reshape(2, 2, 6),
    "cast": lambda q: q.astype(jnp.bfloat16),
    "sum": lambda q: q.sum(),
    "sum of rows": lambda q: q.sum(1, keepdims=True),
    "max": lambda q: q.max(axis=0),
    "std": lambda q: q.std(ddof=1),
    "take": lambda q: q.take(ROWS, axis=0),
    "clip": lambda q: q.clip(-0.5, 0.5),
    "dot": lambda q: q.dot(X),
    "argsort": lambda q: q.argsort(),
}  # fmt: skip
ARRAYS = {
    "int8": lambda: eqq.Array8B.quantize(Y),
    "nf4": lambda: eqq.ArrayNF4.quantize(Y),
    "column-major": lambda: eqq.column_major(eqq.Array1B.quantize(Y)),
    "adapted": lambda: adapted_array(4, 6, base="int8"),
}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is traced in operators, one entry for each time."""
    found, real = [], _eager.implicit
    monkeypatch.setattr(_eager, "implicit", lambda f: found.append(f) or real(f))
    return found


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operator_is_traced_once_and_agrees_with_the_materialized_array(
    name: str, traced: list[Any]
) -> None:
    run = OPERATIONS[name]
    for q in (make() for make in ARRAYS.values()):
        with eqq.on_materialize("ignore"):
            first = eqq.materialize(run(q))
            before = len(traced)
            again = run(jax.tree.map(lambda leaf: leaf + 0, q))
            assert len(traced) == before
        want = run(q.materialize())
        for got in (first, eqq.materialize(again)):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            np.testing.assert_allclose(np.float64(got), np.float64(want), rtol=1e-4, atol=1e-5)


def test_other_numbers_are_no_other_program(traced: list[Any]) -> None:
    q = ARRAYS["int8"]()
    results = [q * number for number in (0.5, 3.0, -1.25)]
    assert len(traced) <= 1
    for number, got in zip((0.5, 3.0, -1.25), results, strict=True):
        np.testing.assert_allclose(got.materialize(), q.materialize() * number, rtol=1e-6)


def test_other_facts_are_another_program() -> None:
    q = ARRAYS["int8"]()
    dense = q.materialize()
    for axis in (0, 1, None, (0, 1)):
        np.testing.assert_allclose(q.sum(axis), dense.sum(axis), rtol=1e-5, atol=1e-6)
    for index in (0, 1, -1, slice(0, 2), slice(2, None), (1, 2), (slice(None), 3), None, ...):
        np.testing.assert_array_equal(eqq.materialize(q[index]), dense[index])
    with eqq.on_materialize("ignore"):
        assert (q**1).dtype == (q**True).dtype and (q**3 != q**2).any()
    # A mask has to be known, and so has how often elements are repeated.
    mask = np.array([True, False, True, False])
    with eqq.on_materialize("ignore"):
        np.testing.assert_array_equal(q[mask], dense[mask])
        np.testing.assert_array_equal(
            q.repeat(np.array([0, 2, 1, 0]), 0), dense[np.array([1, 1, 2])]
        )


def test_it_is_said_in_every_call_what_was_made_dense() -> None:
    q = ARRAYS["nf4"]()

    def add(number: float) -> list[Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            q + number
        return caught

    assert [len(add(number)) for number in (1.0, 2.0)] == [1, 1]
    (said,) = add(3.0)
    assert said.filename == __file__ and "ArrayNF4 float32[4,6]" in str(said.message)
    with eqq.on_materialize("ignore"):
        assert add(1.0) == []
    with eqq.strict(), pytest.raises(eqq.MaterializeError, match="Elementwise arithmetic"):
        q + 1.0
    with pytest.warns(eqq.MaterializeWarning, match="cumsum"):
        q.cumsum(0)
    with pytest.warns(eqq.MaterializeWarning, match="cumsum"):
        q.cumsum(0)


@pytest.mark.usefixtures("own_table")
def test_a_rule_that_is_added_later_is_used() -> None:
    q = ARRAYS["int8"]()
    assert isinstance(-q, eqq.Array8B)

    @eqq.register(lax.neg_p)
    def neg_array8b(primitive: Any, x: eqq.Array8B, **params: Any) -> Any:
        return jnp.zeros(x.shape)

    assert isinstance(-q, Array) and not (-q).any()


def test_after_the_rule_is_gone_it_is_used_no_more() -> None:
    assert isinstance(-ARRAYS["int8"](), eqq.Array8B)


def test_inside_transformations_operators_are_traced_there(traced: list[Any]) -> None:
    q = ARRAYS["int8"]()
    dense, xs = q.materialize(), normal(3, 6)
    for f in (
        lambda x: q @ x,
        lambda x: (q * x[0]).materialize(),
        lambda x: q[x[0].astype(int)],
    ):
        before = len(traced)
        for transformed in (jax.vmap(f), lambda xs, f=f: lax.map(f, xs), jax.jit(jax.vmap(f))):
            np.testing.assert_allclose(
                transformed(xs), jnp.stack([f(x) for x in xs]), rtol=1e-5, atol=1e-6
            )
        assert len(traced) >= before + 3
    gradient = jax.grad(lambda x: jnp.sum((q @ x) ** 2))(xs[0])
    np.testing.assert_allclose(gradient, 2 * dense.T @ (dense @ xs[0]), rtol=1e-4)
    scale = jax.grad(lambda q: jnp.sum(q @ X), allow_int=True)(q).scale
    np.testing.assert_allclose(scale[:, 0], q.weight.astype(jnp.float32) @ X, rtol=1e-4, atol=1e-5)


def test_a_format_with_a_fact_that_has_no_hash() -> None:
    class Constant(eqq.QuantizedArray):
        value: Array
        sizes: list[int] = eqx.field(static=True)
        dtype = jnp.dtype(jnp.float32)

        @property
        def shape(self) -> tuple[int, ...]:
            return tuple(self.sizes)

        def materialize(self) -> Array:
            return jnp.broadcast_to(self.value, self.shape)

    q = Constant(jnp.array(3.0), [2, 3])
    with eqq.on_materialize("ignore"):
        np.testing.assert_array_equal(q + 1, jnp.full((2, 3), 4.0))
    with pytest.raises(TypeError, match="same shape"):
        q @ jnp.ones(5)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (lambda q: q @ jnp.ones(5), TypeError, "same shape"),
        (lambda q: q & 1, TypeError, "and"),
        (lambda q: q.sum(7), ValueError, "axis 7 is out of bounds"),
        (lambda q: q[:, :, 1], IndexError, "Too many indices"),
    ],
)
def test_errors_are_those_of_arrays(wrong: Any, error: type[Exception], words: str) -> None:
    q = ARRAYS["int8"]()
    for each in (q, q.materialize()):
        with pytest.raises(error, match=words):
            wrong(each)
