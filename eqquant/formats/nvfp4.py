"""NVFP4: 4-bit floating point with two levels of scales."""

from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, UInt8

from .._checks import as_floats, check_finite, inherit_sharding, normalize_axes
from .._scaled import AbstractScaledArray, CodedScale
from ..coding import Coding, FloatCoding
from ..rounding import absmax, is_stack, largest_magnitude, packing_in_blocks, without_codes
from ..tiles import BlockSize, Packing


BLOCK = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3 = FloatCoding(kind="float8_e4m3fn")


class ArrayNVFP4(AbstractScaledArray):
    r"""Stores $x_i \approx g \, s_b \, e_i$: numbers $e_i \in \{0, \pm 0.5, \pm 1, \pm 1.5, \pm 2, \pm 3, \pm 4, \pm 6\}$
    (E2M1), a scale $s_b$ in 8-bit floating point (E4M3) for the block $b$ of 16 that holds $i$, and one float32 number
    $g$ for the array.

    The format of [NVFP4](https://arxiv.org/abs/2509.25149), section 2: $g$ brings the largest magnitude of the array
    to $6 \cdot 448$, and $s_b$ that of a block to 6. 4.5 bits for each weight. An array of three axes or more counts as a stack of
    arrays along the first: each has its $g$.

    Make one with [`ArrayNVFP4.quantize`][eqquant.ArrayNVFP4.quantize].

    !!! example

        ```python
        import jax, jax.numpy as jnp
        import eqquant as eqq

        w = jax.random.normal(jax.random.key(0), (128, 256))
        q = eqq.ArrayNVFP4.quantize(w)
        assert q.codes.shape == (128, 128) and q.scale.shape == (128, 16)
        assert q.global_scale.shape == (1, 1)
        y = q @ jnp.ones(256)
        ```
    """

    codes: UInt8[Array, "..."]
    """Two in a byte, a sign and three bits each: byte `j` of a block holds those of the elements `j` (low half) and
    `j + 8` (high half)."""
    scale: CodedScale
    """One for each block along the packed axis, as bit patterns of E4M3."""
    global_scale: Float[Array, "..."]
    """One for the array, or for each entry of a stack, of the rank of the array."""
    packing: Packing | None = eqx.field(static=True)
    """The packed axis, its length and its blocks; None for a 0-d array."""
    block_size: BlockSize = eqx.field(static=True)
    """How many elements share a block scale."""
    global_scale_block_size: BlockSize = eqx.field(static=True, default=None)
    """How many elements share a global scale, along an axis on which arrays were joined."""
    dtype: np.dtype = eqx.field(static=True, default=np.dtype(np.float32))
    """The dtype of the logical array."""
    casts: tuple[np.dtype, ...] = eqx.field(static=True, default=())
    """Dtypes that the values were rounded to before they were cast to `dtype`."""

    payload: ClassVar[str] = "codes"
    factors: ClassVar[tuple[str, ...]] = ("scale", "global_scale")
    multiplied: ClassVar[tuple[str, ...]] = ("global_scale",)
    coding: ClassVar[Coding] = Coding(bits=4, levels=(*E2M1, *(-x for x in E2M1)), ties="even")

    @classmethod
    def quantize(cls, array: Any, axis: int = -1, *, dtype: Any = None) -> "ArrayNVFP4":
        """Quantizes a floating-point array.

        **Arguments:**

        - `array`: of any shape; float16, bfloat16, float32 or float64.
        - `axis`: the axis along which the blocks of 16 lie. The last block may be partial.
        - `dtype`: the floating-point dtype of the logical array; that of `array` by default.

        **Returns:** an `ArrayNVFP4` of the shape of `array`. All-zero blocks give exact zeros; so do blocks whose
        largest magnitude is below about 2e-6 of that of the array, or of an entry of a stack. Leaves are sharded as `array` is.

        **Raises:** `TypeError` if `array` is not a floating-point array; `ValueError` if it holds NaN or infinity
        (outside tracing; under `jit` these turn the array to NaN), or if `axis` is out of range.
        """
        where = "ArrayNVFP4.quantize"
        array, dtype = as_floats(where, array, dtype)
        if array.ndim:
            (axis,) = normalize_axes(f"{where}(axis=...)", int(axis), array.ndim)
        packing = packing_in_blocks(array.shape, axis, BLOCK)
        scale, global_scale = _scales(array, packing)
        check_finite(where, array, global_scale)
        size = None if packing is None else packing.tile.size
        empty = without_codes(array.shape, packing)
        out = cls(empty, CodedScale(scale, E4M3), global_scale, packing, size, dtype=dtype)  # pyright: ignore[reportCallIssue]
        return inherit_sharding(out.with_codes_of(array), array)


@partial(jax.jit, static_argnums=1)
def _scales(x: Array, packing: Packing | None) -> tuple[Array, Array]:
    """The bit patterns of the scales of blocks, and the scale of the array, or of each entry of a stack."""
    axes, size = ((), None) if packing is None else ((packing.axis % x.ndim,), packing.tile.size)
    largest = absmax(x.astype(jnp.float32), axes, size)
    first = 1 if packing is not None and is_stack(x.ndim, packing.axis) else 0
    whole = largest_magnitude(largest, tuple(range(first, x.ndim)))
    top = E2M1[-1] * E4M3.largest
    global_scale = jnp.where(whole / top < jnp.finfo(jnp.float32).tiny, 1, whole / top)
    global_scale = jnp.where(jnp.isfinite(global_scale), global_scale, jnp.nan)
    return E4M3.nearest(largest / E2M1[-1] / global_scale), global_scale
