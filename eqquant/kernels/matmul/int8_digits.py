"""Products of integers: the inputs in three 8-bit digits, the weight as it is stored.

Processors multiply 8-bit integers four times as fast as floats, and a weight of integers need not be
converted for it. With $x_j = s (d_{j0} + d_{j1} / 254 + d_{j2} / 254^2)$, where $s$ is the largest
$|x_j|$ over 127 and $|d_{jk}| \\le 127$,

$$ \\sum_j q_{ij} x_j = s \\Big( \\sum_j q_{ij} d_{j0} + \\frac{1}{254} \\sum_j q_{ij} d_{j1} + \\dots \\Big) $$

Each sum is exact in 32 bits. What is left out of $x_j$ is below $s / 254^3$: as little as float32 rounds.
"""

import functools
import operator

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..._scaled import AbstractScaledArray
from ...tiles import to_elements
from ..activations import scaled_to_int8
from ..in_pieces import by_pieces
from .product import Product, Target


BASE = 254
TILES = 4  # of a packed weight: on two AVX-512 cores, 2 or 4 are as fast as any, 16 take 1.5 times as long
MAX_TILE = 4 << 20  # bytes that stay in the cache


def supports(product: Product) -> bool:
    """Whether `compute` does: products with integers, along the last stored axis of `w` alone, with a scale that
    leaves the sum."""
    w, axis = product.w, product.w.ndim - 1
    return (
        w.ndim >= 2
        and w.integers
        and not product.axes.w_batch
        and product.axes.w_contract == (axis,)
        and (w.packing is None or w.packing.axis == -1)
        and product.scale_leaves_the_sum
        and jnp.dtype(product.accumulate) == jnp.float32
        and w.shape[axis] * 127 * 128 < 2**31
    )


def compute(product: Product, target: Target) -> Array:
    """As `reference`, where `supports` says so. One digit is exact if `x` is rounded to 8 bits.

    A row of `x` that holds an infinity gives infinities or NaN, one that holds NaN gives NaN.
    """
    w, digits, accumulate = product.w, product.digits, product.accumulate
    (x_axis,) = product.axes.x_contract
    x = jnp.moveaxis(product.x, x_axis, 0)
    columns = x.reshape(len(x), -1).astype(accumulate)
    parts, unit = _digits(columns, digits)
    sums = _sums(parts, w).reshape(*w.shape[:-1], digits, columns.shape[1]).astype(accumulate)
    y = lax.index_in_dim(sums, digits - 1, w.ndim - 1, keepdims=False)
    for i in reversed(range(digits - 1)):
        y = lax.index_in_dim(sums, i, w.ndim - 1, keepdims=False) + y / BASE
    if w.scale_leaf is not None:
        y = y * to_elements(w.scale_leaf, range(w.ndim - 1)).astype(accumulate)
    return jnp.moveaxis(y * unit, -1, 0).reshape(*x.shape[1:], *w.shape[:-1])


def _digits(x: Array, count: int) -> tuple[Array, Array]:
    """The digits of the columns of `x`, side by side (inputs, digits x columns), and their units."""
    rest, unit = scaled_to_int8(x, (0,))
    digits = []
    for _ in range(count):
        digit = jnp.round(rest)
        digits.append(digit.astype(jnp.int8))
        rest = (rest - digit) * BASE
    return jnp.concatenate(digits, axis=1), unit[0]


def _sums(digits: Array, w: AbstractScaledArray) -> Array:
    """The products of the unscaled values with `digits`, in 32-bit integers: the outputs come first."""
    packing = w.packing
    if packing is None:
        return _dot(w.values(jnp.int8), digits)
    parts = packing._replace(axis=-2).split(digits)

    def product(digits: Array, w: AbstractScaledArray) -> Array:
        products = (_dot(w.plane(i, jnp.int8), part) for i, part in enumerate(parts))
        return functools.reduce(operator.add, products)

    axis = int(np.argmax(w.shape[:-1]))
    return by_pieces(
        product,
        digits,
        w,
        axis=axis,
        limit=min(w.size // TILES, MAX_TILE),
        x_axis=None,
        y_axis=axis,
        shape=(*w.shape[:-1], digits.shape[1]),
        dtype=jnp.int32,
    )


def _dot(values: Array, digits: Array) -> Array:
    # The weight comes first: then XLA's library does not copy it to another layout. A single column
    # it does not take.
    columns = digits.shape[1]
    if columns == 1:
        digits = jnp.pad(digits, ((0, 0), (0, 1)))
    numbers = (((values.ndim - 1,), (0,)), ((), ()))
    sums = lax.dot_general(values, digits, numbers, preferred_element_type=jnp.int32)
    return lax.slice_in_dim(sums, 0, columns, axis=values.ndim - 1)
