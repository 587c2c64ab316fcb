"""8-bit floating point with a scale for a channel or a block."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, UInt8

from .._checks import (
    as_floats,
    axes_and_blocks,
    check_choice,
    check_finite,
    inherit_sharding,
)
from .._scaled import AbstractScaledArray
from ..coding import Coding, FloatCoding
from ..rounding import absmax, stored_block_size
from ..tiles import BlockSize


Kind = Literal["e4m3", "e5m2"]
_CODINGS = {
    "e4m3": FloatCoding(kind="float8_e4m3fn"),
    "e5m2": FloatCoding(kind="float8_e5m2"),
}


class ArrayFP8(AbstractScaledArray):
    r"""Stores $x_{ij} \approx s_i f_{ij}$ with floating-point numbers $f_{ij}$ of 8 bits: E4M3, with 3 bits of mantissa
    and magnitudes up to 448, or E5M2, with 2 bits and up to 57344
    ([FP8 Formats for Deep Learning](https://arxiv.org/abs/2209.05433), section 3).

    The scale brings the largest magnitude of a channel, or of a block, to the largest one of the format. The relative
    error of an element is at most 1/16 (E4M3) or 1/8 (E5M2), unless it is tiny beside the largest. 8 bits for each
    weight and 32 for each scale.

    Make one with [`ArrayFP8.quantize`][eqquant.ArrayFP8.quantize].

    !!! example

        ```python
        import jax, jax.numpy as jnp
        import eqquant as eqq

        w = jax.random.normal(jax.random.key(0), (256, 384))
        q = eqq.ArrayFP8.quantize(w, axis=(0, 1), block_size=(128, 128))
        assert q.bits.dtype == jnp.uint8 and q.scale.shape == (2, 3)
        y = q @ jnp.ones(384)
        ```
    """

    bits: UInt8[Array, "..."]
    """The bit patterns of the numbers: as integers, so that nothing takes them for something to be differentiated."""
    scale: Float[Array, "..."]
    """One number for each tile: along each axis of length 1, of the length of `bits`, or of one for every block."""
    block_size: BlockSize = eqx.field(static=True, default=None)
    """How many elements share a scale along an axis that has several scales; None if no axis has."""
    kind: Kind = eqx.field(static=True, default="e4m3")  # pyright: ignore
    """`"e4m3"` or `"e5m2"`."""
    dtype: np.dtype = eqx.field(static=True, default=np.dtype(np.float32))
    """The dtype of the logical array."""
    casts: tuple[np.dtype, ...] = eqx.field(static=True, default=())
    """Dtypes that the values were rounded to before they were cast to `dtype`."""

    payload: ClassVar[str] = "bits"
    packing: ClassVar[None] = None

    @property
    def coding(self) -> Coding:
        """What the bit patterns stand for."""
        return _CODINGS[self.kind]

    @classmethod
    def quantize(
        cls,
        array: Any,
        axis: int | Sequence[int] = -1,
        *,
        block_size: BlockSize = None,
        kind: Kind = "e4m3",
        dtype: Any = None,
    ) -> "ArrayFP8":
        """Quantizes a floating-point array.

        **Arguments:**

        - `array`: of any shape; float16, bfloat16, float32 or float64.
        - `axis`: the axis or axes whose elements share one scale; by default the last.
        - `block_size`: if given, only so many consecutive elements along `axis` share a scale; with several axes, a
            tuple: (128, 128) with `axis=(0, 1)`. The last block may be partial.
        - `kind`: `"e4m3"` or `"e5m2"`.
        - `dtype`: the floating-point dtype of the logical array; that of `array` by default.

        **Returns:** an `ArrayFP8` of the shape of `array`. All-zero groups give exact zeros. Leaves are sharded as
        `array` is.

        **Raises:** `TypeError` if `array` is not a floating-point array; `ValueError` if it holds NaN or infinity
        (outside tracing; under `jit` these turn their group to NaN), or if an argument is out of range.
        """
        where = "ArrayFP8.quantize"
        array, dtype = as_floats(where, array, dtype)
        check_choice(f"{where}(kind=...)", kind, tuple(_CODINGS))
        axis = axis if array.ndim else ()
        axes, block_size = axes_and_blocks(where, axis, block_size, array.ndim)
        scale = _scale(array, axes, block_size, kind)
        check_finite(where, array, scale)
        stored = stored_block_size(array, axes, block_size)
        out = cls(jnp.zeros(array.shape, jnp.uint8), scale, stored, kind, dtype)  # pyright: ignore[reportCallIssue]
        return inherit_sharding(out.with_codes_of(array), array)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _scale(x: Array, axes: tuple[int, ...], block_size: BlockSize, kind: Kind) -> Array:
    largest = absmax(x, axes, block_size).astype(jnp.float32)
    scale = largest / _CODINGS[kind].largest
    # Subnormal scales are flushed to zero.
    return jnp.where(
        scale < jnp.finfo(jnp.float32).tiny, 1, jnp.where(jnp.isfinite(scale), scale, jnp.nan)
    )
