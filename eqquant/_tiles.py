"""How the stored leaves of a quantized array cover its logical axes.

Every leaf has the rank of the logical array, and along each axis it covers the logical axis in
equal tiles (the last may be partial). The functions here move a leaf through one structural
operation, or raise `Unaligned` where the result would not be a regular tiling any more.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Unaligned(Exception):
    """The result of a structural operation has no packed form."""


class Tile(NamedTuple):
    """Along one axis, `size` consecutive logical elements are held in `stored` stored elements."""

    size: int
    stored: int = 1


EACH = Tile(1)
"""One stored element for one logical element."""


class Leaf(NamedTuple):
    """A stored array and its tile along each axis.

    An `ordered` leaf (a payload) says something about each element of a tile; any other leaf (a
    scale) holds one value for the whole tile.
    """

    array: Any
    tiles: tuple[Tile, ...]
    ordered: bool

    def with_axis(self, axis: int, array: Any, tile: Tile) -> "Leaf":
        return Leaf(array, (*self.tiles[:axis], tile, *self.tiles[axis + 1 :]), self.ordered)

    def is_constant_along(self, axis: int) -> bool:
        """Whether one value holds for the whole axis."""
        return not self.ordered and self.array.shape[axis] == 1


def constant_tile(length: int) -> Tile:
    """One stored element for a whole axis of this length."""
    return Tile(max(length, 1))


def spread(leaf: Leaf, shape: Sequence[int], axes: Sequence[int] | None = None) -> Array:
    """A scale with one stored element for each logical one along `axes` (all by default).

    Along the other axes it is left as it is; an axis of constant scale stays at length 1 unless
    named in `axes`.
    """
    array = leaf.array
    for axis, (tile, length) in enumerate(zip(leaf.tiles, shape, strict=True)):
        if array.shape[axis] == length or (axes is None and leaf.is_constant_along(axis)):
            continue
        if axes is None or axis in axes:
            if array.shape[axis] == 1:
                array = lax.broadcast_in_dim(
                    array,
                    (*array.shape[:axis], length, *array.shape[axis + 1 :]),
                    range(array.ndim),
                )
            else:
                array = jnp.repeat(array, tile.size, axis=axis)
                array = lax.slice_in_dim(array, 0, length, axis=axis)
    return array


def reslice(leaf: Leaf, axis: int, length: int, start: int, stop: int, stride: int = 1) -> Leaf:
    """`leaf` of the logical array sliced `[start:stop:stride]` along an axis of `length`."""
    indices = range(start, stop, stride)
    if len(indices) == length:
        return leaf
    (size, stored), array = leaf.tiles[axis], leaf.array
    if leaf.is_constant_along(axis):
        return leaf.with_axis(axis, array, constant_tile(len(indices)))
    if size == 1:
        return leaf.with_axis(axis, lax.slice_in_dim(array, start, stop, stride, axis), EACH)
    if not leaf.ordered and len(indices) and start // size == indices[-1] // size:
        one = lax.slice_in_dim(array, start // size, start // size + 1, axis=axis)
        return leaf.with_axis(axis, one, constant_tile(len(indices)))
    if stride == 1 and start % size == 0 and (stop % size == 0 or stop == length):
        end = min(-(-stop // size) * stored, array.shape[axis])
        return leaf.with_axis(
            axis, lax.slice_in_dim(array, start // size * stored, end, axis=axis), leaf.tiles[axis]
        )
    raise Unaligned


def reverse(leaf: Leaf, axis: int, length: int) -> Leaf:
    """`leaf` of the logical array reversed along an axis of `length`."""
    size = leaf.tiles[axis].size
    if leaf.is_constant_along(axis):
        return leaf
    if size == 1 or (not leaf.ordered and length % size == 0):
        return leaf._replace(array=lax.rev(leaf.array, (axis,)))
    raise Unaligned


def transpose(leaf: Leaf, permutation: Sequence[int]) -> Leaf:
    """`leaf` of the transposed logical array."""
    return Leaf(
        lax.transpose(leaf.array, permutation),
        tuple(leaf.tiles[axis] for axis in permutation),
        leaf.ordered,
    )


def insert_axis(leaf: Leaf, axis: int) -> Leaf:
    """`leaf` of the logical array with a new axis of length 1 before `axis`."""
    tiles = (*leaf.tiles[:axis], EACH, *leaf.tiles[axis:])
    return Leaf(lax.expand_dims(leaf.array, (axis,)), tiles, leaf.ordered)


def remove_axis(leaf: Leaf, axis: int) -> Leaf:
    """`leaf` of the logical array without its `axis`, which has length 1."""
    if leaf.array.shape[axis] != 1:
        raise Unaligned
    tiles = leaf.tiles[:axis] + leaf.tiles[axis + 1 :]
    return Leaf(lax.squeeze(leaf.array, (axis,)), tiles, leaf.ordered)


def widen(leaf: Leaf, axis: int, length: int) -> Leaf:
    """`leaf` of the logical array broadcast along `axis`, from length 1 to `length`."""
    if not leaf.ordered and length:
        return leaf.with_axis(axis, leaf.array, constant_tile(length))
    if leaf.tiles[axis].size != 1:
        raise Unaligned
    array = leaf.array
    shape = (*array.shape[:axis], length, *array.shape[axis + 1 :])
    if not leaf.ordered:
        return leaf.with_axis(axis, array, constant_tile(length))
    return leaf.with_axis(axis, lax.broadcast_in_dim(array, shape, range(array.ndim)), EACH)


def join(leaves: Sequence[Leaf], axis: int, lengths: Sequence[int]) -> Leaf:
    """The leaf of logical arrays (of these lengths) concatenated along `axis`."""
    first = leaves[0]
    for other in range(len(first.tiles)):
        if other != axis and len({_shape_along(leaf, other) for leaf in leaves}) > 1:
            raise Unaligned
    sizes = {leaf.tiles[axis] for leaf, length in zip(leaves[:-1], lengths, strict=False) if length}
    tile = sizes.pop() if sizes else leaves[-1].tiles[axis]
    last = leaves[-1].tiles[axis]
    fits_last = last == tile or (
        leaves[-1].is_constant_along(axis) and lengths[-1] <= tile.size and not first.ordered
    )
    whole = all(n % tile.size == 0 for n in lengths[:-1])
    if sizes or not fits_last or not whole or any(n == 0 for n in lengths):
        raise Unaligned
    return first.with_axis(axis, lax.concatenate([leaf.array for leaf in leaves], axis), tile)


def _shape_along(leaf: Leaf, axis: int) -> tuple[Tile, int]:
    return leaf.tiles[axis], leaf.array.shape[axis]


def pad(leaf: Leaf, axis: int, length: int, low: int, high: int, interior: int) -> Leaf:
    """`leaf` of the logical array padded (`lax.pad`) along an axis of `length`, where the code 0
    means the value 0. Scales of new elements are 1; they multiply codes that are 0."""
    new_length = low + high + length + max(length - 1, 0) * interior
    if (low, high, interior) == (0, 0, 0):
        return leaf
    if leaf.is_constant_along(axis):
        return leaf.with_axis(axis, leaf.array, constant_tile(new_length))
    if leaf.tiles[axis].size != 1:
        raise Unaligned
    config = [(0, 0, 0)] * leaf.array.ndim
    config[axis] = (low, high, interior)
    filler = jnp.zeros((), leaf.array.dtype) if leaf.ordered else jnp.ones((), leaf.array.dtype)
    return leaf.with_axis(axis, lax.pad(leaf.array, filler, config), EACH)


def dynamic_slice(leaf: Leaf, axis: int, length: int, start: Any, size: int) -> Leaf:
    """`leaf` of the logical array sliced `[start : start + size]`, `start` known at run time."""
    if size == length:
        return leaf
    if leaf.is_constant_along(axis):
        return leaf.with_axis(axis, leaf.array, constant_tile(size))
    start = jnp.clip(start, 0, length - size)
    if leaf.tiles[axis].size == 1:
        array = lax.dynamic_slice_in_dim(leaf.array, start, size, axis)
        return leaf.with_axis(axis, array, EACH)
    if not leaf.ordered and size == 1:
        array = lax.dynamic_slice_in_dim(leaf.array, start // leaf.tiles[axis].size, 1, axis)
        return leaf.with_axis(axis, array, EACH)
    raise Unaligned


def reshape(leaf: Leaf, shape: Sequence[int], new_shape: Sequence[int]) -> Leaf:
    """`leaf` of the logical array of `shape` reshaped to `new_shape`, in row-major order."""
    if 0 in shape:
        raise Unaligned
    tiles = [EACH] * len(new_shape)
    stored = [1] * len(new_shape)
    for old, new in _matching_axes(shape, new_shape):
        flat, count = _merge(leaf, old, shape)
        for axis, tile, n in _split(flat, count, leaf.ordered, new, new_shape):
            tiles[axis], stored[axis] = tile, n
    return Leaf(lax.reshape(leaf.array, stored), tuple(tiles), leaf.ordered)


def _matching_axes(
    shape: Sequence[int], new_shape: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """The finest groups of consecutive axes that hold the same elements, without axes of length 1."""
    old = [i for i, n in enumerate(shape) if n != 1]
    new = [i for i, n in enumerate(new_shape) if n != 1]
    groups = []
    while old:
        left, right = [old.pop(0)], [new.pop(0)]
        a, b = shape[left[0]], new_shape[right[0]]
        while a != b:
            if a < b:
                left.append(old.pop(0))
                a *= shape[left[-1]]
            else:
                right.append(new.pop(0))
                b *= new_shape[right[-1]]
        groups.append((left, right))
    return groups


def _merge(leaf: Leaf, axes: Sequence[int], shape: Sequence[int]) -> tuple[Tile, int]:
    """The tile of the flattened axes, and how many elements of the leaf they hold."""
    *major, minor = axes
    tile, count, length = leaf.tiles[minor], leaf.array.shape[minor], shape[minor]
    if leaf.is_constant_along(minor):
        tile = constant_tile(length)
    for axis in reversed(major):
        n = leaf.array.shape[axis]
        if count == 1 and not leaf.ordered:  # one value for all that is merged so far
            size = shape[axis] if n == 1 else leaf.tiles[axis].size
            tile = Tile(size * length)
        elif leaf.tiles[axis].size != 1 or n != shape[axis] or length % tile.size:
            raise Unaligned
        count, length = count * n, length * shape[axis]
    return tile, count


def _split(
    tile: Tile, count: int, ordered: bool, axes: Sequence[int], shape: Sequence[int]
) -> list[tuple[int, Tile, int]]:
    """The inverse of `_merge`: for each of `axes` its tile and how many elements the leaf holds."""
    out = []
    for axis in reversed(axes[1:]):
        length = shape[axis]
        if length % tile.size == 0:
            n = length // tile.size * tile.stored
            out.append((axis, tile, n))
            tile = EACH
        elif not ordered and tile.size % length == 0:
            n = 1
            out.append((axis, constant_tile(length), n))
            tile = Tile(tile.size // length)
        else:
            raise Unaligned
        count //= n
    if not ordered and count == 1:
        tile = constant_tile(shape[axes[0]])
    return [*out, (axes[0], tile, count)]
