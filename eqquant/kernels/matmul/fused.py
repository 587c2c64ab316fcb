"""One dot with the scale placed where it costs least, for XLA to fuse."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ... import _compat
from ..._scaled import AbstractScaledArray
from ...tiles import EACH, Leaf, Packing, repeat, spread
from .reference import Axes


# Above this many elements of x for one of w, one dot with the planes side by side is faster than one with each.
# Measured on two AVX-512 cores, tiles of 256 x 4096: 16 rows take 1.1 times as long side by side, 64 rows 0.9 to
# 1.05 times, 512 rows 0.7 to 0.9 times.
FEW_INPUTS = 1 / 8


def fused(
    x: Array,
    w: AbstractScaledArray,
    *,
    axes: Axes,
    precision: Any,
    accumulate: Any,
    weight_first: bool = False,
    half: bool = True,
    isolated: bool = False,
    for_tpu: bool = False,
) -> Array:
    """As `reference`, on the unscaled values of `w` where the scale can leave the sum.

    The operands of the dot are of `accumulate`; with `half` they are of the dtype of `x` where that has 16
    bits and what is multiplied is exact in it, or as exact as `w` is. With `weight_first`, the weight is the
    left one. With `isolated`, XLA cannot change the layout of operands and result.

    `for_tpu` says the same in forms of which its compiler makes more. A single row is multiplied beside one of
    zeros: by itself it does not go to the matrix units. Levels are chosen bit by bit: those that are looked up are
    written to memory. So are scales that are repeated as often as a register has lanes, but not if that is
    done in two steps.
    """
    options: dict[str, Any] = dict(axes=axes, precision=precision, accumulate=accumulate)
    options |= dict(weight_first=weight_first, isolated=isolated, for_tpu=for_tpu)
    rows = axes.x_free(x.ndim)
    if for_tpu and not axes.x_batch and all(x.shape[axis] == 1 for axis in rows):
        row = lax.transpose(x, [*rows, *axes.x_contract]).reshape(
            [x.shape[i] for i in axes.x_contract]
        )
        both = lax.pad(row[None], jnp.zeros((), x.dtype), [(0, 1, 0), *[(0, 0, 0)] * row.ndim])
        options["axes"] = axes._replace(x_contract=tuple(range(1, both.ndim)))
        y = fused(both, w, half=half, **options)
        return y[0].reshape(axes.output_shape(x.shape, w.shape))
    half = half and jnp.finfo(x.dtype).bits == 16 and accumulate == jnp.float32
    as_exact = x.dtype if half and w.dtype == x.dtype else accumulate
    exact = x.dtype if half and w.integers else as_exact
    scale = None if w.scale_leaf is None else w.scale_leaf
    free = axes.w_free(w.ndim)
    if scale is None or all(scale.is_constant_along(axis) for axis in axes.w_contract):
        # sum_j x_j (s_i q_ij) = s_i sum_j x_j q_ij: a scale constant along j leaves the sum.
        y = _product(x, w, None, operands=exact, **options)
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
        return _product(x, w, None, operands=accumulate, **options)
    # It has to be multiplied in.
    return _product(x, w, scale, operands=as_exact, **options)


def _product(
    x: Array,
    w: AbstractScaledArray,
    scale: Leaf | None,
    *,
    axes: Axes,
    precision: Any,
    accumulate: Any,
    operands: Any,
    weight_first: bool,
    isolated: bool,
    for_tpu: bool,
) -> Array:
    """The product with the values of `w`, times `scale` if there is one.

    Several elements of a packed axis lie in one stored number. Rather than bringing them in order, which
    costs more than decoding them, the other side is taken apart in the same way: the input, or
    afterwards the output.
    """

    def dot(x: Array, values: Array) -> Array:
        options = dict(precision=precision, preferred_element_type=jnp.dtype(accumulate))
        x, values = x.astype(operands), values.astype(operands)
        if isolated:
            x, values = _compat.optimization_barrier((x, values))
        (xc, wc), (xb, wb) = axes.dimension_numbers
        if weight_first:
            y = lax.dot_general(values, x, ((wc, xc), (wb, xb)), **options)
        else:
            y = lax.dot_general(x, values, axes.dimension_numbers, **options)
        if isolated:
            y = _compat.optimization_barrier(y)
        if not weight_first:
            return y
        batch, outputs = len(wb), y.ndim - len(axes.x_free(x.ndim))
        return lax.transpose(y, [*range(batch), *range(outputs, y.ndim), *range(batch, outputs)])

    packing = w.packing
    axis = -1 if packing is None else packing.axis % w.ndim
    if packing is None or axis in axes.w_batch:
        values = w.values(operands if scale is None else accumulate)
        if scale is None:
            return dot(x, values)
        if for_tpu:
            for i, tile in enumerate(scale.tiles):
                if not scale.is_constant_along(i):
                    array = _repeat_in_two_steps(scale.array, tile.size, i, scale.shape[i])
                    scale = scale.with_axis(i, array, EACH, scale.shape[i])
        return dot(x, values * spread(scale).astype(accumulate))
    dtype = operands if scale is None else accumulate
    if for_tpu and w.codebook is not None:
        stored = w.payload_leaf.array
        planes = [_selected(codes, w.codebook, dtype) for codes in (stored >> 4, stored & 15)]
    else:
        planes = [w.plane(i, dtype) for i in range(packing.elements)]
    if scale is not None:
        scales = _scale_planes(scale, packing, _repeat_in_two_steps if for_tpu else repeat)
        planes = [v * s.astype(accumulate) for v, s in zip(planes, scales, strict=True)]
    apart = x.size <= w.size * FEW_INPUTS  # or side by side
    if axis in axes.w_contract:
        x_axis = axes.x_contract[axes.w_contract.index(axis)]
        parts = packing._replace(axis=x_axis - x.ndim).split(x)
        if not apart:
            return dot(lax.concatenate(parts, x_axis), lax.concatenate(planes, axis))
        return functools.reduce(operator.add, map(dot, parts, planes))
    y_axis = axes.y_axis(axis, x.ndim, w.ndim)
    assert y_axis is not None  # the axis is free
    if apart:
        products = [dot(x, plane) for plane in planes]
    else:
        y = dot(x, lax.concatenate(planes, axis))
        products = lax.split(y, [packing.stored] * packing.elements, y_axis)
    return packing._replace(axis=y_axis - products[0].ndim).merge(products)


def _selected(codes: Array, levels: Sequence[float], dtype: Any) -> Array:
    """The levels of these numbers, of which there is a power of 2."""
    if len(levels) == 1:
        return jnp.asarray(levels[0], dtype)
    half = len(levels) // 2
    lower, upper = (_selected(codes, part, dtype) for part in (levels[:half], levels[half:]))
    return jnp.where((codes & half) != 0, upper, lower)


def _repeat_in_two_steps(array: Array, times: int, axis: int, length: int) -> Array:
    """As `repeat`; of more than 64 times, at most 32 by themselves."""
    last = math.gcd(times, 32)
    if times > 64 and last > 1:
        before = times // last
        array, times = repeat(array, before, axis, array.shape[axis] * before), last
    return repeat(array, times, axis, length)


def _scale_planes(scale: Leaf, packing: Packing, repeat: Callable[..., Array]) -> Sequence[Array]:
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
