"""Tile by tile along the first axes of the weight, so that the dense matrix never exists.

On CPU a fresh temporary of the size of the matrix costs more, in page faults, than the arithmetic.
A tile that stays in the cache costs little, and decoding it about as much as the product.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from ..._scaled import AbstractScaledArray
from ..pieces import by_pieces, rows_per_piece
from .fused import fused
from .reference import Axes


# Measured on two AVX-512 cores, float32. 4096 x 4096 at one row: tiles of 2 to 4 MiB are as fast as any, tiles
# of 1 MiB up to 1.7 times slower. 384 x 384 at 16 rows: tiles of 12 columns take twice as long as tiles of
# 12 rows. 4096 x 4096, 1024 x 1024 and 1536 x 384 at 16 rows: 12 or 16 tiles take the same time, 32 take
# 1.2 to 3 times as long.
# A matrix of at most 1 MiB is decoded as a whole. It stays in the cache, and loops are slow to compile:
# a 12-layer transformer of width 256 took 2 times as long as the dense one with a loop for each of
# its 72 products, and 1.2 times without.
MAX_TILE_BYTES = 4 << 20
SMALL_BYTES = 1 << 20
# With the weight first, 4096 x 4096, tiles of 256 outputs: 16 rows take 0.7 times as long, 64 rows 0.8 times, and
# 128 rows or more the same.
MAX_ROWS_OF_WEIGHT_FIRST = 64
# bfloat16 inputs, 4096 x 4096, time of a dot in float32 over that of one in bfloat16, for int8, NF4 and ternary
# weights. (float16 takes the same time as float32.)
#     rows      1               4               16              64              512
#          1.1, 1.0, 0.7   1.9, 1.4, 1.6   2.4, 1.6, 1.5   1.8, 1.3, 0.9   1.9, 1.7, 1.7
MIN_ROWS_OF_HALF = 2
LANES = 32
TILES = 16


def tiled(
    x: Array, w: AbstractScaledArray, *, axes: Axes, precision: Any, accumulate: Any
) -> Array:
    """As `reference`, with temporaries of less than a tenth of the dense weight.

    One axis of `w` is cut, and another one inside each piece until that is small enough: a free or
    batch axis gives the outputs piece by piece, a contracted one is summed up.
    """
    rows = math.prod(x.shape[axis] for axis in axes.x_free(x.ndim))
    # XLA for CPU multiplies bfloat16 as the product of two matrices in their plain layout, or not at all.
    half = (
        jnp.finfo(x.dtype).bits == 16
        and rows >= MIN_ROWS_OF_HALF
        and w.ndim == 2
        and len(axes.w_contract) == 1
        and not axes.w_batch
    )
    if half and (x.ndim != 2 or axes.x_contract != (1,)):
        x = jnp.moveaxis(x, axes.x_contract[0], -1)
        plain = Axes((1,), axes.w_contract, (), ())
        y = tiled(
            x.reshape(-1, x.shape[-1]), w, axes=plain, precision=precision, accumulate=accumulate
        )
        return y.reshape(*x.shape[:-1], -1)
    itemsize = jnp.dtype(accumulate).itemsize
    outputs = math.prod(axes.output_shape(x.shape, w.shape))
    limit = min(w.size // TILES, MAX_TILE_BYTES // itemsize)
    # A tile and the outputs take less than a tenth of the dense weight, if not the outputs alone do.
    room = w.size * jnp.dtype(w.dtype).itemsize * 2 // 21 // itemsize - outputs
    if room > w.size // (2 * TILES):
        limit = min(limit, room)
    limit = max(limit, 1)
    order = list(range(w.ndim)) if w.size * itemsize > SMALL_BYTES else []  # contiguous tiles first
    order.sort(key=lambda axis: limit * w.shape[axis] < w.size)  # then those too short for one cut
    packing = w.packing
    sums = outputs
    if packing is not None and packing.axis % w.ndim in axes.w_contract:
        sums *= packing.elements  # one for each plane
    if sums >= 2 * limit:
        # Partial sums larger than a tile cost more than reading tiles that are not contiguous.
        wide = [axis for axis in order if limit * w.shape[axis] >= LANES * w.size]
        order.sort(key=lambda axis: axis in axes.w_contract or axis not in (*wide, *axes.w_batch))
    weight_first = axes.w_contract == (w.ndim - 1,) and rows <= MAX_ROWS_OF_WEIGHT_FIRST
    options = dict(precision=precision, accumulate=accumulate, weight_first=weight_first)
    options |= dict(half=half, isolated=half)
    return _cut(order, x, w, axes, limit, options)


def _cut(
    order: Sequence[int],
    x: Array,
    w: AbstractScaledArray,
    axes: Axes,
    limit: int,
    options: dict[str, Any],
) -> Array:
    """The product, with the axes of `w` cut in this order, into tiles of at most `limit` elements."""
    if not order or w.size <= limit:
        return fused(x, w, axes=axes, **options)
    axis, *later = order
    rows = rows_per_piece(w, axis, limit)
    if rows == w.shape[axis]:
        return _cut(later, x, w, axes, limit, options)
    return by_pieces(
        lambda x, w: _cut(later, x, w, axes, limit, options),
        x,
        w,
        axis=axis,
        rows=rows,
        x_axis=axes.x_axis(axis),
        y_axis=axes.y_axis(axis, x.ndim, w.ndim),
        shape=axes.output_shape(x.shape, w.shape),
        dtype=options["accumulate"],
    )
