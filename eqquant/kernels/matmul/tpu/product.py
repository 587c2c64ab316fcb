"""What the kernel computes, and where it serves."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from ...._array import AbstractScaledArray
from ....tiles import Leaf, spread
from ..as_matrices import by_matrices, holds_for_matrices
from ..product import has_sixteen_levels, high_half_first, Product, Target


# With more rows, all weights are decoded again for each further block of rows.
MAX_ROWS = 256
MIN_SIZE = 1 << 20


def supports(product: Product) -> bool:
    """Whether `compute` does: products with matrices of sixteen levels, along the axis that they are packed along,
    where scales change from one register to the next, but not within one."""
    x, w, floats = product.x, product.w, (jnp.bfloat16, jnp.float32)
    return (
        jnp.dtype(product.accumulate) == jnp.float32
        and x.dtype in floats
        and w.dtype in floats
        and max(x.size, w.size) < 2**31
        and holds_for_matrices(_looks_up, product)
    )


def _looks_up(x: Any, w: AbstractScaledArray, axis: int) -> bool:
    """Whether whole registers of codes share a scale, output by output."""
    if w.packing is None or w.packing.axis % 2 != axis or not has_sixteen_levels(w):
        return False
    if w.packing.tile.size % w.packing.tile.stored:
        return False  # there are places for elements that none takes
    bytes_per_scale = _bytes_per_scale(w)
    bytes_per_register = 8 if w.packing.axis == -1 else 32
    return _is_power_of_2(w.packing.tile.stored, bytes_per_register) and (
        bytes_per_scale is None or _is_power_of_2(bytes_per_scale, bytes_per_register)
    )


def pays(product: Product) -> bool:
    """Whether the weight is large, and each one is decoded once."""

    def has_few_rows(x: Any, w: AbstractScaledArray, axis: int) -> bool:
        return len(x) <= MAX_ROWS

    return product.w.size >= MIN_SIZE and holds_for_matrices(has_few_rows, product)


def compute(product: Product, target: Target, *, interpret: Any = False) -> Array:
    """As `reference`, where `supports` says so. Reads the stored bytes, and nothing as large as the dense
    weight is written.

    What is multiplied is rounded as the dense product would be, to the common dtype of `x` and `w`; float32
    is not rounded, whatever the `precision`. `interpret` runs it anywhere: True, or Pallas's `InterpretParams`.
    """
    return by_matrices(partial(_of_matrix, interpret=interpret), product.x, product.w, product.axes)


def _of_matrix(rows: Array, w: AbstractScaledArray, axis: int, *, interpret: Any) -> Array:
    from .kernel import product

    rows = rows.astype(jnp.promote_types(rows.dtype, w.dtype))
    packing, levels, scale = w.packing, w.codebook, w.scale_leaf
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
        high_first=high_half_first(w),
        bytes_per_tile=packing.tile.stored,
        bytes_per_scale=_bytes_per_scale(w),
        sum_last=axis == 1,
        interpret=interpret,
    )
    return y if factors is None else y * factors


def _bytes_per_scale(w: AbstractScaledArray) -> int | None:
    """How many stored bytes along the packed axis share a scale: None if all do, 0 if a scale ends within a
    tile of bytes."""
    assert w.packing is not None
    axis = w.packing.axis % w.ndim
    scale: Leaf | None = w.scale_leaf
    if scale is None or scale.is_constant_along(axis):
        return None
    tiles, rest = divmod(scale.tiles[axis].size, w.packing.tile.size)
    return 0 if rest else tiles * w.packing.tile.stored


def _is_power_of_2(number: int, least: int) -> bool:
    return number >= least and number & (number - 1) == 0
