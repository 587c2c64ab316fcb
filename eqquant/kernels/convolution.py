"""Convolution with a quantized kernel."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._array import AbstractScaledArray
from .._tiles import spread
from .pieces import by_pieces, rows_per_piece


SMALL_BYTES = 128 << 10
PIECES = 16


def convolve(
    x: Array,
    w: AbstractScaledArray,
    *,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    preferred_element_type: Any,
    **params: Any,
) -> Array:
    """`lax.conv_general_dilated(x, w.materialize(), ...)`, without the dense kernel if it is large.

    Output channels are computed piece by piece, unless they are grouped.
    """
    out_dtype = preferred_element_type or jnp.promote_types(x.dtype, w.dtype)
    compute = jnp.promote_types(out_dtype, jnp.float32)
    params |= dict(
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        preferred_element_type=compute,
    )

    def product(x: Array, w: AbstractScaledArray) -> Array:
        return _convolve(x, w, **params)

    axis = dimension_numbers.rhs_spec[0]
    grouped = feature_group_count != 1 or batch_group_count != 1
    if grouped or w.size * compute.itemsize <= SMALL_BYTES:
        return product(x, w).astype(out_dtype)
    y = by_pieces(
        product,
        x,
        w,
        axis=axis,
        rows=rows_per_piece(w, axis, max(w.size // PIECES, 1)),
        x_axis=None,
        y_axis=dimension_numbers.out_spec[1],
        shape=jax.eval_shape(product, x, w).shape,
        dtype=compute,
    )
    return y.astype(out_dtype)


def _convolve(x: Array, w: AbstractScaledArray, **params: Any) -> Array:
    numbers, compute = params["dimension_numbers"], params["preferred_element_type"]
    out_axis, *others = numbers.rhs_spec
    scale = None if w.scale is None else w.leaves()["scale"]
    values, factors = w.values(compute), None
    if scale is not None and all(map(scale.is_constant_along, others)):
        # Each output channel o sums over q[o, ...] alone: its scale leaves the sum.
        factors = spread(scale, w.shape, [out_axis]).reshape(-1).astype(compute)
    elif scale is not None:
        values = values * spread(scale, w.shape).astype(compute)
    y = lax.conv_general_dilated_p.bind(x.astype(compute), values, **params)
    if factors is None:
        return y
    return y * lax.broadcast_in_dim(factors, y.shape, (numbers.out_spec[1],))
