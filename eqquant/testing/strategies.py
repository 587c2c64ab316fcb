"""One hypothesis strategy for each format: it draws the stored leaves, not the output of `quantize`.

Rules have to hold for every legal array, so scales are of any sign and layout, any axis is packed,
and codes take every value they may take.
"""

# Of fields that a base class declares, pyright expects values.
# pyright: reportCallIssue=false

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from .._scaled import CodedScale
from ..formats import (
    Array1B,
    Array8B,
    ArrayFP8,
    ArrayInt4,
    ArrayNF4,
    ArrayNVFP4,
    RSROperatorBinary,
    RSROperatorTernary,
)
from ..formats.nested import GROUP, NestedScale
from ..formats.nvfp4 import E4M3
from ..tiles import block_size_along, BlockSize, Packing, Tile


# Few shapes: each new one is a compilation. Lengths that blocks of 2 and 3 divide or do not.
SHAPES = {1: [(6,)], 2: [(4, 6), (1, 5)], 3: [(2, 4, 6)]}
"""The shapes of drawn arrays, by their number of axes."""
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
"""The dtypes of drawn arrays."""

FORMATS: dict[str, Callable[..., st.SearchStrategy]] = {}
"""By the name of a format, a function of shape and dtype: the strategy of such arrays."""


def strategy_for(format: type) -> Callable[[Callable[..., Any]], Any]:
    """Registers the strategy of a format: decorates `(draw, shape, dtype) -> array`."""

    def register(function: Callable[..., Any]) -> Any:
        FORMATS[format.__name__] = st.composite(function)
        return FORMATS[format.__name__]

    return register


def arrays(shape: Sequence[int], dtype: Any = jnp.float32) -> st.SearchStrategy:
    """Quantized arrays of this shape and dtype, of all registered formats."""
    return st.one_of(*(strategy(tuple(shape), dtype) for strategy in FORMATS.values()))


# --------------------------------------------------------------------------- parts of strategies


def generator(draw: Any) -> np.random.Generator:
    """A generator of random numbers that hypothesis controls."""
    return np.random.default_rng(draw(st.integers(0, 2**16)))


def scales(draw: Any, shape: Sequence[int], block_size: BlockSize = 2) -> Any:
    """A scale for `shape`: along each axis one for all, one each, or one for each block."""
    rng = generator(draw)
    stored = []
    for axis, n in enumerate(shape, start=-len(shape)):
        size = block_size_along(block_size, axis)
        stored.append(draw(st.sampled_from([1, n] + ([-(-n // size)] if size else []))))
    sign = rng.choice([-1.0, 1.0], stored)
    return jnp.asarray(sign * np.exp(rng.uniform(-3, 3, stored)), jnp.float32)


def packings(
    draw: Any, shape: Sequence[int], count: int, stored: int = 1, slack: int = 0
) -> Packing:
    """A packing of any axis, `count` elements in a stored number, tiles of `stored` numbers, in which so many places are
    left unused."""
    axis = draw(st.integers(-len(shape), -1))
    return Packing(axis, shape[axis], Tile(count * stored - slack, stored))


def payloads(draw: Any, shape: Sequence[int], packing: Packing, dtype: Any, bits: int = 8) -> Any:
    """Random stored numbers for a logical shape, packed along one axis."""
    stored = list(shape)
    stored[packing.axis] = packing.stored
    return jnp.asarray(generator(draw).integers(0, 2**bits, stored), dtype)


# ------------------------------------------------------------------------------------ the formats


@strategy_for(Array8B)
def array8b(draw: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array8B:
    block_size = draw(st.sampled_from([None, 2, 3, (2, 3)]))
    codes = generator(draw).integers(-127, 128, shape)
    scale = scales(draw, shape, block_size)
    return Array8B(scale, jnp.asarray(codes, jnp.int8), dtype=dtype, block_size=block_size)


@strategy_for(ArrayNF4)
def array_nf4(draw: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> ArrayNF4:
    if draw(st.integers(0, 7)) == 0:  # what comes of an array without axes
        codes = jnp.asarray(generator(draw).integers(0, 16, shape), jnp.uint8)
        return ArrayNF4(codes, scales(draw, shape, None), dtype=dtype)
    packing = packings(draw, shape, 2, draw(st.sampled_from([1, 2])))
    packed = payloads(draw, shape, packing, jnp.uint8)
    absmax = scales(draw, shape, packing.tile.size)
    if draw(st.integers(0, 3)) == 0:
        codes = jnp.asarray(generator(draw).integers(0, 256, absmax.shape), jnp.uint8)
        groups = scales(draw, (-(-absmax.size // GROUP),), None)
        mean = jnp.asarray(draw(st.sampled_from([0.5, -2.0])))
        absmax = NestedScale(codes, groups, mean)
        in_stack = len(shape) == 3 and packing.axis != -3 and codes.shape[0] == shape[0]
        if in_stack and draw(st.booleans()):  # few scales: one group for each entry
            factors = jnp.linspace(0.5, 2, shape[0], dtype=jnp.float32)
            absmax = NestedScale(codes, factors[:, None] * groups, factors * mean)
        if draw(st.booleans()):  # what comes of one that was cut or transposed
            absmax = NestedScale(codes, *(scales(draw, shape, 4) for _ in range(2)), blocks=4)
    return ArrayNF4(packed, absmax, packing=packing, dtype=dtype)


@strategy_for(Array1B)
def array1b(draw: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array1B:
    levels, count = draw(st.sampled_from([("ternary", 5), ("binary", 8)]))
    if draw(st.integers(0, 7)) == 0:  # what comes of an array without axes
        codes = jnp.asarray(generator(draw).integers(0, 256, shape), jnp.uint8)
        return Array1B(codes, scales(draw, shape, None), levels=levels, packing=None, dtype=dtype)
    packing = packings(draw, shape, count, *draw(st.sampled_from([(1, 0), (1, 0), (2, 1)])))
    block_size = draw(st.sampled_from([None, 2, 3]))
    scale = scales(draw, shape, block_size) if draw(st.booleans()) else None
    weight = payloads(draw, shape, packing, jnp.uint8)
    return Array1B(
        weight, scale, levels=levels, packing=packing, block_size=block_size, dtype=dtype
    )


@strategy_for(RSROperatorBinary)
def rsr_binary(
    draw: Any, shape: tuple[int, ...], dtype: Any = jnp.float32, packing: Packing | None = None
) -> RSROperatorBinary:
    scale = scales(draw, shape, None) if packing is None and draw(st.booleans()) else None
    packing = packing or packings(draw, shape, draw(st.sampled_from([1, 3, 11])))
    word = jnp.uint8 if packing.elements <= 8 else jnp.uint16
    codes = payloads(draw, shape, packing, word, packing.elements)
    return RSROperatorBinary(codes, packing=packing, scale=scale, dtype=dtype)


@strategy_for(RSROperatorTernary)
def rsr_ternary(draw: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> RSROperatorTernary:
    packing = packings(draw, shape, draw(st.sampled_from([2, 8])))
    plus, minus = (draw(rsr_binary(shape, dtype, packing)) for _ in range(2))
    scale = scales(draw, shape, None) if draw(st.booleans()) else None
    return RSROperatorTernary(plus, minus, scale=scale)


@strategy_for(ArrayInt4)
def array_int4(draw: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> ArrayInt4:
    zero = draw(st.sampled_from(["symmetric", "affine"]))
    packing = packings(draw, shape, 2, draw(st.sampled_from([1, 2])))
    block_size = draw(st.sampled_from([None, 2, 3]))
    scale_dtype = draw(st.sampled_from([jnp.float32, jnp.float16]))
    scale = scales(draw, shape, block_size).astype(scale_dtype)
    offset = None
    if zero == "affine":
        offset = scales(draw, shape, block_size).astype(scale_dtype)
    codes = payloads(draw, shape, packing, jnp.uint8)
    return ArrayInt4(codes, scale, offset, packing, block_size, zero, jnp.dtype(dtype))


@strategy_for(ArrayFP8)
def array_fp8(draw: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> ArrayFP8:
    kind = draw(st.sampled_from(["e4m3", "e5m2"]))
    block_size = draw(st.sampled_from([None, 2, (2, 3)]))
    numbers = jnp.asarray(generator(draw).normal(size=shape), jnp.float32)
    bits = (
        ArrayFP8(jnp.zeros(shape, jnp.uint8), jnp.ones([1] * len(shape)), kind=kind)
        .encode(numbers)
        .bits
    )
    return ArrayFP8(bits, scales(draw, shape, block_size), block_size, kind, jnp.dtype(dtype))


@strategy_for(ArrayNVFP4)
def array_nvfp4(draw: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> ArrayNVFP4:
    packing = packings(draw, shape, 2, draw(st.sampled_from([1, 2])))
    codes = payloads(draw, shape, packing, jnp.uint8)
    fine = scales(draw, shape, 2)
    coded = CodedScale(E4M3.nearest(fine), E4M3)
    return ArrayNVFP4(codes, coded, scales(draw, shape, 3), packing, 2, 3, jnp.dtype(dtype))
