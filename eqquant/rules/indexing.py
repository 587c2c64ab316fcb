"""Indexing.

| primitive              | result                                                                     |
|------------------------|----------------------------------------------------------------------------|
| `gather`               | rows (an embedding): dense, of the size of the result; matrices: packed    |
| `dynamic_slice`        | packed, on axes of single elements or of constant scale                    |
| `dynamic_update_slice` | packed, when a block of equal format replaces whole tiles                  |
| `select_n`             | packed, when a scalar chooses between equal formats                        |
| `scatter`, …           | dense: new values have no code                                             |
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jax import Array, lax

from .. import tiles
from .._array import QuantizedArray
from .._dispatch import densify, register, transparent
from .._scaled import AbstractScaledArray
from ..tiles import as_index, constant_tile, each_along, Leaf, Tile, Unaligned, UNIT
from .structural import leafwise


# --------------------------------------------------------------------------------------- gather


@register(lax.gather_p)
def gather_scaled(
    primitive: Any,
    x: AbstractScaledArray,
    indices: Array,
    *,
    dimension_numbers: Any,
    slice_sizes: Any,
    mode: Any,
    fill_value: Any,
    **params: Any,
) -> Any:
    """Gathers codes and scales alike, then decodes what was gathered."""
    indices = as_index(indices)
    result = leafwise(x, lambda leaf: _gather(leaf, indices, dimension_numbers, slice_sizes))
    if result is NotImplemented:
        return NotImplemented
    fills = lax.GatherScatterMode.from_any(mode) == lax.GatherScatterMode.FILL_OR_DROP
    if not fills and x.ndim >= 2 and min(slice_sizes[-2:]) > 1:
        return result  # matrices out of a stack
    rows = result.materialize()
    if not fills:
        return rows
    # An index outside the array gives the fill value.
    limits = [x.shape[axis] - slice_sizes[axis] for axis in dimension_numbers.start_index_map]
    inside = jnp.all((indices >= 0) & (indices <= jnp.asarray(limits, indices.dtype)), axis=-1)
    batch = [i for i in range(rows.ndim) if i not in dimension_numbers.offset_dims]
    fill = jnp.nan if fill_value is None else fill_value
    return jnp.where(
        lax.broadcast_in_dim(inside, rows.shape, batch), rows, jnp.asarray(fill, x.dtype)
    )


def _gather(leaf: Leaf, indices: Array, numbers: Any, slice_sizes: Sequence[int]) -> Leaf:
    dropped = {int(i) for i in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)}
    if any(leaf.is_packed_along(axis) for axis in dropped):
        raise Unaligned
    sizes = list(slice_sizes)
    covers: list[Tile] = list(leaf.tiles)
    columns = [indices[..., i] for i in range(len(numbers.start_index_map))]
    for axis, length in enumerate(leaf.shape):
        stored, tile = leaf.array.shape[axis], leaf.tiles[axis]
        if axis in numbers.operand_batching_dims:
            if stored != length:
                raise Unaligned
        elif leaf.is_constant_along(axis):
            sizes[axis] = min(1, slice_sizes[axis])
            covers[axis] = constant_tile(slice_sizes[axis])
            if axis in numbers.start_index_map:
                column = numbers.start_index_map.index(axis)
                columns[column] = jnp.zeros_like(columns[column])
        elif slice_sizes[axis] == length:
            sizes[axis] = stored  # the start is clamped to 0
        elif axis in numbers.start_index_map and tile.size > 1:
            if leaf.holds_codes or slice_sizes[axis] != 1:
                raise Unaligned
            column = numbers.start_index_map.index(axis)
            columns[column] = jnp.clip(columns[column], 0, length - 1) // tile.size
            covers[axis] = UNIT
        elif tile.size > 1:
            raise Unaligned
    moved = jnp.stack(columns, axis=-1) if columns else indices
    gathered = lax.gather(leaf.array, moved, numbers, tuple(sizes), mode=lax.GatherScatterMode.CLIP)
    window = iter(
        [(slice_sizes[axis], covers[axis]) for axis in range(len(sizes)) if axis not in dropped]
    )
    axes = [
        next(window) if i in numbers.offset_dims else (n, UNIT)
        for i, n in enumerate(gathered.shape)
    ]
    return Leaf(gathered, tuple(n for n, _ in axes), tuple(t for _, t in axes), leaf.role)


# ------------------------------------------------------------------------------- dynamic slices


@register(lax.dynamic_slice_p)
def dynamic_slice_scaled(
    primitive: Any, x: AbstractScaledArray, *starts: Array, slice_sizes: Any, **params: Any
) -> Any:
    def move(leaf: Leaf) -> Leaf:
        for axis, (start, size) in enumerate(zip(starts, slice_sizes, strict=True)):
            leaf = tiles.dynamic_slice(leaf, axis, start, size)
        return leaf

    return leafwise(x, move)


@register(lax.dynamic_update_slice_p)
def dynamic_update_slice_scaled(
    primitive: Any,
    x: AbstractScaledArray,
    update: AbstractScaledArray,
    *starts: Array,
    **params: Any,
) -> Any:
    for old, new in ((x, update), (x.expanded(), update.expanded())):
        if not old.means_as(new):
            continue
        with contextlib.suppress(Unaligned):
            updates = new.leaves()
            moved = {
                name: _updated(leaf, updates[name], starts) for name, leaf in old.leaves().items()
            }
            return old.with_leaves(moved)
    return NotImplemented


def _updated(leaf: Leaf, new: Leaf, starts: Sequence[Array]) -> Leaf:
    begin = []
    for axis, start in enumerate(map(as_index, starts)):
        if new.shape[axis] == leaf.shape[axis] and (new.tiles[axis], new.array.shape[axis]) == (
            leaf.tiles[axis],
            leaf.array.shape[axis],
        ):
            begin.append(jnp.zeros_like(start))
            continue
        leaf, new = (each_along(each, [axis]) for each in (leaf, new))
        begin.append(jnp.clip(start, 0, leaf.shape[axis] - new.shape[axis]))
    return leaf._replace(array=lax.dynamic_update_slice(leaf.array, new.array, begin))


# --------------------------------------------------------------------------------------- select


@register(lax.select_n_p)
def select_n_any(
    primitive: Any, which: Array, *cases: QuantizedArray | Array, **params: Any
) -> Any:
    first = cases[0]
    same = all(
        isinstance(case, QuantizedArray)
        and jtu.tree_structure(case) == jtu.tree_structure(first)
        and [leaf.shape for leaf in jtu.tree_leaves(case)]
        == [leaf.shape for leaf in jtu.tree_leaves(first)]
        for case in cases
    )
    if not same or which.ndim:
        return NotImplemented
    return jtu.tree_map(lambda *leaves: lax.select_n(which, *leaves), *cases)


@register("scatter", "scatter-add", "scatter_add", "scatter_sub", "scatter-sub", "scatter_mul",
          "scatter-mul", "scatter_min", "scatter-min", "scatter_max", "scatter-max")  # fmt: skip
@transparent
def scatter_dense(primitive: Any, *operands: QuantizedArray | Array, **params: Any) -> Any:
    """Arbitrary new values have no code: the result is dense."""
    return densify(primitive, operands, params)[0]
