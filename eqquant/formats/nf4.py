"""4-bit NormalFloat: sixteen levels, two codes in a byte, one scale for each block."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, UInt8

from .. import _sharding
from .._checks import (
    as_floats,
    check_choice,
    check_dtype,
    check_finite,
    inherit_sharding,
    normalize_axes,
)
from .._scaled import AbstractScaledArray
from ..coding import Coding
from ..rounding import (
    by_blocks,
    check_even_blocks,
    is_stack,
    largest_magnitude,
    normalized,
    packing_in_blocks,
    searched,
)
from ..tiles import BlockSize, Packing, scale_leaf, Tile
from .nested import NestedScale


# QLoRA, appendix E: the quantiles of a normal distribution, normalized to [-1, 1], with an exact 0.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class ArrayNF4(AbstractScaledArray):
    r"""Stores $x_i \approx m_b \, \ell_{c_i}$ with 4-bit codes $c_i$: $\ell$ are the sixteen levels of
    NormalFloat and $m_b$ is the largest magnitude in the block $b$ that holds $i$.

    The format of [QLoRA](https://arxiv.org/abs/2305.14314), with the levels, codes and scales of
    bitsandbytes: a value is multiplied by the reciprocal of $m_b$, and goes to the nearest level, ties to
    the lower one. 4.5 bits for each weight in blocks of 64, or 4.127 if the scales are quantized too.

    Make one with [`ArrayNF4.quantize`][eqquant.ArrayNF4.quantize].

    !!! example

        ```python
        import jax, jax.numpy as jnp
        import eqquant as eqq

        w = jax.random.normal(jax.random.key(0), (128, 256))
        q = eqq.ArrayNF4.quantize(w, block_size=64)
        assert q.shape == w.shape and q.packed.shape == (128, 128) and q.absmax.shape == (128, 4)
        y = q @ jnp.ones(256)
        ```
    """

    packed: UInt8[Array, "..."]
    """Two codes in a byte: byte `j` of a block of `B` elements holds those of the elements `j`
    (high half) and `j + B/2` (low half)."""
    absmax: Float[Array, "..."] | NestedScale
    """One scale for each block along the packed axis, or one for all along another axis."""
    packing: Packing | None = eqx.field(static=True)
    """The packed axis, its length and its blocks; None for a 0-d array."""
    block_size: BlockSize = eqx.field(static=True)
    """How many consecutive elements share a scale; None for a 0-d array."""
    dtype: np.dtype = eqx.field(static=True)
    """The dtype of the logical array."""
    casts: tuple[np.dtype, ...] = eqx.field(static=True)
    """Dtypes that the values were rounded to before they were cast to `dtype`."""

    payload: ClassVar[str] = "packed"
    factors: ClassVar[tuple[str, ...]] = ("absmax",)
    coding: ClassVar[Coding] = Coding(bits=4, levels=LEVELS, first="high")

    def __init__(
        self,
        packed: UInt8[Array, "..."],
        absmax: Float[Array, "..."] | NestedScale,
        block_size: BlockSize = None,
        sharding: NamedSharding | PartitionSpec | None = None,
        *,
        shape: Sequence[int] | None = None,
        dtype: Any = None,
        packing: Packing | Literal["last"] | None = "last",
        casts: tuple[np.dtype, ...] = (),
    ):
        """Builds an array from codes and scales that exist already.

        **Arguments:**

        - `packed`: the codes, as described under [`packed`][eqquant.ArrayNF4.packed].
        - `absmax`: of the rank of `packed`.
        - `block_size`: of blocks along the last axis; with `packing`, how many elements share a scale (by default
            those of a tile).
        - `sharding`: applied to the new array, as by `with_sharding`.
        - `shape`: of the logical array; by default all blocks are full.
        - `dtype`: of the logical array; float32 by default.
        - `packing`: by default the last axis is packed, in blocks of `block_size`, if that is given; None if none is.

        **Raises:** `ValueError` if the leaves do not fit each other or the other arguments.
        """
        if packing == "last":
            packing = None
            if isinstance(block_size, int):
                check_even_blocks("ArrayNF4", block_size)
                length = 2 * packed.shape[-1] if shape is None else shape[-1]
                packing = Packing(-1, length, Tile(block_size, block_size // 2))
        dtype = check_dtype("ArrayNF4(dtype=...)", jnp.float32 if dtype is None else dtype)
        self.packed, self.absmax = packed, absmax
        if block_size is None and packing is not None:
            block_size = packing.tile.size
        self.packing, self.block_size, self.dtype, self.casts = packing, block_size, dtype, casts
        if shape is not None and tuple(shape) != self.shape:
            raise ValueError(f"shape={tuple(shape)} but the leaves say {self.shape}.")
        if sharding is not None:
            placed = self.with_sharding(sharding)
            self.packed, self.absmax = placed.packed, placed.absmax

    @property
    def scale(self) -> Float[Array, "..."]:
        """`absmax` in floating point."""
        return self.absmax.materialize() if isinstance(self.absmax, NestedScale) else self.absmax

    @property
    def codes(self) -> UInt8[Array, "..."]:
        """The numbers of the levels, 0 to 15, one for each element of the logical array."""
        if self.packing is None:
            return self.packed
        return self.packing.merge([self.plane_codes(i) for i in range(self.packing.elements)])

    def with_sharding(self, sharding: NamedSharding | PartitionSpec | None) -> "ArrayNF4":
        nested = self.absmax
        if sharding is None or not isinstance(nested, NestedScale):
            return super().with_sharding(sharding)
        leaf = self.payload_leaf
        packed = _sharding.place(leaf, "packed", sharding)
        codes = scale_leaf(nested.codes, leaf.shape, self.block_size)
        batch = 0 if nested.are_tiles else nested.offset.ndim
        placed = NestedScale(
            _sharding.place(codes, "absmax.codes", sharding),
            _sharding.replicate(nested.absmax, "absmax.absmax", sharding, batch),
            _sharding.replicate(nested.offset, "absmax.offset", sharding, batch),
            nested.blocks,
        )
        return self.replace(packed=packed, absmax=placed)

    @classmethod
    def quantize(
        cls,
        array: Any,
        block_size: int = 64,
        axis: int = -1,
        *,
        dtype: Any = None,
        double: bool = False,
        scale: Literal["absmax", "search"] = "absmax",
    ) -> "ArrayNF4":
        """Quantizes a floating-point array.

        **Arguments:**

        - `array`: of any shape; float16, bfloat16, float32 or float64.
        - `block_size`: how many consecutive elements along `axis` share a scale: positive and even.
            The last block may be partial: the shape is that of `array` in any case, and the bytes
            of a partial block are stored in full. An axis shorter than a block is one block of
            its length.
        - `axis`: the axis along which the blocks lie.
        - `dtype`: the floating-point dtype of the logical array; that of `array` by default.
        - `double`: quantizes the scales too (QLoRA, section 3): to 8 bits, in blocks of 256 of them,
            after their mean is subtracted. An array of three axes or more counts as a stack along the first: each entry has
            its mean and its blocks.
        - `scale`: `"absmax"`, as bitsandbytes; or `"search"`: the scale with the least squared error
            among several, about 0.7 dB better on normally distributed weights.

        **Returns:** an `ArrayNF4` of the shape of `array`. All-zero blocks give exact zeros; blocks
        whose largest magnitude is below 1.2e-38 count as zero. An array that is sharded gives leaves
        that are sharded likewise.

        **Raises:** `TypeError` if `array` is not a floating-point array; `ValueError` if it holds
        NaN or infinity (outside tracing; under `jit` these turn their block to NaN), or if an
        argument is out of range.

        !!! example

            ```python
            import jax.numpy as jnp
            import eqquant as eqq

            q = eqq.ArrayNF4.quantize(jnp.linspace(-1, 1, 300).reshape(3, 100), double=True)
            assert q.shape == (3, 100)
            ```
        """
        array, dtype = as_floats("ArrayNF4.quantize", array, dtype)
        check_even_blocks("ArrayNF4.quantize", block_size)
        check_choice("ArrayNF4.quantize(scale=...)", scale, ("absmax", "search"))
        if array.ndim:
            (axis,) = normalize_axes("ArrayNF4.quantize(axis=...)", int(axis), array.ndim)
        packing = packing_in_blocks(array.shape, axis, block_size)
        packed, absmax = _quantize(array, packing, scale == "search")
        check_finite("ArrayNF4.quantize", array, absmax)
        if double:
            in_stack = packing is not None and is_stack(array.ndim, packing.axis)
            nested = (jax.vmap(NestedScale.quantize) if in_stack else NestedScale.quantize)(absmax)
            if not isinstance(nested.offset, Tracer) and not bool(
                jnp.isfinite(nested.offset).all()
            ):
                raise ValueError(
                    f"ArrayNF4.quantize(double=True) sums up the scales, and scales as large as {float(absmax.max()):.3g} "
                    "overflow. Leave out double=True, or scale the array down first."
                )
            absmax = nested
        out = cls(packed, absmax, packing=packing, dtype=dtype)
        return inherit_sharding(out, array)


@partial(jax.jit, static_argnums=(1, 2))
def _quantize(
    x: Array, packing: Packing | None, search: bool
) -> tuple[UInt8[Array, "..."], Float[Array, "..."]]:
    blocks, within = x, None
    if packing is not None:
        axis = packing.axis % x.ndim
        blocks, within = by_blocks(x, axis, packing.tile.size), axis + 1
    wide = blocks.astype(jnp.float32)
    absmax = largest_magnitude(blocks, () if within is None else (within,)).astype(jnp.float32)
    absmax = jnp.where(absmax < jnp.finfo(jnp.float32).tiny, 0, absmax)
    absmax = jnp.where(jnp.isfinite(absmax), absmax, jnp.nan)
    if search and absmax.size:
        absmax, _ = searched(wide, absmax, within, ArrayNF4.coding)
        absmax = jnp.minimum(absmax, float(jnp.finfo(x.dtype).max))  # values may not overflow
    if within is None or packing is None:
        return ArrayNF4.coding.nearest(normalized(wide, absmax)), absmax
    # Each half by itself: 4 times as fast as the codes of all, cut in half afterwards.
    halves = [
        ArrayNF4.coding.nearest(normalized(half, absmax))
        for half in jnp.split(wide, 2, axis=within)
    ]
    shape = (*x.shape[: within - 1], packing.stored, *x.shape[within:])
    return ArrayNF4.coding.pack(halves).reshape(shape), lax.squeeze(absmax, (within,))
