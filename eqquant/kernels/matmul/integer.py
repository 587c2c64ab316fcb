"""Products of integers: the inputs in three 8-bit digits, the weight as it is stored.

Processors multiply 8-bit integers four times as fast as floats, and a weight of integers need not be
converted for it. With $x_j = s (d_{j0} + d_{j1} / 254 + d_{j2} / 254^2)$, where $s$ is the largest
$|x_j|$ over 127 and $|d_{jk}| \\le 127$,

$$ \\sum_j q_{ij} x_j = s \\Big( \\sum_j q_{ij} d_{j0} + \\frac{1}{254} \\sum_j q_{ij} d_{j1} + \\dots \\Big) $$

Each sum is exact in 32 bits. What is left out of $x_j$ is below $s / 254^3$: as little as float32 rounds.
"""

import functools
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..._scaled import AbstractScaledArray
from ...tiles import spread
from ..pieces import by_pieces, rows_per_piece
from .reference import Axes


DIGITS = 3
BASE = 254
# Packed weights are decoded in tiles. Measured on two AVX-512 cores, 4096 x 4096: 2 or 4 of them are as
# fast as any, 16 take 1.5 times as long. Tiles of at most 4 MiB stay in the cache.
TILES = 4
MAX_TILE = 4 << 20


def supports(x: Array, w: AbstractScaledArray, axes: Axes, accumulate: Any) -> bool:
    """Whether `integer` computes this product: of integers, along the last stored axis of `w` alone, with a
    scale that leaves the sum."""
    if w.ndim < 2:
        return False
    axis = w.ndim - 1
    scale = w.scale_leaf
    return (
        w.integers
        and not axes.w_batch
        and axes.w_contract == (axis,)
        and (w.packing is None or w.packing.axis == -1)
        and (scale is None or scale.is_constant_along(axis))
        and jnp.dtype(accumulate) == jnp.float32
        and w.shape[axis] * 127 * 128 < 2**31
    )


def integer(
    x: Array,
    w: AbstractScaledArray,
    *,
    axes: Axes,
    precision: Any,
    accumulate: Any,
    digits: int = DIGITS,
) -> Array:
    """As `reference`, where `supports` says so. One digit is exact if `x` comes from `rounded_rows`.

    A row of `x` that holds an infinity gives infinities or NaN, one that holds NaN gives NaN.
    """
    (x_axis,) = axes.x_contract
    x = jnp.moveaxis(x, x_axis, 0)
    columns = x.reshape(len(x), -1).astype(accumulate)
    parts, unit = _digits(columns, digits)
    sums = _sums(parts, w).reshape(*w.shape[:-1], digits, columns.shape[1]).astype(accumulate)
    y = lax.index_in_dim(sums, digits - 1, w.ndim - 1, keepdims=False)
    for i in reversed(range(digits - 1)):
        y = lax.index_in_dim(sums, i, w.ndim - 1, keepdims=False) + y / BASE
    if w.scale_leaf is not None:
        free = range(w.ndim - 1)
        y = y * spread(w.scale_leaf, free).astype(accumulate)
    return jnp.moveaxis(y * unit, -1, 0).reshape(*x.shape[1:], *w.shape[:-1])


def rounded_rows(x: Array, axes: Sequence[int]) -> Array:
    """`x` rounded to 8 bits: the numbers along `axes` to integers times their largest magnitude over 127.
    Its derivative is the identity."""
    return _rounded_rows(x, tuple(axes))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded_rows(x: Array, axes: tuple[int, ...]) -> Array:
    scaled, unit = _scaled(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axes)
    # Rounding to the dtype of `x` may move a number, but not to where another integer is nearest.
    rounded = jnp.where(jnp.isinf(unit), jnp.where(jnp.isinf(x), x, 0), jnp.round(scaled) * unit)
    return rounded.astype(x.dtype)


@_rounded_rows.defjvp
def _rounded_rows_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _rounded_rows(*primals, axes), tangents[0]


def _scaled(x: Array, axes: Sequence[int]) -> tuple[Array, Array]:
    """`x` over a 127th of its largest magnitude along `axes`, and that: the unit of its digits."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    unit = jnp.maximum(largest / 127, jnp.finfo(x.dtype).tiny)
    # Infinite inputs are the only ones that count in their row.
    return jnp.where(jnp.isinf(x), jnp.sign(x) * 127, x / unit), unit


def _digits(x: Array, count: int) -> tuple[Array, Array]:
    """The digits of the columns of `x`, side by side (inputs, digits x columns), and their units."""
    rest, unit = _scaled(x, (0,))
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
        rows=rows_per_piece(w, axis, min(w.size // TILES, MAX_TILE)),
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
