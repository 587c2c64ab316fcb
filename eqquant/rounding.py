"""Finding scales and rounding to codes: what the `quantize` methods of formats share."""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import _sharding
from .coding import Coding
from .tiles import BlockSize, Packing, Tile


_Found = TypeVar("_Found")
_BLOCKS_AT_A_TIME = 1024
# Candidates of a searched scale, as fractions of the one that the largest magnitude asks for.
_FRACTIONS = np.linspace(0.78, 1.12, 18, dtype=np.float32)


def by_blocks(
    x: Array, axis: int, size: int, mode: Literal["constant", "edge"] = "constant"
) -> Array:
    """`x` with `axis` split in two: blocks of `size` elements, and the elements within them. The last block is filled
    up with zeros, or with its last element (`"edge"`)."""
    _sharding.check_tiles(x, axis, size)
    blocks = -(-x.shape[axis] // size)
    missing = blocks * size - x.shape[axis]
    if missing:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], mode)
    return x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])


def mean_where(x: Array, counted: Array, axes: Sequence[int]) -> Array:
    """The mean over `axes` of what `counted` says, in float32: 0 of nothing, NaN if it is not finite.

    What is not counted has to be zero, or NaN. One pass: two sums would make XLA hold their terms.
    """
    terms = (x.astype(jnp.float32), counted.astype(jnp.float32))
    zero = jnp.zeros((), jnp.float32)
    total, count = lax.reduce(
        terms, (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(axes)
    )
    mean = total / jnp.maximum(count, 1)
    return lax.expand_dims(jnp.where(jnp.isfinite(mean), mean, jnp.nan), tuple(axes))


def largest_magnitude(x: Array, axes: tuple[int, ...]) -> Array:
    """The largest magnitude over `axes`, which are kept at length 1: 0 of nothing, NaN if one of them is."""
    return with_nan_of(x, axes, jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0))


def with_nan_of(x: Array, axes: tuple[int, ...], found: _Found) -> _Found:
    """`found`, which are maxima or minima of `x` over `axes`, kept at length 1: NaN where one of the numbers there is.

    XLA for CPU drops NaN from a maximum of 4096 elements or more (jaxlib 0.10.2 to 0.12.0, float32):

        jnp.max(jnp.ones((64, 64)).at[3, 5].set(jnp.nan))  # 1.0

    It keeps them in sums, which add an eighth (NF4) to three tenths (int8) to the time of quantizing. A sum that is not
    finite, be it of NaN or of large numbers, has them looked for one by one. What is found goes through the condition: if 0
    or NaN comes out and is added to it, XLA does that within the maximum, which then waits for the sum, and two fifths
    are added (NF4). (A maximum of bit patterns, or one that is told to keep NaN, takes 2 to 3 times as long.)
    """

    def look(x: Array, found: _Found) -> _Found:
        has_nan = jnp.any(x != x, axis=axes, keepdims=True)
        return jax.tree.map(lambda each: jnp.where(has_nan, jnp.nan, each), found)

    if _sharding.is_explicit(x):
        return look(x, found)
    # In the dtype of `x`: sums in float32 would make XLA write a copy of it.
    total = lax.reduce(x, jnp.zeros((), x.dtype), lax.add, tuple(a % x.ndim for a in axes))
    return lax.cond(jnp.all(jnp.isfinite(total)), lambda x, found: found, look, x, found)


def absmax(x: Array, axes: Sequence[int], block_size: BlockSize) -> Array:
    """The largest magnitude over `axes`, or over each block of them: exact in the dtype of `x`, so that no copy of it
    is cast. A size for each of several axes is given as a tuple, in their order."""
    lengths = x.shape
    sizes = block_size if isinstance(block_size, tuple) else (block_size,) * len(axes)
    blocks = {
        a: size
        for a, size in zip(axes, sizes, strict=True)
        if size is not None and size < lengths[a]
    }
    within: list[int] = []
    for axis in sorted(blocks):
        x = by_blocks(x, axis + len(within), blocks[axis])
        within.append(axis + len(within) + 1)
    others = [a + sum(axis < a for axis in blocks) for a in axes if a not in blocks]
    return lax.squeeze(largest_magnitude(x, (*others, *within)), within)


def stored_block_size(x: Array, axes: Sequence[int], block_size: BlockSize) -> BlockSize:
    """The block size as an array keeps it, of blocks of these axes: counted from the end, and None if no axis has
    several blocks of several elements."""
    if block_size is None:
        return None
    sizes = block_size if isinstance(block_size, tuple) else (block_size,) * len(axes)
    by_axis = {
        axis - x.ndim: size
        for axis, size in zip(axes, sizes, strict=True)
        if 1 < size < x.shape[axis]
    }
    if len(set(by_axis.values())) < 2:
        return next(iter(by_axis.values()), None)
    return tuple(by_axis.get(axis, 1) for axis in range(min(by_axis), 0))


def is_stack(ndim: int, packed: int) -> bool:
    """Whether what is found once for an array is found for each entry of its first axis instead: of three axes or more,
    unless codes are packed along the first. So `vmap`, `scan` and `jax.tree.map(lambda a: a[i], q)` can take entries."""
    return ndim >= 3 and packed % ndim != 0


def packing_in_blocks(shape: Sequence[int], axis: int, block_size: int) -> Packing | None:
    """Two codes in a byte along `axis`, in tiles of a block; an axis that is shorter than a block is one block. None
    for an array without axes."""
    if not shape:
        return None
    length = shape[axis]
    size = min(block_size, max(length + length % 2, 2))
    return Packing(axis - len(shape), length, Tile(size, size // 2))


def without_codes(shape: Sequence[int], packing: Packing | None) -> Array:
    """A payload of bytes for an array of this shape, to be encoded."""
    stored = list(shape)
    if packing is not None:
        stored[packing.axis] = packing.stored
    return jnp.zeros(stored, jnp.uint8)


def check_even_blocks(where: str, block_size: int) -> None:
    """Raises `ValueError` unless the block size is positive and even."""
    if block_size < 2 or block_size % 2:
        raise ValueError(
            "block_size must divide nothing in particular, but it must be positive and even; "
            f"{where}(..., block_size={block_size!r}) was given {block_size!r}."
        )


def normalized(x: Array, scale: Array) -> Array:
    """`x` times the reciprocal of a scale; 0 where the scale is 0."""
    # Reciprocals of the largest floats are subnormal, which XLA flushes to 0: go by a power of 2.
    shrink = jnp.where(jnp.abs(scale) > 1e37, np.float32(2**-10), np.float32(1))
    inverse = jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale * shrink))
    return x * inverse * shrink


def searched(
    x: Array, scale: Array, within: int | None, coding: Coding, offset: Array | None = None
) -> tuple[Array, Array | None]:
    """The scales, and offsets, of the least squared error: the best ones for the codes of each of some candidates.

    With the values $v$ of a candidate, |x - s v|^2 is least at s = <x, v> / <v, v>, where it is |x|^2 - <x, v>^2 / <v, v>;
    with an offset, the same holds of x and v less their means.

    **Arguments:**

    - `x`: in blocks: the elements of each lie along the axis `within`; None if `x` is one element.
    - `scale`, `offset`: of each block, to begin with, with that axis at length 1.
    """
    split = scale
    x, scale = _sharding.whole(x), _sharding.whole(scale)
    start = jnp.zeros_like(scale) if offset is None else _sharding.whole(offset)
    last = x.reshape(1, 1) if within is None else jnp.moveaxis(x, within, -1)
    middle = 0 if offset is None else sum(coding.range) / 2

    def centred(x: Array) -> tuple[Array, Array]:
        mean = jnp.zeros((), x.dtype) if offset is None else jnp.mean(x)
        return x - mean, mean

    def search(block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x, scale, start = block
        unit, unit_mean = centred(normalized(x - start, scale))

        def better(best: Any, fraction: Array) -> tuple[Any, None]:
            explained, best_scale, best_start = best
            candidate = normalized(x - start, scale * fraction)
            v = coding.nearest_value(candidate + middle * (1 - 1 / fraction))
            v, v_mean = centred(v)
            xv, vv = jnp.vdot(unit, v), jnp.vdot(v, v)
            wins = xv * xv > explained * vv
            ratio = xv / jnp.where(vv == 0, 1, vv)
            return (
                jnp.where(wins, xv * ratio, explained),
                jnp.where(wins, scale * ratio, best_scale),
                jnp.where(wins, start + scale * (unit_mean - ratio * v_mean), best_start),
            ), None

        first = (jnp.zeros_like(scale), scale, start)
        return lax.scan(better, first, jnp.asarray(_FRACTIONS))[0][1:]

    # Some blocks at a time, so that what is held beside the array is small.
    flat = (last.reshape(scale.size, -1), scale.reshape(-1), start.reshape(-1))
    found = lax.map(search, flat, batch_size=_BLOCKS_AT_A_TIME)
    scale, start = (_sharding.split_as(each.reshape(scale.shape), split) for each in found)
    return scale, None if offset is None else start
