"""One dot with the scale placed where it costs least, for XLA to fuse."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..._array import AbstractScaledArray
from ..._tiles import spread
from .reference import Axes


def fused(
    x: Array, w: AbstractScaledArray, *, axes: Axes, precision: Any, accumulate: Any
) -> Array:
    """As `reference`, on the unscaled values of `w` where the scale can leave the sum.

    The weight is not rounded to its logical dtype: the result is at least as precise.
    """
    scale = None if w.scale is None else w.leaves()["scale"]
    free = axes.w_free(w.ndim)
    if scale is None or all(scale.is_constant_along(axis) for axis in axes.w_contract):
        # sum_j x_j (s_i q_ij) = s_i sum_j x_j q_ij: a scale constant along j leaves the sum.
        y = _dot(x, w.values(accumulate), axes, precision, accumulate)
        if scale is None:
            return y
        factors = spread(scale, w.shape, (*axes.w_batch, *free)).astype(accumulate)
        factors = lax.transpose(factors, (*axes.w_batch, *free, *axes.w_contract))
        batch = factors.shape[: len(axes.w_batch)]
        between = (1,) * len(axes.x_free(x.ndim))
        outputs = factors.shape[len(batch) : len(batch) + len(free)]
        return y * factors.reshape(*batch, *between, *outputs)
    if all(scale.is_constant_along(axis) for axis in free) and x.size <= w.size:
        # sum_j x_j (s_j q_ij) = sum_j (x_j s_j) q_ij: a scale constant along i goes to the input,
        # unless that is the larger of the two.
        factors = spread(scale, w.shape, (*axes.w_batch, *axes.w_contract)).astype(accumulate)
        factors = lax.squeeze(factors, free)
        kept = [axis for axis in range(w.ndim) if axis not in free]
        target = dict(
            zip(axes.w_batch + axes.w_contract, axes.x_batch + axes.x_contract, strict=True)
        )
        order = sorted(range(len(kept)), key=lambda i: target[kept[i]])
        factors = lax.transpose(factors, order)
        x = x.astype(accumulate)
        x = x * lax.broadcast_in_dim(factors, x.shape, sorted(target.values()))
        return _dot(x, w.values(accumulate), axes, precision, accumulate)
    # It has to be multiplied in.
    values = w.values(accumulate) * spread(scale, w.shape).astype(accumulate)
    return _dot(x, values, axes, precision, accumulate)


def _dot(x: Array, values: Array, axes: Axes, precision: Any, accumulate: Any) -> Array:
    return lax.dot_general(
        x.astype(accumulate),
        values,
        axes.dimension_numbers,
        precision=precision,
        preferred_element_type=jnp.dtype(accumulate),
    )
