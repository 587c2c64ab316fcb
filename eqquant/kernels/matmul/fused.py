"""One dot with the scale placed where it costs least, for XLA to fuse."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..._array import AbstractScaledArray
from ...tiles import Leaf, Packing, repeat, spread
from .reference import Axes


# Above this many elements of x for one of w, merging the planes of w costs less than splitting x.
FEW_INPUTS = 1 / 4


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
        y = _product(x, w, None, axes, precision, accumulate)
        if scale is None:
            return y
        factors = spread(scale, (*axes.w_batch, *free)).astype(accumulate)
        factors = lax.transpose(factors, (*axes.w_batch, *free, *axes.w_contract))
        batch = factors.shape[: len(axes.w_batch)]
        between = (1,) * len(axes.x_free(x.ndim))
        outputs = factors.shape[len(batch) : len(batch) + len(free)]
        return y * factors.reshape(*batch, *between, *outputs)
    if all(scale.is_constant_along(axis) for axis in free) and x.size <= w.size:
        # sum_j x_j (s_j q_ij) = sum_j (x_j s_j) q_ij: a scale constant along i goes to the input,
        # unless that is the larger of the two.
        factors = spread(scale, (*axes.w_batch, *axes.w_contract)).astype(accumulate)
        factors = lax.squeeze(factors, free)
        kept = [axis for axis in range(w.ndim) if axis not in free]
        target = dict(
            zip(axes.w_batch + axes.w_contract, axes.x_batch + axes.x_contract, strict=True)
        )
        order = sorted(range(len(kept)), key=lambda i: target[kept[i]])
        factors = lax.transpose(factors, order)
        x = x.astype(accumulate)
        x = x * lax.broadcast_in_dim(factors, x.shape, sorted(target.values()))
        return _product(x, w, None, axes, precision, accumulate)
    # It has to be multiplied in.
    return _product(x, w, scale, axes, precision, accumulate)


def _product(
    x: Array,
    w: AbstractScaledArray,
    scale: Leaf | None,
    axes: Axes,
    precision: Any,
    accumulate: Any,
) -> Array:
    """The product with the values of `w`, times `scale` if there is one.

    Several elements of a packed axis lie in one stored number. Rather than bringing them in order,
    the other side is taken apart in the same way: the input, or afterwards the output.
    """

    def dot(x: Array, values: Array) -> Array:
        return lax.dot_general(
            x.astype(accumulate),
            values,
            axes.dimension_numbers,
            precision=precision,
            preferred_element_type=jnp.dtype(accumulate),
        )

    packing = w.packing
    axis = -1 if packing is None else packing.axis % w.ndim
    if packing is None or axis in axes.w_batch or x.size > w.size * FEW_INPUTS:
        values = w.values(accumulate)
        return dot(x, values if scale is None else values * spread(scale).astype(accumulate))
    planes = [w.plane(i, accumulate) for i in range(packing.elements)]
    if scale is not None:
        scales = _scale_planes(scale, packing)
        planes = [v * s.astype(accumulate) for v, s in zip(planes, scales, strict=True)]
    if axis in axes.w_contract:
        x_axis = axes.x_contract[axes.w_contract.index(axis)]
        parts = packing._replace(axis=x_axis - x.ndim).split(x)
        y = dot(parts[0], planes[0])
        for part, plane in zip(parts[1:], planes[1:], strict=True):
            y = y + dot(part, plane)
        return y
    products = [dot(x, plane) for plane in planes]
    y_axis = axes.y_axis(axis, x.ndim, w.ndim)
    assert y_axis is not None  # the axis is free
    return packing._replace(axis=y_axis - products[0].ndim).merge(products)


def _scale_planes(scale: Leaf, packing: Packing) -> Sequence[Array]:
    """A scale spread as the planes of a payload are."""
    axis = packing.axis % len(scale.shape)
    others = [i for i in range(len(scale.shape)) if i != axis and not scale.is_constant_along(i)]
    per_tile, rest = divmod(scale.tiles[axis].size, packing.tile.size)
    if scale.is_constant_along(axis):
        plane = spread(scale, others)
    elif not rest:  # whole tiles of the payload share a scale
        plane = repeat(spread(scale, others), per_tile * packing.tile.stored, axis, packing.stored)
    else:
        return packing.split(spread(scale, [*others, axis]))
    return [plane] * packing.elements
