"""How the stored leaves of a quantized array cover its logical axes.

Every leaf has the rank of the logical array, and along each axis it covers the logical axis in
equal tiles (the last may be partial). `Packing` says how a payload that holds several elements in
one stored number does so. The functions below it move a leaf through one structural operation, or
raise `Unaligned` where the result would not be a regular tiling any more.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Unaligned(Exception):
    """The result of a structural operation has no packed form."""


class Tile(NamedTuple):
    """Along one axis, `size` consecutive logical elements are held in `stored` stored elements.

    There may be slack: 64 elements in 13 numbers that hold five each leave one place unused.
    """

    size: int
    stored: int = 1


UNIT = Tile(1)
"""One stored element for one logical element."""


Role = Literal["codes", "factor", "summand"]
"""What a leaf is for. Codes say something about each element of a tile; a factor or a summand holds one
number for the whole tile."""
BlockSize = int | tuple[int, ...] | None
"""How many elements share a number along an axis that has several numbers, but not one for each element: the same
along all such axes; or one size for each of the last axes; None if there is no such axis."""


class Leaf(NamedTuple):
    """A stored array, the shape of the logical array, the tile along each axis, and what the array is for."""

    array: Any
    shape: tuple[int, ...]
    tiles: tuple[Tile, ...]
    role: Role

    @property
    def holds_codes(self) -> bool:
        """Whether this says something about each element of a tile."""
        return self.role == "codes"

    def with_axis(self, axis: int, array: Any, tile: Tile, length: int) -> "Leaf":
        """This leaf with another array, that has this tile and logical length along `axis`."""
        shape = (*self.shape[:axis], length, *self.shape[axis + 1 :])
        tiles = (*self.tiles[:axis], tile, *self.tiles[axis + 1 :])
        return Leaf(array, shape, tiles, self.role)

    def is_constant_along(self, axis: int) -> bool:
        """Whether one value holds for the whole axis."""
        return not self.holds_codes and self.array.shape[axis] == 1

    def is_packed_along(self, axis: int) -> bool:
        """Whether a stored element holds something about several elements of this axis."""
        return self.holds_codes and self.tiles[axis].size != 1


def constant_tile(length: int) -> Tile:
    """One stored element for a whole axis of this length."""
    return Tile(max(length, 1))


# ------------------------------------------------------------------------- from and to the fields


class Packing(NamedTuple):
    """How one axis of a payload holds several elements in one stored number.

    Tiles are *planar*: with `tile = Tile(size, stored)`, stored element `j` of a tile holds the
    logical elements `j`, `j + stored`, `j + 2 stored`, ... of it. So no kernel has to interleave.
    The last tile is filled up with zeros; `length` says where the array ends.
    """

    axis: int
    """The packed axis, counted from the end: `vmap` and `scan` add and remove axes at the front."""
    length: int
    """How many logical elements the axis has."""
    tile: Tile

    @property
    def elements(self) -> int:
        """How many logical elements one stored element holds, at most."""
        return -(-self.tile.size // self.tile.stored)

    @property
    def stored(self) -> int:
        """How many stored elements the axis has."""
        return -(-self.length // self.tile.size) * self.tile.stored

    def check(self, shape: Sequence[Any]) -> None:
        """Raises `ValueError` unless a payload of this shape can be packed so."""
        if -self.axis > len(shape) or shape[self.axis] != self.stored:
            raise ValueError(
                f"The packed axis {self.axis} of a quantized array should have {self.stored} stored "
                f"elements, but its payload has shape {tuple(shape)}: was that axis cut or moved by "
                "vmap or scan? Only other axes can be; materialize the array first."
            )

    def split(self, x: Array) -> list[Array]:
        """The planes of a logical array: the first holds the first element of each stored number."""
        axis = self.axis % x.ndim
        size, stored = self.tile
        tiles = -(-self.length // size)
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        x = _fill(x, axis, tiles * size)
        if slack := self.elements * stored - size:
            x = _fill(x.reshape(*before, tiles, size, *after), axis + 1, size + slack)
        x = x.reshape(*before, tiles, self.elements, stored, *after)
        stored = (*before, self.stored, *after)
        return [lax.index_in_dim(x, i, axis + 1).reshape(stored) for i in range(self.elements)]

    def merge(self, planes: Sequence[Array]) -> Array:
        """The inverse of `split`."""
        shape = planes[0].shape
        self.check(shape)
        axis = self.axis % len(shape)
        tiles = shape[axis] // self.tile.stored
        split = (*shape[:axis], tiles, 1, self.tile.stored, *shape[axis + 1 :])
        x = lax.concatenate([plane.reshape(split) for plane in planes], axis + 1)
        if self.elements * self.tile.stored > self.tile.size:  # slack
            x = x.reshape(
                *shape[:axis], tiles, self.elements * self.tile.stored, *shape[axis + 1 :]
            )
            x = lax.slice_in_dim(x, 0, self.tile.size, axis=axis + 1)
        x = x.reshape(*shape[:axis], tiles * self.tile.size, *shape[axis + 1 :])
        return lax.slice_in_dim(x, 0, self.length, axis=axis)

    def of_high_bits(self, bits: int, high_bits: int) -> "Packing":
        """How a second payload holds the `high_bits` of the same elements, if the first has their `bits`."""
        size, stored = self.tile
        if stored * high_bits % bits:
            raise Unaligned
        return self._replace(tile=Tile(size, stored * high_bits // bits))


def _fill(x: Array, axis: int, length: int) -> Array:
    """`x` with zeros at the end of `axis`, up to this length."""
    missing = length - x.shape[axis]
    return jnp.pad(x, [(0, missing * (i == axis)) for i in range(x.ndim)]) if missing else x


def payload_leaf(array: Any, packing: Packing | None) -> Leaf:
    """A payload with one stored element for each logical one, except along a packed axis.

    **Raises:** `ValueError` if the packed axis of `array` does not hold what `packing` says.
    """
    tiles, shape = [UNIT] * array.ndim, list(array.shape)
    if packing is not None:
        packing.check(shape)
        tiles[packing.axis], shape[packing.axis] = packing.tile, packing.length
    return Leaf(array, tuple(shape), tuple(tiles), role="codes")


def packing_of(leaf: Leaf) -> Packing | None:
    """The inverse of `payload_leaf`."""
    packed = [axis for axis in range(len(leaf.tiles)) if leaf.is_packed_along(axis)]
    if not packed:
        return None
    if len(packed) > 1:
        raise Unaligned
    (axis,) = packed
    return Packing(axis - len(leaf.tiles), leaf.shape[axis], leaf.tiles[axis])


def scale_leaf(
    scale: Any, shape: Sequence[int], block_size: BlockSize = None, role: Role = "factor"
) -> Leaf:
    """Numbers of the rank of `shape`: along each axis one for all, one each, or one for every block."""
    tiles = []
    for axis, (stored, length) in enumerate(zip(scale.shape, shape, strict=True)):
        if stored == 1:
            tiles.append(constant_tile(length))
        elif stored == length:
            tiles.append(UNIT)
        else:
            tiles.append(Tile(block_size_along(block_size, axis - len(shape))))
    return Leaf(scale, tuple(shape), tuple(tiles), role)


def block_size_along(block_size: BlockSize, axis: int) -> int:
    """The block size along an axis that is counted from the end; 0 if it has none."""
    if isinstance(block_size, tuple):
        return block_size[axis] if -axis <= len(block_size) else 0
    return block_size or 0


def common_block_size(leaves: Iterable[Leaf]) -> BlockSize:
    """The inverse of `scale_leaf`: the block size that says the tiles of all these leaves.

    **Raises:** `Unaligned` if two of them have blocks of different sizes along one axis.
    """
    sizes: dict[int, int] = {}
    for leaf in leaves:
        for axis, tile in enumerate(leaf.tiles, start=-len(leaf.tiles)):
            if tile.size == 1 or leaf.is_constant_along(axis):
                continue
            if sizes.setdefault(axis, tile.size) != tile.size:
                raise Unaligned
    if len(set(sizes.values())) < 2:
        return next(iter(sizes.values()), None)
    return tuple(sizes.get(axis, 1) for axis in range(min(sizes), 0))


def check_scale(name: str, scale: Any, shape: Sequence[int], block_size: BlockSize) -> None:
    """Raises `ValueError` unless `scale_leaf` has a meaning for these arguments."""
    if scale.ndim != len(shape):
        raise ValueError(
            f"{name} must have the rank of the array (keep reduced axes at length 1); {name} has "
            f"shape {scale.shape}, the array {tuple(shape)}."
        )
    for axis, (stored, length) in enumerate(zip(scale.shape, shape, strict=True)):
        size = block_size_along(block_size, axis - len(shape))
        blocks = -(-length // size) if size else 1
        if stored not in (1, length, blocks):
            raise ValueError(
                f"{name} has {stored} entries along axis {axis}, where the array has {length} and "
                f"block_size is {block_size}: expected 1, {length} or {blocks}."
            )


def to_elements(leaf: Leaf, axes: Iterable[int]) -> Array:
    """A factor or summand with one number for each logical element along these axes, and along the others as it is."""
    array = leaf.array
    for axis in axes:
        length = leaf.shape[axis]
        if array.shape[axis] == length:
            continue
        if leaf.is_constant_along(axis):
            shape = (*array.shape[:axis], length, *array.shape[axis + 1 :])
            array = lax.broadcast_in_dim(array, shape, range(array.ndim))
        else:
            array = repeat(array, leaf.tiles[axis].size, axis, length)
    return array


def broadcastable(leaf: Leaf) -> Array:
    """A factor or summand that combines with the logical array: one number for each element along an axis, or one for
    all of them."""
    return to_elements(
        leaf, [axis for axis in range(len(leaf.shape)) if not leaf.is_constant_along(axis)]
    )


def each_along(leaf: Leaf, axes: Iterable[int]) -> Leaf:
    """`leaf` as long as the logical array is along these axes. Raises `Unaligned` for codes that are packed."""
    for axis in axes:
        if leaf.array.shape[axis] != leaf.shape[axis] or leaf.is_packed_along(axis):
            if leaf.holds_codes:
                raise Unaligned
            leaf = leaf.with_axis(axis, to_elements(leaf, [axis]), UNIT, leaf.shape[axis])
    return leaf


def combine(function: Callable[[Array, Array], Array], a: Leaf, b: Leaf) -> Leaf:
    """The function of two leaves of numbers, on tiles within which both are constant."""
    a, b = refined(a, b), refined(b, a)
    tiles = tuple(
        theirs if a.is_constant_along(axis) else own
        for axis, (own, theirs) in enumerate(zip(a.tiles, b.tiles, strict=True))
    )
    return a._replace(array=function(a.array, b.array), tiles=tiles)


def refined(leaf: Leaf, other: Leaf) -> Leaf:
    """`leaf` with numbers repeated until its tiles lie within those of `other` or hold whole ones of them, along each
    axis along which neither is constant."""
    for axis, length in enumerate(leaf.shape):
        own, theirs = leaf.tiles[axis].size, other.tiles[axis].size
        if leaf.is_constant_along(axis) or other.is_constant_along(axis) or theirs % own == 0:
            continue
        if own % theirs == 0:
            array = repeat(leaf.array, own // theirs, axis, other.array.shape[axis])
            leaf = leaf.with_axis(axis, array, other.tiles[axis], length)
        else:
            leaf = leaf.with_axis(axis, to_elements(leaf, [axis]), UNIT, length)
    return leaf


def rounded(x: Array) -> Array:
    """`x`, in a form that keeps XLA from fusing the product that it is with a sum into one rounding."""
    return jnp.where(x == x, x, jnp.nan)


def repeat(array: Array, times: int, axis: int, length: int) -> Array:
    """Each entry of `axis` so many times, the last ones left out beyond `length`."""
    # Not jnp.repeat: with explicit mesh axes it asks how to split the result.
    axis %= array.ndim
    before, after = array.shape[: axis + 1], array.shape[axis + 1 :]
    others = [i for i in range(array.ndim + 1) if i != axis + 1]
    array = lax.broadcast_in_dim(array, (*before, times, *after), others)
    array = array.reshape(*before[:-1], before[-1] * times, *after)
    return lax.slice_in_dim(array, 0, length, axis=axis)


# ------------------------------------------------------------------------- structural operations


def reslice(leaf: Leaf, axis: int, start: int, stop: int, stride: int = 1) -> Leaf:
    """`leaf` of the logical array sliced `[start:stop:stride]` along `axis`."""
    indices, length = range(start, stop, stride), leaf.shape[axis]
    if len(indices) == length:
        return leaf
    (size, stored), array = leaf.tiles[axis], leaf.array
    if leaf.is_constant_along(axis):
        return leaf.with_axis(axis, array, constant_tile(len(indices)), len(indices))
    if size == 1:
        array = lax.slice_in_dim(array, start, stop, stride, axis)
        return leaf.with_axis(axis, array, UNIT, len(indices))
    if not leaf.holds_codes and len(indices) and start // size == indices[-1] // size:
        one = lax.slice_in_dim(array, start // size, start // size + 1, axis=axis)
        return leaf.with_axis(axis, one, constant_tile(len(indices)), len(indices))
    if stride == 1 and start % size == 0 and (stop % size == 0 or stop == length):
        end = min(-(-stop // size) * stored, array.shape[axis])
        array = lax.slice_in_dim(array, start // size * stored, end, axis=axis)
        return leaf.with_axis(axis, array, leaf.tiles[axis], len(indices))
    raise Unaligned


def reverse(leaf: Leaf, axis: int) -> Leaf:
    """`leaf` of the logical array reversed along `axis`."""
    size = leaf.tiles[axis].size
    if leaf.is_constant_along(axis):
        return leaf
    if size == 1 or (not leaf.holds_codes and leaf.shape[axis] % size == 0):
        return leaf._replace(array=lax.rev(leaf.array, (axis,)))
    raise Unaligned


def transpose(leaf: Leaf, permutation: Sequence[int]) -> Leaf:
    """`leaf` of the transposed logical array."""
    return Leaf(
        lax.transpose(leaf.array, permutation),
        tuple(leaf.shape[axis] for axis in permutation),
        tuple(leaf.tiles[axis] for axis in permutation),
        leaf.role,
    )


def insert_axis(leaf: Leaf, axis: int) -> Leaf:
    """`leaf` of the logical array with a new axis of length 1 before `axis`."""
    tiles = (*leaf.tiles[:axis], UNIT, *leaf.tiles[axis:])
    shape = (*leaf.shape[:axis], 1, *leaf.shape[axis:])
    return Leaf(lax.expand_dims(leaf.array, (axis,)), shape, tiles, leaf.role)


def remove_axis(leaf: Leaf, axis: int) -> Leaf:
    """`leaf` of the logical array without its `axis`, which has length 1."""
    if leaf.is_packed_along(axis):
        raise Unaligned
    tiles = leaf.tiles[:axis] + leaf.tiles[axis + 1 :]
    shape = leaf.shape[:axis] + leaf.shape[axis + 1 :]
    return Leaf(lax.squeeze(leaf.array, (axis,)), shape, tiles, leaf.role)


def widen(leaf: Leaf, axis: int, length: int) -> Leaf:
    """`leaf` of the logical array broadcast along `axis`, from length 1 to `length`."""
    if not leaf.holds_codes and length:
        return leaf.with_axis(axis, leaf.array, constant_tile(length), length)
    if leaf.tiles[axis].size != 1:
        raise Unaligned
    array = leaf.array
    shape = (*array.shape[:axis], length, *array.shape[axis + 1 :])
    if not leaf.holds_codes:
        return leaf.with_axis(axis, array, constant_tile(length), length)
    array = lax.broadcast_in_dim(array, shape, range(array.ndim))
    return leaf.with_axis(axis, array, UNIT, length)


def join(leaves: Sequence[Leaf], axis: int) -> Leaf:
    """The leaf of logical arrays concatenated along `axis`."""
    first, lengths = leaves[0], [leaf.shape[axis] for leaf in leaves]
    for other in range(len(first.tiles)):
        if other != axis and len({_shape_along(leaf, other) for leaf in leaves}) > 1:
            raise Unaligned
    sizes = {leaf.tiles[axis] for leaf, length in zip(leaves[:-1], lengths, strict=False) if length}
    tile = sizes.pop() if sizes else leaves[-1].tiles[axis]
    last = leaves[-1].tiles[axis]
    fits_last = last == tile or (
        leaves[-1].is_constant_along(axis) and lengths[-1] <= tile.size and not first.holds_codes
    )
    whole = all(n % tile.size == 0 for n in lengths[:-1])
    alike = len({leaf.array.dtype for leaf in leaves}) == 1
    if sizes or not alike or not fits_last or not whole or any(n == 0 for n in lengths):
        raise Unaligned
    array = lax.concatenate([leaf.array for leaf in leaves], axis)
    return first.with_axis(axis, array, tile, sum(lengths))


def _shape_along(leaf: Leaf, axis: int) -> tuple[Tile, int]:
    return leaf.tiles[axis], leaf.array.shape[axis]


def pad(leaf: Leaf, axis: int, low: int, high: int, interior: int, filler: Any) -> Leaf:
    """`leaf` of the logical array padded (`lax.pad`) along `axis` with elements that store `filler`."""
    length = leaf.shape[axis]
    new_length = low + high + length + max(length - 1, 0) * interior
    if (low, high, interior) == (0, 0, 0):
        return leaf
    if leaf.role == "factor" and leaf.is_constant_along(axis):
        return leaf.with_axis(axis, leaf.array, constant_tile(new_length), new_length)
    if leaf.tiles[axis].size != 1:
        raise Unaligned
    config = [(0, 0, 0)] * leaf.array.ndim
    config[axis] = (low, high, interior)
    array = lax.pad(leaf.array, jnp.asarray(filler, leaf.array.dtype), config)
    return leaf.with_axis(axis, array, UNIT, new_length)


def as_index(x: Any) -> Array:
    """Integers that can be compared with the length of any axis: those of 8 or 16 bits cannot."""
    x = jnp.asarray(x)
    return x.astype(jnp.int32) if x.dtype.itemsize < 4 else x


def dynamic_slice(leaf: Leaf, axis: int, start: Any, size: int) -> Leaf:
    """`leaf` of the logical array sliced `[start : start + size]`, `start` known at run time."""
    length = leaf.shape[axis]
    if size == length:
        return leaf
    if leaf.is_constant_along(axis):
        return leaf.with_axis(axis, leaf.array, constant_tile(size), size)
    start = jnp.clip(as_index(start), 0, length - size)
    if leaf.tiles[axis].size == 1:
        array = lax.dynamic_slice_in_dim(leaf.array, start, size, axis)
        return leaf.with_axis(axis, array, UNIT, size)
    if not leaf.holds_codes and size == 1:
        array = lax.dynamic_slice_in_dim(leaf.array, start // leaf.tiles[axis].size, 1, axis)
        return leaf.with_axis(axis, array, UNIT, 1)
    raise Unaligned


def reshape(leaf: Leaf, new_shape: Sequence[int]) -> Leaf:
    """`leaf` of the logical array reshaped to `new_shape`, in row-major order."""
    shape = leaf.shape
    packed_alone = any(n == 1 and leaf.is_packed_along(axis) for axis, n in enumerate(shape))
    if 0 in shape or packed_alone:
        raise Unaligned
    tiles = [UNIT] * len(new_shape)
    stored = [1] * len(new_shape)
    for old, new in _matching_axes(shape, new_shape):
        flat, count = _merge(leaf, old)
        for axis, tile, n in _split(flat, count, leaf.holds_codes, new, new_shape):
            tiles[axis], stored[axis] = tile, n
    return Leaf(lax.reshape(leaf.array, stored), tuple(new_shape), tuple(tiles), leaf.role)


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


def _merge(leaf: Leaf, axes: Sequence[int]) -> tuple[Tile, int]:
    """The tile of the flattened axes, and how many elements of the leaf they hold."""
    *major, minor = axes
    shape = leaf.shape
    tile, count, length = leaf.tiles[minor], leaf.array.shape[minor], shape[minor]
    if leaf.is_constant_along(minor):
        tile = constant_tile(length)
    for axis in reversed(major):
        n = leaf.array.shape[axis]
        if count == 1 and not leaf.holds_codes:  # one value for all that is merged so far
            size = shape[axis] if n == 1 else leaf.tiles[axis].size
            tile = Tile(size * length)
        elif leaf.tiles[axis].size != 1 or n != shape[axis] or length % tile.size:
            raise Unaligned
        count, length = count * n, length * shape[axis]
    return tile, count


def _split(
    tile: Tile, count: int, holds_codes: bool, axes: Sequence[int], shape: Sequence[int]
) -> list[tuple[int, Tile, int]]:
    """The inverse of `_merge`: for each of `axes` its tile and how many elements the leaf holds."""
    out = []
    for axis in reversed(axes[1:]):
        length = shape[axis]
        if length % tile.size == 0:
            n = length // tile.size * tile.stored
            out.append((axis, tile, n))
            tile = UNIT
        elif not holds_codes and tile.size % length == 0:
            n = 1
            out.append((axis, constant_tile(length), n))
            tile = Tile(tile.size // length)
        else:
            raise Unaligned
        count //= n
    if not holds_codes and count == 1:
        tile = constant_tile(shape[axes[0]])
    return [*out, (axes[0], tile, count)]
