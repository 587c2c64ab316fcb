"""Products of integers: exact sums of 8-bit digits, as accurate as float32."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqquant as eqq
from eqquant.kernels.matmul import int8_digits
from eqquant.kernels.matmul.axes import Axes
from eqquant.kernels.matmul.product import Product, Target
from eqquant.testing import QUANTIZERS


pytestmark = pytest.mark.usefixtures("fully_optimized", "without_native")


INTEGERS = {name: QUANTIZERS[name] for name in ("int8", "ternary", "binary", "rsr binary")}
INTEGERS["rsr ternary"] = partial(QUANTIZERS["rsr ternary"], k=11)
each_of_integers = pytest.mark.parametrize("name", INTEGERS)


def by_digits(x: jax.Array, w: Any) -> Any:
    axes = Axes((x.ndim - 1,), (w.ndim - 1,), (), ())
    assert int8_digits.supports(Product(x, w, axes))
    return jax.jit(lambda x, w: int8_digits.compute(Product(x, w, axes), Target()))(x, w)


@each_of_integers
@pytest.mark.parametrize(
    ("x_shape", "w_shape"),
    [
        ((7,), (5, 7)),
        ((1, 40), (3, 40)),
        ((2, 3, 40), (4, 5, 40)),
        ((2, 1), (3, 1)),
        ((0, 4), (2, 4)),
        ((2, 4), (0, 4)),
    ],
    ids=str,
)
def test_products_of_digits(name, x_shape, w_shape):
    rng = np.random.default_rng(len(name))
    w = INTEGERS[name](jnp.asarray(rng.normal(size=w_shape), jnp.float32))
    x = rng.normal(size=x_shape) * 10.0 ** rng.integers(-30, 30, (*x_shape[:-1], 1))
    x[:1] *= x.ndim == 1  # a row of zeros, if there are several
    x = jnp.asarray(x, jnp.float32)
    y = by_digits(x, w)
    want = np.tensordot(
        np.asarray(x, np.float64), np.asarray(w.materialize(), np.float64), (-1, -1)
    )
    assert y.shape == want.shape
    # What the digits leave out is a share of the largest of a row.
    largest = np.abs(np.asarray(x, np.float64)).max(-1, initial=0)
    largest = largest.reshape(*largest.shape, *[1] * (want.ndim - largest.ndim))
    weights = np.abs(np.asarray(w.materialize(), np.float64)).sum(-1)
    assert (np.abs(y - want) <= 4 * np.finfo(np.float32).eps * largest * weights).all()


@each_of_integers
def test_products_of_digits_are_as_accurate_as_float32(name):
    rng = np.random.default_rng(5)
    w = INTEGERS[name](jnp.asarray(rng.normal(size=(64, 4096)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(4, 4096)), jnp.float32)
    want = np.asarray(x, np.float64) @ np.asarray(w.materialize(), np.float64).T
    assert np.abs(by_digits(x, w) - want).max() < 2e-6 * np.abs(want).max()


@each_of_integers
def test_digits_of_what_is_not_finite(name):
    """As in floating point: one infinity gives infinities, or NaN where it meets a zero."""
    w = INTEGERS[name](jnp.asarray([[1.0, -2.0, 0.0], [-3.0, 1.0, 1.0]]))
    rows = [[1, np.inf, 2], [-np.inf, 0, 1], [np.nan, 1, 2], [1, np.inf, np.nan], [3e38, 1, -3e38]]
    x = jnp.asarray([*rows, [1, 2, 3]], jnp.float32)
    np.testing.assert_allclose(by_digits(x, w), x @ w.materialize().T, rtol=1e-6)


def test_small_digits_are_not_lost_below_the_smallest_normal_number():
    w = eqq.Array8B.quantize(jnp.ones((1, 2)))
    x = jnp.asarray([[2e-38, 1e-38]], jnp.float32)
    np.testing.assert_allclose(by_digits(x, w), [[3e-38]], atol=2e-38)


def test_where_digits_serve():
    last, first = Axes((1,), (1,), (), ()), Axes((1,), (0,), (), ())

    def supports(x: Any, w: Any, axes: Axes = last, accumulate: Any = jnp.float32) -> bool:
        return int8_digits.supports(Product(x, w, axes, accumulate=accumulate))

    x, w = jnp.ones((2, 4)), eqq.Array8B.quantize(jnp.ones((4, 4)))
    assert supports(x, w)
    assert not supports(x, w, first)
    assert not supports(x, w, accumulate=jnp.float64)
    assert not supports(x, eqq.Array8B.quantize(jnp.ones((4, 4)), axis=0))
    assert not supports(x, eqq.Array8B.quantize(jnp.ones((4, 4)), block_size=2))
    assert not supports(x, eqq.ArrayNF4.quantize(jnp.ones((4, 4))))
    # Sums of so many products of 8-bit numbers do not fit into 32 bits.
    long = jnp.ones((1, 140000))
    assert not supports(long, eqq.Array8B.quantize(long))
