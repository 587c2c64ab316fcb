"""Tile by tile along the first stored axis of the weight, so that the dense matrix never exists.

On CPU a fresh temporary of the size of the matrix costs more, in page faults, than the arithmetic.
A tile that stays in the cache costs little, and decoding it about as much as the product.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..._array import AbstractScaledArray
from ..._tiles import dynamic_slice, remove_axis, reslice
from .fused import fused
from .reference import Axes


# Measured on two AVX-512 cores at 4096 x 4096 float32: tiles of 4 MiB are as fast as any, tiles
# of 1 MiB up to 1.7 times slower at one row. A sixteenth of the matrix bounds the memory.
MAX_TILE_BYTES = 4 << 20
SMALL_BYTES = 128 << 10
TILES = 16


def tiled(
    x: Array, w: AbstractScaledArray, *, axes: Axes, precision: Any, accumulate: Any
) -> Array:
    """As `reference`, with temporaries of about a sixteenth of the dense weight.

    The first axis of `w` decides: a free axis gives the outputs piece by piece, a contracted one
    is summed up, a batch axis is mapped over.
    """
    itemsize = jnp.dtype(accumulate).itemsize
    if w.ndim == 0 or w.size * itemsize <= SMALL_BYTES:
        return fused(x, w, axes=axes, precision=precision, accumulate=accumulate)

    def product(x: Array, w: AbstractScaledArray, axes: Axes) -> Array:
        return fused(x, w, axes=axes, precision=precision, accumulate=accumulate)

    if 0 in axes.w_batch:
        return _map_batch(x, w, axes, precision, accumulate)
    rows = _rows_per_tile(w, itemsize)
    if 0 in axes.w_contract:
        return _sum_tiles(product, x, w, axes, rows)
    return _concatenate_tiles(product, x, w, axes, rows)


_Product = Callable[[Array, AbstractScaledArray, Axes], Array]


def _rows_per_tile(w: AbstractScaledArray, itemsize: int) -> int:
    """How many entries of the first axis make a tile: whole stored tiles, at most a sixteenth."""
    length = w.shape[0]
    granule = math.lcm(
        *(leaf.tiles[0].size for leaf in w.leaves().values() if not leaf.is_constant_along(0))
    )
    row_bytes = max(w.size // length * itemsize, 1)
    rows = min(length // TILES, MAX_TILE_BYTES // row_bytes)
    return min(max(rows // granule, 1) * granule, length)


def _rows(w: AbstractScaledArray, start: Any, count: int) -> AbstractScaledArray:
    leaves = {
        name: dynamic_slice(leaf, 0, w.shape[0], start, count) for name, leaf in w.leaves().items()
    }
    return w.with_leaves(leaves)


def _last_rows(w: AbstractScaledArray, start: int) -> AbstractScaledArray:
    leaves = {
        name: reslice(leaf, 0, w.shape[0], start, w.shape[0]) for name, leaf in w.leaves().items()
    }
    return w.with_leaves(leaves)


def _concatenate_tiles(
    product: _Product, x: Array, w: AbstractScaledArray, axes: Axes, rows: int
) -> Array:
    length, position = w.shape[0], x.ndim - len(axes.x_contract)

    @jax.checkpoint
    def tile(start: Array, x: Array, w: AbstractScaledArray) -> Array:
        return product(x, _rows(w, start, rows), axes)

    def step(_: None, start: Array) -> tuple[None, Array]:
        return None, tile(start, x, w)

    count = length // rows
    _, y = lax.scan(step, None, jnp.arange(count) * rows)
    y = jnp.moveaxis(y, 0, position)
    y = y.reshape(*y.shape[:position], count * rows, *y.shape[position + 2 :])
    if count * rows == length:
        return y
    last = product(x, _last_rows(w, count * rows), axes)
    return lax.concatenate([y, last], position)


def _sum_tiles(
    product: _Product, x: Array, w: AbstractScaledArray, axes: Axes, rows: int
) -> Array:
    length, x_axis = w.shape[0], axes.x_contract[axes.w_contract.index(0)]

    @jax.checkpoint
    def tile(start: Array, x: Array, w: AbstractScaledArray) -> Array:
        x_tile = lax.dynamic_slice_in_dim(x, start, rows, x_axis)
        return product(x_tile, _rows(w, start, rows), axes)

    def step(total: Array, start: Array) -> tuple[Array, None]:
        return total + tile(start, x, w), None

    count = length // rows
    last_start = (count - 1) * rows
    x_last = lax.slice_in_dim(x, last_start, length, axis=x_axis)
    total = product(x_last, _last_rows(w, last_start), axes)
    total, _ = lax.scan(step, total, jnp.arange(count - 1) * rows)
    return total


def _map_batch(
    x: Array, w: AbstractScaledArray, axes: Axes, precision: Any, accumulate: Any
) -> Array:
    place = axes.w_batch.index(0)
    x_axis = axes.x_batch[place]

    def drop(batch: tuple[int, ...], removed: int) -> tuple[int, ...]:
        return tuple(axis - (axis > removed) for axis in batch if axis != removed)

    inner = Axes(
        drop(axes.x_contract, x_axis),
        drop(axes.w_contract, 0),
        drop(axes.x_batch, x_axis),
        drop(axes.w_batch, 0),
    )

    @jax.checkpoint
    def entry(i: Array, x: Array, w: AbstractScaledArray) -> Array:
        row = _rows(w, i, 1)
        row = row.with_leaves({name: remove_axis(leaf, 0) for name, leaf in row.leaves().items()})
        x_i = lax.dynamic_index_in_dim(x, i, x_axis, keepdims=False)
        return tiled(x_i, row, axes=inner, precision=precision, accumulate=accumulate)

    _, y = lax.scan(lambda _, i: (None, entry(i, x, w)), None, jnp.arange(w.shape[0]))
    return jnp.moveaxis(y, 0, place)
