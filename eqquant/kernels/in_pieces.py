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
    limit: int,
    x_axis: int | None,
    y_axis: int | None,
    shape: Sequence[Any],
    dtype: Any,
) -> Array:
    """`product(x, w)`, of this shape and dtype, from pieces of at most `limit` elements, cut along `axis`
    of `w`.

    `x_axis` is cut along with `axis` (None: all of `x` goes to each piece). The results are laid
    side by side along `y_axis`, or summed up if that is None.
    """
    whole, length = w.shape[axis], _piece_length(w, axis, limit)
    if length == whole:
        return product(x, w).astype(dtype)
    count = whole // length
    done = count * length

    @jax.checkpoint
    def piece(i: Array, x: Array, w: AbstractScaledArray) -> Array:
        if x_axis is not None:
            x = lax.dynamic_slice_in_dim(x, i * length, length, x_axis)
        return product(x, _piece(w, axis, i, length))

    def put(y: Array, part: Array, start: Any) -> Array:
        if y_axis is None:
            return y + part
        return lax.dynamic_update_slice_in_dim(y, part, start, y_axis)

    y = zeros((x, w), shape, dtype)
    y, _ = lax.scan(lambda y, i: (put(y, piece(i, x, w), i * length), None), y, jnp.arange(count))
    if done == whole:
        return y
    if x_axis is not None:
        x = lax.slice_in_dim(x, done, whole, axis=x_axis)
    return put(y, product(x, w.moved(lambda leaf: reslice(leaf, axis, done, whole))), done)


def zeros(operands: Any, shape: Sequence[Any], dtype: Any) -> Array:
    """Zeros to sum up what comes of `operands`: inside `shard_map` they vary over the mesh as these do."""
    each = [lax.full_like(leaf, 0, dtype, shape) for leaf in jtu.tree_leaves(operands)]
    return functools.reduce(operator.add, each)


def _piece_length(w: AbstractScaledArray, axis: int, limit: int) -> int:
    """How many entries of `axis` make a piece of at most `limit` elements, if that is possible.

    Whole stored tiles, or an equal part of the tile of a scale; it divides the axis if it can.
    """
    whole = w.shape[axis]
    varying = [leaf for leaf in w.leaves().values() if not leaf.is_constant_along(axis)]
    payload = math.lcm(*(leaf.tiles[axis].size for leaf in varying if leaf.holds_codes))
    scales = [leaf.tiles[axis].size for leaf in varying if not leaf.holds_codes]
    most = limit * whole // max(w.size, 1)
    fitting = [
        length
        for length in range(most - most % payload, most // 2, -payload)
        if all(length % size == 0 or size % length == 0 for size in scales)
    ]
    dividing = [length for length in fitting if whole % length == 0]
    return min([*dividing, *fitting, math.lcm(payload, *scales)][0], whole)


def _piece(w: AbstractScaledArray, axis: int, i: Array, length: int) -> AbstractScaledArray:
    """The `i`-th `length` entries of `axis`."""

    def cut(leaf: Leaf) -> Leaf:
        size, stored = leaf.tiles[axis]
        if leaf.is_constant_along(axis):
            return leaf.with_axis(axis, leaf.array, constant_tile(length), length)
        if length % size:
            array = lax.dynamic_slice_in_dim(leaf.array, i * length // size, 1, axis)
            return leaf.with_axis(axis, array, constant_tile(length), length)
        count = length // size * stored
        array = lax.dynamic_slice_in_dim(leaf.array, i * count, count, axis)
        return leaf.with_axis(axis, array, leaf.tiles[axis], length)

    return w.moved(cut)
