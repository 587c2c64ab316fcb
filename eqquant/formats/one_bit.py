"""Ternary numbers, five in a byte, and binary numbers, eight in a byte."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int8, UInt8

from .._checks import (
    as_float_array,
    axes_and_blocks,
    check_choice,
    check_dtype,
    check_finite,
    check_integers,
    inherit_sharding,
)
from .._scaled import AbstractScaledArray
from .._sharding import check_tiles
from ..coding import Coding, TernaryCoding
from ..rounding import by_blocks, is_stack, mean_where
from ..tiles import BlockSize, broadcastable, Packing, scale_leaf, Tile


Levels = Literal["ternary", "binary"]
_PER_BYTE = {"ternary": 5, "binary": 8}
_CODINGS = {"ternary": TernaryCoding(), "binary": Coding(bits=1, low=-1, step=2)}
_ALLOWED = {"ternary": (-1, 0, 1), "binary": (-1, 1)}
_STEPS = 16


class Array1B(AbstractScaledArray):
    r"""Stores $x_{ij} \approx s_i t_{ij}$ with $t_{ij} \in \{-1, 0, 1\}$ (ternary, 1.6 bits for each
    weight) or $t_{ij} \in \{-1, 1\}$ (binary, 1 bit).

    Integers are stored as they are, and $s$ is the integer 1: of 8 bits, for the whole array, and not trained. Floating-point
    numbers are rounded:

    - ternary, `scale="absmean"`: $s_i$ is the mean of $|x_{ij}|$ over the quantized axes, and
      $t_{ij}$ is $x_{ij} / s_i$ rounded to the nearest of -1, 0, 1
      ([BitNet b1.58](https://arxiv.org/abs/2402.17764), section 2);
    - ternary, `scale="least_squares"`: $s_i$ and $t_{ij}$ of the least squared error
      ([Ternary Weight Networks](https://arxiv.org/abs/1605.04711)), found by alternating between them:
      within 0.1 % of the least one for 256 normally distributed numbers, and 3 % for 40;
    - binary: $s_i$ is the mean of $|x_{ij}|$ and $t_{ij}$ the sign of $x_{ij}$, 1 for zero
      ([XNOR-Net](https://arxiv.org/abs/1603.05279), section 3.1): that is of least squared error.

    Make one with [`Array1B.quantize`][eqquant.Array1B.quantize].

    !!! example

        ```python
        import jax, jax.numpy as jnp
        import eqquant as eqq

        w = jax.random.normal(jax.random.key(0), (128, 256))
        q = eqq.Array1B.quantize(w)
        assert q.shape == w.shape and q.bits_per_weight < 2
        exact = eqq.Array1B.quantize(jnp.array([[1, 0, -1]]))
        assert (exact.scale == 1).all() and (exact.materialize() == jnp.array([[1, 0, -1]])).all()
        ```
    """

    weight: UInt8[Array, "..."]
    """The codes. Ternary: the five digits $t + 1$ of a number in base 3, first digit first, as the fraction
    of 243 that it is, in units of 1/256, rounded up. Binary: bit `i` says whether element `i` is 1."""
    scale: Float[Array, "..."] | Int8[Array, "..."] | None
    """One number for each tile. Of integers, which are stored as they are, it is 1, as an int8: an array whose leaves are
    all zero, as `jax.tree.map(jnp.zeros_like, q)` makes them, is so zero, although the code 0 stands for -1."""
    packing: Packing | None = eqx.field(static=True)
    """The packed axis and its length; None for a 0-d array."""
    levels: Levels = eqx.field(static=True)
    """`"ternary"` or `"binary"`."""
    block_size: BlockSize = eqx.field(static=True)
    """How many elements share a scale along an axis that has several scales; None if no axis has."""
    dtype: np.dtype = eqx.field(static=True)
    """The dtype of the logical array."""
    casts: tuple[np.dtype, ...] = eqx.field(static=True)
    """Dtypes that the values were rounded to before they were cast to `dtype`."""
    activations: Literal["float", "int8"] = eqx.field(static=True)  # pyright: ignore
    """`"int8"` if what this is multiplied with is rounded to 8 bits."""

    payload: ClassVar[str] = "weight"
    description_version: ClassVar[int] = 2  # integers have a scale, which is 1

    def __init__(
        self,
        weight: UInt8[Array, "..."],
        scale: Float[Array, "..."] | Int8[Array, "..."] | None = None,
        *,
        shape: Sequence[int] | None = None,
        dtype: Any = None,
        levels: Levels = "ternary",
        packing: Packing | Literal["last"] | None = "last",
        block_size: BlockSize = None,
        casts: tuple[np.dtype, ...] = (),
        activations: Literal["float", "int8"] = "float",
    ):
        """Builds an array from codes and scales that exist already.

        **Arguments:**

        - `weight`: the codes, as described under [`weight`][eqquant.Array1B.weight].
        - `scale`: of the rank of `weight`; by default 1.
        - `shape`: of the logical array; by default all bytes are full.
        - `dtype`: of the logical array; float32 by default.
        - `levels`: `"ternary"` or `"binary"`.
        - `packing`: by default the last axis is packed; None if none is.
        - `block_size`: needed where an axis has several scales but not one each.
        - `activations`: as for [`quantize`][eqquant.Array1B.quantize].

        **Raises:** `ValueError` if the leaves do not fit each other or the other arguments.
        """
        check_choice("Array1B(levels=...)", levels, tuple(_PER_BYTE))
        check_choice("Array1B(activations=...)", activations, ("float", "int8"))
        if packing == "last":
            length = _PER_BYTE[levels] * weight.shape[-1] if shape is None else shape[-1]
            packing = Packing(-1, length, Tile(_PER_BYTE[levels]))
        if scale is None:
            in_stack = is_stack(weight.ndim, -1 if packing is None else packing.axis)
            scale = jnp.ones((*weight.shape[:in_stack], *[1] * (weight.ndim - in_stack)), jnp.int8)
        self.weight, self.scale, self.packing = weight, scale, packing
        self.levels, self.block_size, self.casts = levels, block_size, casts
        self.activations = activations
        dtype = jnp.float32 if dtype is None else dtype
        self.dtype = check_dtype("Array1B(dtype=...)", dtype, integers=True)
        if shape is not None and tuple(shape) != self.shape:
            raise ValueError(f"shape={tuple(shape)} but the leaves say {self.shape}.")

    @property
    def coding(self) -> Coding:
        """What the codes stand for."""
        return _CODINGS[self.levels]

    @classmethod
    def quantize(
        cls,
        array: Any,
        dtype: Any = None,
        axis: int | Sequence[int] | None = None,
        *,
        levels: Levels = "ternary",
        scale: Literal["absmean", "least_squares"] = "absmean",
        block_size: int | None = None,
        tile: int | None = None,
        activations: Literal["float", "int8"] = "float",
    ) -> "Array1B":
        """Quantizes an array.

        **Arguments:**

        - `array`: of any shape. Integers have to be -1, 0 or 1 (-1 or 1 for `levels="binary"`) and
            are kept exactly; floating-point numbers are rounded and get a scale.
        - `dtype`: the dtype of the logical array; that of `array` by default.
        - `axis`: the axis or axes whose elements share one scale, by default the last. Numbers are
            packed along the last of them.
        - `levels`: `"ternary"` or `"binary"`.
        - `scale`: how scales of ternary numbers are found: `"absmean"` (BitNet b1.58) or
            `"least_squares"`, 1.4 dB better on normally distributed weights.
        - `block_size`: if given, only every `block_size` consecutive elements along `axis`
            (one axis then) share a scale; the last block may be partial.
        - `tile`: pack so many elements by themselves, if given: along the packed axis, an array can be cut and split
            over devices at their multiples. With `tile=64`, 64 ternary numbers take 13 bytes (1.625 bits each), where
            the five of a byte would only be whole at multiples of 5.
        - `activations`: with `"int8"`, a product rounds the other operand to 8 bits, as BitNet was trained
            (W1.58A8): as for [`Array8B`][eqquant.Array8B.quantize].

        **Returns:** an `Array1B` of the shape of `array`. All-zero groups give exact zeros. An array that
        is sharded gives leaves that are sharded likewise.

        **Raises:** `TypeError` for other dtypes; `ValueError` if an integer is not one of the levels, a
        number is NaN or infinite (outside tracing; under `jit`, NaN turns its group to NaN, and other
        integers go to the level of their sign), or an argument is out of range.

        !!! example

            ```python
            import jax, jax.numpy as jnp
            import eqquant as eqq

            w = jax.random.normal(jax.random.key(0), (64, 100))
            q = eqq.Array1B.quantize(w, levels="binary")
            assert q.shape == (64, 100) and q.weight.shape == (64, 13) and q.scale.shape == (64, 1)
            ```
        """
        check_choice("Array1B.quantize(levels=...)", levels, tuple(_PER_BYTE))
        check_choice("Array1B.quantize(scale=...)", scale, ("absmean", "least_squares"))
        check_choice("Array1B.quantize(activations=...)", activations, ("float", "int8"))
        exact = hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.integer)
        if exact:
            array = check_integers("Array1B.quantize", array, _ALLOWED[levels])
        else:
            array = as_float_array("Array1B.quantize", array)
        dtype = array.dtype if dtype is None else dtype
        dtype = check_dtype("Array1B.quantize(dtype=...)", dtype, integers=exact)
        if axis is None:
            axis = (-1,) if array.ndim else ()
        axes, blocks = axes_and_blocks("Array1B.quantize", axis, block_size, array.ndim)
        if isinstance(blocks, tuple):
            raise ValueError(
                f"Array1B has blocks along one axis; Array1B.quantize(block_size=...) was given {blocks}."
            )
        block_size = blocks
        if tile is not None and tile < 1:
            raise ValueError(
                f"tile must be positive; Array1B.quantize(..., tile={tile}) was given {tile}."
            )
        packing = None
        if array.ndim:
            packed = axes[-1] if axes else array.ndim - 1
            elements = _PER_BYTE[levels] if tile is None else tile
            covers = Tile(elements, -(-elements // _PER_BYTE[levels]))
            packing = Packing(packed - array.ndim, array.shape[packed], covers)
        if block_size is not None and block_size >= array.shape[axes[0]]:
            block_size = None
        how = None if exact else scale
        weight, scales = _quantize(array, packing, axes, levels, how, block_size)
        if scales is not None:
            check_finite("Array1B.quantize", array, scales)
        out = cls(
            weight,
            scales,
            packing=packing,
            levels=levels,
            block_size=block_size,
            dtype=dtype,
            activations=activations,
        )
        return inherit_sharding(out, array)


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _quantize(
    x: Array,
    packing: Packing | None,
    axes: tuple[int, ...],
    levels: Levels,
    how: str | None,
    block_size: int | None,
) -> tuple[UInt8[Array, "..."], Float[Array, "..."] | None]:
    if packing is not None:
        check_tiles(x, packing.axis % x.ndim, packing.tile.size)
    if how is None:
        scale, threshold = None, jnp.zeros((), jnp.int8)
    else:
        x = x.astype(jnp.float32)
        scale = _absmean(x, axes, block_size)
        if how == "least_squares" and levels == "ternary":
            scale = lax.fori_loop(
                0, _STEPS, lambda _, scale: _absmean(x, axes, block_size, scale / 2), scale
            )
        threshold = broadcastable(scale_leaf(scale / 2, x.shape, block_size))

    def digit(x: Array, threshold: Array) -> Array:
        if levels == "binary":
            return (x >= 0).astype(jnp.uint8)
        # x / s rounds to 1 above s / 2: ties go to the even number, which is 0.
        return 1 + (x > threshold).astype(jnp.uint8) - (x < -threshold).astype(jnp.uint8)

    digits = digit(x, threshold)
    planes = [digits] if packing is None else packing.split(digits)
    return _CODINGS[levels].pack(planes), scale


def _absmean(
    x: Array, axes: tuple[int, ...], block_size: int | None, threshold: Array | None = None
) -> Array:
    """The mean magnitude over `axes`, or over each block of one axis: of all elements, or of those with
    a magnitude above `threshold`."""
    magnitude, counted = jnp.abs(x), jnp.ones(x.shape, bool)
    if threshold is not None:
        counted = magnitude > broadcastable(scale_leaf(threshold, x.shape, block_size))
        magnitude = jnp.where(counted | ~jnp.isfinite(x), magnitude, 0)
    if block_size is None:
        return mean_where(magnitude, counted, axes)
    (axis,) = axes
    magnitude, counted = (by_blocks(each, axis, block_size) for each in (magnitude, counted))
    return lax.squeeze(mean_where(magnitude, counted, (axis + 1,)), (axis + 1,))
