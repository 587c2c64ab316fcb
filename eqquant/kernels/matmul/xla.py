"""One dot with the scale placed where it costs least, for XLA to fuse."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ... import _compat
from ..._scaled import AbstractScaledArray
from ...tiles import broadcastable, Leaf, Packing, repeat, to_elements, UNIT
from .product import has_sixteen_levels, high_half_first, Product, Target


# Above this many elements of x for one of w, one dot with the planes side by side is faster than one with each.
FEW_INPUTS = 1 / 8


class Form(NamedTuple):
    """Which of several programs of the same meaning XLA is given."""

    half: bool
    """Whether operands are of the dtype of `x` where that has 16 bits and what is multiplied is exact in it, or as
    exact as `w` is; otherwise they are of `accumulate`."""
    weight_first: bool = False
    """Whether the weight is the left operand."""
    isolated: bool = False
    """Whether XLA is kept from changing the layout of operands and result."""
    for_tpu: bool = False
    """Whether in forms of which its compiler makes more. A single row is multiplied beside one of zeros: by itself it
    does not go to the matrix units. Levels are chosen bit by bit: those that are looked up are written to memory. So
    are scales that are repeated as often as a register has lanes, but not if that is done in two steps."""


def compute(product: Product, target: Target) -> Array:
    """As `reference`, on the unscaled values of `w` where the scale can leave the sum."""
    # XLA for CPU cannot multiply bfloat16 in every layout.
    return in_form(product, Form(half=target.platform != "cpu", for_tpu=target.platform == "tpu"))


def in_form(product: Product, form: Form) -> Array:
    """The product as a program of this form."""
    x, w, axes, accumulate = product.x, product.w, product.axes, product.accumulate
    if form.for_tpu and not axes.x_batch and product.rows == 1:
        return _beside_zeros(product, form)
    half = form.half and jnp.finfo(x.dtype).bits == 16 and accumulate == jnp.float32
    as_exact = x.dtype if half and w.dtype == x.dtype else accumulate
    scale, free = w.scale_leaf, axes.w_free(w.ndim)
    if scale is None or product.scale_leaves_the_sum:
        # sum_j x_j (s_i q_ij) = s_i sum_j x_j q_ij: a scale constant along j leaves the sum.
        y = _product(product, None, x.dtype if half and w.integers else as_exact, form)
        if scale is None:
            return y
        factors = to_elements(scale, (*axes.w_batch, *free)).astype(accumulate)
        factors = lax.transpose(factors, (*axes.w_batch, *free, *axes.w_contract))
        batch = factors.shape[: len(axes.w_batch)]
        between = (1,) * len(axes.x_free(x.ndim))
        outputs = factors.shape[len(batch) : len(batch) + len(free)]
        return y * factors.reshape(*batch, *between, *outputs)
    if all(scale.is_constant_along(axis) for axis in free) and product.inputs <= w.size:
        # sum_j x_j (s_j q_ij) = sum_j (x_j s_j) q_ij: a scale constant along i goes to the input,
        # unless that is the larger of the two.
        factors = to_elements(scale, (*axes.w_batch, *axes.w_contract)).astype(accumulate)
        factors = lax.squeeze(factors, free)
        of_w, pairs = axes.w_batch + axes.w_contract, axes.x_batch + axes.x_contract
        of_x = [axis for _, axis in sorted(zip(of_w, pairs, strict=True))]
        factors = lax.transpose(factors, sorted(range(len(of_x)), key=of_x.__getitem__))
        x = x.astype(accumulate)
        x = x * lax.broadcast_in_dim(factors, x.shape, sorted(of_x))
        return _product(product.replace(x=x), None, accumulate, form)
    # It has to be multiplied in.
    return _product(product, scale, as_exact, form)


def _beside_zeros(product: Product, form: Form) -> Array:
    """The product with the only row of `x`, as the first of two."""
    x, axes = product.x, product.axes
    row = lax.transpose(x, [*axes.x_free(x.ndim), *axes.x_contract])
    row = row.reshape(1, *(x.shape[axis] for axis in axes.x_contract))
    both = lax.pad(row, jnp.zeros((), x.dtype), [(0, 1, 0), *[(0, 0, 0)] * (row.ndim - 1)])
    axes = axes._replace(x_contract=tuple(range(1, both.ndim)))
    return in_form(product.replace(x=both, axes=axes), form)[0].reshape(product.shape)


def _product(product: Product, scale: Leaf | None, operands: Any, form: Form) -> Array:
    """The product with the values of `w`, times `scale` if there is one; operands are of dtype `operands`.

    Several elements of a packed axis lie in one stored number. Rather than bringing them in order, which
    costs more than decoding them, the other side is taken apart in the same way: the input, or
    afterwards the output.
    """
    x, w, axes, packing = product.x, product.w, product.axes, product.w.packing
    dot = functools.partial(_dot, product, operands, form)
    repeated = _repeat_in_two_steps if form.for_tpu else repeat
    dtype = operands if scale is None else product.accumulate
    axis = -1 if packing is None else packing.axis % w.ndim
    if packing is None or axis in axes.w_batch:
        values = w.values(dtype)
        if scale is None:
            return dot(x, values)
        for i, tile in enumerate(scale.tiles):
            if form.for_tpu and not scale.is_constant_along(i):
                array = repeated(scale.array, tile.size, i, scale.shape[i])
                scale = scale.with_axis(i, array, UNIT, scale.shape[i])
        return dot(x, values * broadcastable(scale).astype(dtype))
    if form.for_tpu and has_sixteen_levels(w):
        planes = _planes_of_levels(w, dtype)
    else:
        planes = [w.plane(i, dtype) for i in range(packing.elements)]
    if scale is not None:
        scales = _scale_planes(scale, packing, repeated)
        planes = [v * s.astype(dtype) for v, s in zip(planes, scales, strict=True)]
    apart = product.inputs <= w.size * FEW_INPUTS  # or side by side
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


def _dot(product: Product, operands: Any, form: Form, x: Array, values: Array) -> Array:
    axes = product.axes
    options: Any = dict(precision=product.precision, preferred_element_type=product.accumulate)
    x, values = x.astype(operands), values.astype(operands)
    if form.isolated:
        x, values = _compat.optimization_barrier((x, values))
    (xc, wc), (xb, wb) = axes.dimension_numbers
    if form.weight_first:
        y = lax.dot_general(values, x, ((wc, xc), (wb, xb)), **options)
    else:
        y = lax.dot_general(x, values, axes.dimension_numbers, **options)
    if form.isolated:
        y = _compat.optimization_barrier(y)
    if not form.weight_first:
        return y
    batch, outputs = len(wb), y.ndim - len(axes.x_free(x.ndim))
    return lax.transpose(y, [*range(batch), *range(outputs, y.ndim), *range(batch, outputs)])


def _planes_of_levels(w: AbstractScaledArray, dtype: Any) -> Sequence[Array]:
    """The planes of two of sixteen levels in each byte, chosen bit by bit."""
    stored, levels = w.payload_leaf.array, w.codebook or ()
    planes = [_selected(codes, levels, dtype) for codes in (stored >> 4, stored & 15)]
    return planes if high_half_first(w) else planes[::-1]


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
        plane = to_elements(scale, others)
    elif not rest:  # whole tiles of the payload share a scale
        plane = repeat(
            to_elements(scale, others), per_tile * packing.tile.stored, axis, packing.stored
        )
    else:
        return packing.split(to_elements(scale, [*others, axis]))
    return [plane] * packing.elements
