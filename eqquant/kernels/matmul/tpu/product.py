"""What the kernel computes, and where it serves."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from ...._array import AbstractScaledArray
from ....tiles import Leaf, spread
from ..reference import Axes


# With more rows, all weights are decoded again for each further block of rows.
MAX_ROWS = 256
MIN_SIZE = 1 << 20


def supports(x: Any, w: AbstractScaledArray, axes: Axes, accumulate: Any) -> bool:
    """Whether `tpu` computes this product: with a matrix of sixteen levels, along the axis that it is packed
    along, where scales change from one register to the next, but not within one."""
    floats = (jnp.bfloat16, jnp.float32)
    if (
        w.ndim != 2
        or w.codebook is None
        or w.packing is None
        or len(axes.w_contract) != 1
        or axes.w_batch
        or w.packing.axis % 2 != axes.w_contract[0]
    ):
        return False
    bytes_per_scale = _bytes_per_scale(w)
    bytes_per_register = 8 if w.packing.axis == -1 else 32
    return (
        _is_power_of_2(w.packing.tile.stored, bytes_per_register)
        and (bytes_per_scale is None or _is_power_of_2(bytes_per_scale, bytes_per_register))
        and jnp.dtype(accumulate) == jnp.float32
        and x.dtype in floats
        and w.dtype in floats
        and math.prod(x.shape) * w.size > 0
        and max(math.prod(x.shape), w.size) < 2**31
    )


def pays(x: Any, w: AbstractScaledArray, axes: Axes) -> bool:
    """Whether the weight is large, and each one is decoded once."""
    rows = math.prod(x.shape) // w.shape[axes.w_contract[0]]
    return rows <= MAX_ROWS and w.size >= MIN_SIZE


def tpu(
    x: Array,
    w: AbstractScaledArray,
    *,
    axes: Axes,
    precision: Any,
    accumulate: Any,
    interpret: Any = False,
) -> Array:
    """As `reference`, where `supports` says so. Reads the stored bytes, and nothing as large as the dense
    weight is written.

    What is multiplied is rounded as the dense product would be, to the common dtype of `x` and `w`; float32
    is not rounded, whatever the `precision`. `interpret` runs it anywhere: True, or Pallas's `InterpretParams`.
    """
    from .kernel import product

    (x_axis,), (axis,) = axes.x_contract, axes.w_contract
    x = jnp.moveaxis(x, x_axis, -1).astype(jnp.promote_types(x.dtype, w.dtype))
    batch, rows = x.shape[:-1], x.reshape(-1, x.shape[-1])
    w = w.unnested()
    packing, levels, scale = w.packing, w.codebook, w.leaves().get("scale")
    assert packing is not None and levels is not None  # says `supports`
    factors = scales = None
    if scale is not None:
        by_block = spread(scale, [1 - axis]).astype(jnp.float32)
        by_block = by_block if axis == 1 else by_block.T
        if scale.is_constant_along(axis):
            # sum_j x_j (s_i q_ij) = s_i sum_j x_j q_ij: a scale constant along j leaves the sum.
            factors = by_block.reshape(-1)
        else:
            scales = by_block
    filled = packing.elements * packing.stored
    y = product(
        jnp.pad(rows, ((0, 0), (0, filled - rows.shape[1]))),
        w.payload_leaf.array,
        scales,
        levels,
        bytes_per_tile=packing.tile.stored,
        bytes_per_scale=_bytes_per_scale(w),
        sum_last=axis == 1,
        interpret=interpret,
    )
    if factors is not None:
        y = y * factors
    return y.reshape(*batch, w.shape[1 - axis])


def _bytes_per_scale(w: AbstractScaledArray) -> int | None:
    """How many stored bytes along the packed axis share a scale: None if all do, 0 if a scale ends within a
    tile of bytes."""
    assert w.packing is not None
    axis = w.packing.axis % w.ndim
    scale: Leaf | None = w.leaves().get("scale")
    if scale is None or scale.is_constant_along(axis):
        return None
    tiles, rest = divmod(scale.tiles[axis].size, w.packing.tile.size)
    return 0 if rest else tiles * w.packing.tile.stored


def _is_power_of_2(number: int, least: int) -> bool:
    return number >= least and number & (number - 1) == 0
