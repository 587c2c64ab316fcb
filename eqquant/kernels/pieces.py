"""Linear maps of a quantized array, piece by piece, so that it is never dense as a whole."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import Array, lax

from .._scaled import AbstractScaledArray
from ..tiles import constant_tile, Leaf, reslice


def by_pieces(
    product: Callable[[Array, AbstractScaledArray], Array],
    x: Array,
    w: AbstractScaledArray,
    *,
    axis: int,
    rows: int,
    x_axis: int | None,
    y_axis: int | None,
    shape: Sequence[int],
    dtype: Any,
) -> Array:
    """`product(x, w)`, of this shape and dtype, from pieces of `rows` entries of `axis` of `w`.

    `x_axis` is cut along with `axis` (None: all of `x` goes to each piece). The results are laid
    side by side along `y_axis`, or summed up if that is None.
    """
    length = w.shape[axis]
    if rows == length:
        return product(x, w).astype(dtype)
    count = length // rows
    done = count * rows

    @jax.checkpoint
    def piece(i: Array, x: Array, w: AbstractScaledArray) -> Array:
        if x_axis is not None:
            x = lax.dynamic_slice_in_dim(x, i * rows, rows, x_axis)
        return product(x, _piece(w, axis, i, rows))

    def put(y: Array, part: Array, start: Any) -> Array:
        if y_axis is None:
            return y + part
        return lax.dynamic_update_slice_in_dim(y, part, start, y_axis)

    y = zeros((x, w), shape, dtype)
    y, _ = lax.scan(lambda y, i: (put(y, piece(i, x, w), i * rows), None), y, jnp.arange(count))
    if done == length:
        return y
    if x_axis is not None:
        x = lax.slice_in_dim(x, done, length, axis=x_axis)
    return put(y, product(x, slice_rows(w, axis, done, length)), done)


def zeros(operands: Any, shape: Sequence[int], dtype: Any) -> Array:
    """Zeros to sum up what comes of `operands`: inside `shard_map` they vary over the mesh as these do."""
    each = [lax.full_like(leaf, 0, dtype, shape) for leaf in jtu.tree_leaves(operands)]
    return functools.reduce(operator.add, each)


def rows_per_piece(w: AbstractScaledArray, axis: int, limit: int) -> int:
    """How many entries of `axis` make a piece of at most `limit` elements, if that is possible.

    Whole stored tiles, or an equal part of the tile of a scale; it divides the length if it can.
    """
    length = w.shape[axis]
    varying = [leaf for leaf in w.leaves().values() if not leaf.is_constant_along(axis)]
    payload = math.lcm(*(leaf.tiles[axis].size for leaf in varying if leaf.holds_codes))
    scales = [leaf.tiles[axis].size for leaf in varying if not leaf.holds_codes]
    most = limit * length // w.size
    fitting = [
        rows
        for rows in range(most - most % payload, most // 2, -payload)
        if all(rows % size == 0 or size % rows == 0 for size in scales)
    ]
    dividing = [rows for rows in fitting if length % rows == 0]
    return min([*dividing, *fitting, math.lcm(payload, *scales)][0], length)


def _piece(w: AbstractScaledArray, axis: int, i: Array, rows: int) -> AbstractScaledArray:
    """The `i`-th `rows` entries of `axis`."""

    def cut(leaf: Leaf) -> Leaf:
        size, stored = leaf.tiles[axis]
        if leaf.is_constant_along(axis):
            return leaf.with_axis(axis, leaf.array, constant_tile(rows), rows)
        if rows % size:
            array = lax.dynamic_slice_in_dim(leaf.array, i * rows // size, 1, axis)
            return leaf.with_axis(axis, array, constant_tile(rows), rows)
        count = rows // size * stored
        array = lax.dynamic_slice_in_dim(leaf.array, i * count, count, axis)
        return leaf.with_axis(axis, array, leaf.tiles[axis], rows)

    return w.moved(cut)


def slice_rows(w: AbstractScaledArray, axis: int, start: int, stop: int) -> AbstractScaledArray:
    """The entries of `axis` from `start` to `stop`."""
    return w.moved(lambda leaf: reslice(leaf, axis, start, stop))
