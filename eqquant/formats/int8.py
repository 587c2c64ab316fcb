"""8-bit integers with one float scale for a row, a channel or a block."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int8

from .._checks import (
    as_floats,
    axes_and_blocks,
    check_choice,
    check_dtype,
    check_finite,
    inherit_sharding,
    normalize_axes,
)
from .._compat import promote_types
from .._scaled import AbstractScaledArray
from ..coding import Coding
from ..rounding import absmax as absmax_of, stored_block_size
from ..tiles import BlockSize, broadcastable, scale_leaf


class Array8B(AbstractScaledArray):
    r"""Stores $x_{ij} \approx s_i q_{ij}$ with $q_{ij} \in \{-127, \dots, 127\}$.

    The scale is $s_i = \max_j |x_{ij}| / 127$ over the quantized axes (by default the last one),
    and $q_{ij}$ is $x_{ij} \cdot (127 \cdot (1 / \max_j |x_{ij}|))$ rounded to the nearest integer, ties to even:
    vector-wise absmax quantization ([LLM.int8()](https://arxiv.org/abs/2208.07339), section 2), with the
    same codes as bitsandbytes' `int8_vectorwise_quant`. The error of an element is at most
    $s_i / 2$. 8 bits for each weight and 32 for each scale.

    Make one with [`Array8B.quantize`][eqquant.Array8B.quantize].

    !!! example

        ```python
        import jax, jax.numpy as jnp
        import eqquant as eqq

        w = jax.random.normal(jax.random.key(0), (128, 256))
        q = eqq.Array8B.quantize(w)
        assert q.shape == w.shape and q.weight.dtype == jnp.int8 and q.scale.shape == (128, 1)
        y = q @ jnp.ones(256)
        ```
    """

    scale: Float[Array, "..."]
    """One number for each tile: along each axis of length 1, of the length of `weight`, or of
    one for every `block_size` elements."""
    weight: Int8[Array, "..."]
    """The codes, of the shape of the logical array."""
    dtype: np.dtype = eqx.field(static=True)
    """The dtype of the logical array."""
    block_size: BlockSize = eqx.field(static=True)
    """How many elements share a scale along an axis that has several scales; None if no axis has."""
    casts: tuple[np.dtype, ...] = eqx.field(static=True)
    """Dtypes that the values were rounded to before they were cast to `dtype`."""
    activations: Literal["float", "int8"] = eqx.field(static=True)  # pyright: ignore
    """`"int8"` if what this is multiplied with is rounded to 8 bits, too."""

    payload: ClassVar[str] = "weight"
    coding: ClassVar[Coding] = Coding(bits=8, signed=True)
    packing: ClassVar[None] = None

    def __init__(
        self,
        scale: Float[Array, "..."],
        weight: Int8[Array, "..."],
        axis: int | Sequence[int] | None = None,
        sharding: NamedSharding | PartitionSpec | None = None,
        *,
        shape: Sequence[int] | None = None,
        dtype: Any = None,
        block_size: BlockSize = None,
        casts: tuple[np.dtype, ...] = (),
        activations: Literal["float", "int8"] = "float",
    ):
        """Builds an array from codes and scales that exist already.

        **Arguments:**

        - `scale`: of the rank of `weight`.
        - `weight`: the codes.
        - `axis`, `shape`: what `scale` and `weight` already say; checked if given.
        - `sharding`: applied to the new array, as by `with_sharding`.
        - `dtype`: of the logical array; float32 by default.
        - `block_size`: needed where an axis has several scales but not one each.
        - `activations`: as for [`quantize`][eqquant.Array8B.quantize].

        **Raises:** `ValueError` if the leaves do not fit each other or the other arguments.
        """
        if sharding is not None:
            built = Array8B(scale, weight, axis, shape=shape, dtype=dtype, block_size=block_size)
            built = built.with_sharding(sharding)
            scale, weight = built.scale, built.weight
        self.scale = scale
        self.weight = weight
        self.dtype = check_dtype("Array8B(dtype=...)", jnp.float32 if dtype is None else dtype)
        self.block_size = block_size
        self.casts = casts
        check_choice("Array8B(activations=...)", activations, ("float", "int8"))
        self.activations = activations
        if shape is not None and tuple(shape) != weight.shape:
            raise ValueError(f"shape={tuple(shape)} but weight has shape {weight.shape}.")
        if axis is not None:
            axes = normalize_axes("Array8B(axis=...)", axis, weight.ndim)
            if any(scale.shape[a] != 1 for a in axes):
                raise ValueError(
                    f"axis={axis} says that one scale serves the axes {axes}, but scale has shape "
                    f"{scale.shape}."
                )

    @property
    def axis(self) -> tuple[int, ...]:
        """The axes along which elements share a scale, counted from the end."""
        return tuple(
            axis - self.ndim
            for axis, (stored, length) in enumerate(zip(self.scale.shape, self.shape, strict=True))
            if stored != length
        )

    @classmethod
    def quantize(
        cls,
        array: Any,
        dtype: Any = None,
        axis: int | Sequence[int] | None = None,
        *,
        block_size: BlockSize = None,
        activations: Literal["float", "int8"] = "float",
    ) -> "Array8B":
        """Quantizes a floating-point array.

        **Arguments:**

        - `array`: of any shape; float16, bfloat16, float32 or float64.
        - `dtype`: the floating-point dtype of the logical array; that of `array` by default.
        - `axis`: the axis or axes whose elements share one scale; by default the last.
            `axis=()` gives each element its own.
        - `block_size`: if given, only every `block_size` consecutive elements along `axis`
            (one axis then) share a scale; the last block may be partial. With several axes, a tuple: (128, 128)
            with `axis=(0, 1)` for blocks of a matrix.
        - `activations`: with `"int8"`, a product rounds the other operand to 8 bits as well (W8A8): the numbers
            that are summed up together, a row of activations, share a scale that is found on the fly, as in
            [LLM.int8()](https://arxiv.org/abs/2208.07339). Faster, and less exact: such a product is
            **not** that of the materialized array, but of the rounded activations with it. Its derivative is
            that of the product without rounding. Convolutions do not round.

        **Returns:** an `Array8B` of the shape of `array`. All-zero groups give exact zeros;
        groups whose largest magnitude is below about 2e-36 count as zero. An array that is sharded
        gives leaves that are sharded likewise.

        **Raises:** `TypeError` if `array` is not a floating-point array; `ValueError` if it
        holds NaN or infinity (outside tracing; under `jit` these propagate as NaN into their group), if `axis` is out of range,
        or if `block_size` is not positive.

        !!! example

            ```python
            import jax.numpy as jnp
            import eqquant as eqq

            q = eqq.Array8B.quantize(jnp.linspace(-1, 1, 12).reshape(3, 4), axis=0)
            assert q.scale.shape == (1, 4)
            ```
        """
        array, dtype = as_floats("Array8B.quantize", array, dtype)
        if axis is None:
            axis = (-1,) if array.ndim else ()
        axes, block_size = axes_and_blocks("Array8B.quantize", axis, block_size, array.ndim)
        check_choice("Array8B.quantize(activations=...)", activations, ("float", "int8"))
        scale, weight = _quantize(array, axes, block_size)
        check_finite("Array8B.quantize", array, scale)
        stored = stored_block_size(array, axes, block_size)
        out = cls(scale, weight, dtype=dtype, block_size=stored, activations=activations)
        return inherit_sharding(out, array)


@partial(jax.jit, static_argnums=(1, 2))
def _quantize(
    x: Array, axes: tuple[int, ...], block_size: BlockSize
) -> tuple[Float[Array, "..."], Int8[Array, "..."]]:
    wide = promote_types(x.dtype, jnp.float32)
    absmax = absmax_of(x, axes, block_size).astype(wide)
    scale = (absmax / 127).astype(jnp.float32)
    # 127 * scale must not round up to infinity.
    scale = jnp.where(jnp.isinf(scale * 127) & jnp.isfinite(scale), jnp.nextafter(scale, 0), scale)
    is_zero = absmax < 127 * jnp.finfo(jnp.float32).tiny
    # 127 (1 / absmax), not 127 / absmax: in float32 they differ, and this is what bitsandbytes does.
    # Above 1e37 the reciprocal would be subnormal, and be flushed to zero.
    safe = jnp.where(is_zero, 1, absmax)
    inverse = jnp.where(is_zero, 0, jnp.where(absmax > 1e37, 127 / safe, 127 * (1 / safe)))
    inverse = broadcastable(scale_leaf(inverse, x.shape, stored_block_size(x, axes, block_size)))
    weight = jnp.clip(jnp.round(x.astype(wide) * inverse), -127, 127).astype(jnp.int8)
    return jnp.where(is_zero, 1, scale), weight
