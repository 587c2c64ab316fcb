"""4-bit integers in blocks, symmetric or with an offset."""

from functools import partial
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, UInt8

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
    packing_in_blocks,
    searched,
    with_nan_of,
    without_codes,
)
from ..tiles import BlockSize, Packing


Zero = Literal["symmetric", "affine"]
_CODINGS = {"symmetric": Coding(bits=4, low=-8), "affine": Coding(bits=4)}


class ArrayInt4(AbstractScaledArray):
    r"""Stores $x_i \approx s_b q_i$ with $q_i \in \{-8, \dots, 7\}$ (symmetric), or $x_i \approx s_b q_i + m_b$ with
    $q_i \in \{0, \dots, 15\}$ (affine), for the block $b$ that holds $i$.

    Symmetric: the element of the largest magnitude becomes -8, so that $s_b$ has the opposite of its sign, as in Q4_0 of
    [GGUF](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Affine: $m_b$ is the least element and
    $m_b + 15 s_b$ the largest, as in Q4_1. In blocks of 64, 4.5 bits for each weight, or 5 if affine; 4.25 and 4.5
    with float16 scales.

    Make one with [`ArrayInt4.quantize`][eqquant.ArrayInt4.quantize].

    !!! example

        ```python
        import jax, jax.numpy as jnp
        import eqquant as eqq

        w = jax.random.normal(jax.random.key(0), (128, 256))
        q = eqq.ArrayInt4.quantize(w, block_size=32, zero="affine", scale_dtype=jnp.float16)
        assert q.codes.shape == (128, 128) and q.scale.shape == q.offset.shape == (128, 8)
        assert q.bits_per_weight == 5
        y = q @ jnp.ones(256)
        ```
    """

    codes: UInt8[Array, "..."]
    """Two in a byte: byte `j` of a block of `B` elements holds those of the elements `j` (low half) and `j + B/2`
    (high half). Symmetric: $q + 8$."""
    scale: Float[Array, "..."]
    """One for each block along the packed axis, or one for all along another axis."""
    offset: Float[Array, "..."] | None
    """What is added, likewise; None if symmetric."""
    packing: Packing | None = eqx.field(static=True)
    """The packed axis, its length and its blocks; None for a 0-d array."""
    block_size: BlockSize = eqx.field(static=True)
    """How many consecutive elements share a scale."""
    zero: Zero = eqx.field(static=True, default="symmetric")  # pyright: ignore
    """`"symmetric"` or `"affine"`."""
    dtype: np.dtype = eqx.field(static=True, default=np.dtype(np.float32))
    """The dtype of the logical array."""
    casts: tuple[np.dtype, ...] = eqx.field(static=True, default=())
    """Dtypes that the values were rounded to before they were cast to `dtype`."""

    payload: ClassVar[str] = "codes"
    summands: ClassVar[tuple[str, ...]] = ("offset",)

    @property
    def coding(self) -> Coding:
        """What the codes stand for."""
        return _CODINGS[self.zero]

    @classmethod
    def quantize(
        cls,
        array: Any,
        block_size: int = 64,
        axis: int = -1,
        *,
        zero: Zero = "symmetric",
        scale: Literal["absmax", "search"] = "absmax",
        scale_dtype: Any = jnp.float32,
        dtype: Any = None,
    ) -> "ArrayInt4":
        """Quantizes a floating-point array.

        **Arguments:**

        - `array`: of any shape; float16, bfloat16, float32 or float64.
        - `block_size`: how many consecutive elements along `axis` share a scale: positive and even. The last block may
            be partial. An axis shorter than a block is one block of its length.
        - `axis`: the axis along which the blocks lie.
        - `zero`: `"symmetric"`; or `"affine"`, with an offset for each block: for weights that are not centred.
        - `scale`: `"absmax"`, from the ends of a block; or `"search"`, of the least squared error among several.
        - `scale_dtype`: what scales and offsets are stored in: float32, or float16 or bfloat16 to save bits.
        - `dtype`: the floating-point dtype of the logical array; that of `array` by default.

        **Returns:** an `ArrayInt4` of the shape of `array`. Codes are the nearest ones for the scale as it is stored. A
        block of zeros is exact; so is one of equal elements if affine, where `scale_dtype` has their number. Leaves are
        sharded as `array` is.

        **Raises:** `TypeError` if `array` is not a floating-point array; `ValueError` if it holds NaN or infinity, or
        numbers too large for `scale_dtype` (outside tracing; under `jit` these turn their block to NaN), or if an
        argument is out of range.
        """
        where = "ArrayInt4.quantize"
        array, dtype = as_floats(where, array, dtype)
        scale_dtype = check_dtype(f"{where}(scale_dtype=...)", scale_dtype)
        check_even_blocks(where, block_size)
        check_choice(f"{where}(zero=...)", zero, tuple(_CODINGS))
        check_choice(f"{where}(scale=...)", scale, ("absmax", "search"))
        if array.ndim:
            (axis,) = normalize_axes(f"{where}(axis=...)", int(axis), array.ndim)
        packing = packing_in_blocks(array.shape, axis, block_size)
        numbers = _scale_and_offset(array, packing, zero, scale == "search", scale_dtype)
        check_finite(where, array, numbers[0])
        empty = without_codes(array.shape, packing)
        size = None if packing is None else packing.tile.size
        out = cls(empty, *numbers, packing=packing, block_size=size, zero=zero, dtype=dtype)  # pyright: ignore[reportCallIssue]
        return inherit_sharding(out.with_codes_of(array), array)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _scale_and_offset(
    x: Array, packing: Packing | None, zero: Zero, search: bool, dtype: Any
) -> tuple[Array, Array | None]:
    blocks, within = x.reshape(*x.shape, 1), x.ndim
    if packing is not None:
        axis = packing.axis % x.ndim
        blocks, within = by_blocks(x, axis, packing.tile.size, "edge"), axis + 1
    blocks = blocks.astype(jnp.float32)
    ends = [each(blocks, axis=within, keepdims=True) for each in (jnp.min, jnp.max)]
    least, largest = with_nan_of(blocks, (within,), ends)
    coding = _CODINGS[zero]
    if zero == "affine":
        scale, offset = (largest - least) / 15, least
    else:
        scale, offset = jnp.where(largest > -least, largest, least) / coding.low, None
    if search and scale.size:
        scale, offset = searched(blocks, scale, within, coding, offset)
    top = float(jnp.finfo(x.dtype).max)  # values may not overflow
    if offset is None:
        scale = jnp.clip(scale, top / coding.low, -top / coding.low)
    else:
        offset = jnp.clip(offset, -top, top)
        scale = jnp.minimum(scale, top / 15 - offset / 15)
        offset = offset.astype(dtype)
    scale = scale.astype(dtype)
    fits = jnp.isfinite(least) & jnp.isfinite(largest) & jnp.isfinite(scale)
    fits &= True if offset is None else jnp.isfinite(offset)
    scale, squeezed = jnp.where(fits, scale, jnp.nan), (within,)
    return lax.squeeze(scale, squeezed), None if offset is None else lax.squeeze(offset, squeezed)
