"""What the kernel computes, and where it serves."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ...._compat import promote_types
from ...._scaled import AbstractScaledArray
from ....tiles import Leaf, Packing, to_elements
from ..as_matrices import by_matrices, holds_for_matrices
from ..product import has_sixteen_levels, has_slack, high_half_first, Product, Target


# With more rows, all weights are decoded again for each further block of rows.
MAX_ROWS = 256
MIN_SIZE = 1 << 20
FLOATS = (jnp.bfloat16, jnp.float32)


def supports(product: Product) -> bool:
    """Whether `compute` does: products with matrices of sixteen levels, along the axis that they are packed along,
    where scales change from one register to the next, but not within one."""
    return holds_for_matrices(_looks_up, product, FLOATS)


def pays(product: Product) -> bool:
    """Whether the weight is large, and each one is decoded once."""
    few = holds_for_matrices(lambda x, w, scale, axis: len(x) <= MAX_ROWS, product, FLOATS)
    return few and product.w.size >= MIN_SIZE


def _looks_up(x: Any, w: AbstractScaledArray, scale: Leaf | None, axis: int) -> bool:
    """Whether whole registers of codes share a scale, output by output."""
    packing = w.packing
    if packing is None or packing.axis % 2 != axis or has_slack(packing):
        return False
    per_register = 8 if packing.axis == -1 else 32
    sizes = packing.tile.stored, _bytes_per_scale(packing, scale)
    return has_sixteen_levels(w) and all(
        size is None or (size >= per_register and size & (size - 1) == 0) for size in sizes
    )


def compute(product: Product, target: Target, *, interpret: Any = False) -> Array:
    """As `reference`, where `supports` says so. Reads the stored bytes, and nothing as large as the dense
    weight is written.

    What is multiplied is rounded as the dense product would be, to the common dtype of `x` and `w`; float32
    is not rounded, whatever the `precision`. `interpret` runs it anywhere: True, or Pallas's `InterpretParams`.
    """
    from . import kernel

    def of_matrix(rows: Any, w: AbstractScaledArray, scale: Leaf | None, axis: int) -> Array:
        packing, levels, scales = w.packing, w.codebook, None
        assert packing is not None and levels is not None  # says `supports`
        if scale is not None:
            scales = to_elements(scale, [1 - axis]).astype(jnp.float32)
            scales = scales if axis == 1 else scales.T
        missing = packing.elements * packing.stored - rows.shape[1]
        rows = rows.astype(promote_types(rows.dtype, w.dtype))
        return kernel.product(
            jnp.pad(rows, ((0, 0), (0, missing))),
            w.payload_leaf.array,
            scales,
            levels,
            high_first=high_half_first(w),
            bytes_per_tile=packing.tile.stored,
            bytes_per_scale=_bytes_per_scale(packing, scale),
            sum_last=axis == 1,
            max_rows=MAX_ROWS,
            interpret=interpret,
        )

    return by_matrices(of_matrix, product.x, product.w, product.axes)


def _bytes_per_scale(packing: Packing, scale: Leaf | None) -> int | None:
    """How many stored bytes along the packed axis share a scale: None if all do, 0 if a scale ends within a
    tile of bytes."""
    if scale is None:
        return None
    tiles, rest = divmod(scale.tiles[packing.axis].size, packing.tile.size)
    return 0 if rest else tiles * packing.tile.stored
