"""Adapted weights: the base and the factors of an adapter are kept apart.

| operation                                    | an adapted weight                                             |
|----------------------------------------------|---------------------------------------------------------------|
| `dot_general`, `ragged_dot_general`          | three products: with the base, and with each factor           |
| `conv_general_dilated`                       | two convolutions, and a product with the second factor        |
| `slice`, `dynamic_slice`, `rev`, `split`     | stays adapted                                                 |
| `reshape`, `squeeze`, `broadcast_in_dim`     | stays adapted where rows stay rows                            |
| `gather` of entries of a stack, `unstack`    | stays adapted                                                 |
| `gather` of rows, columns, elements          | dense, of the size of the result                              |
| `squeeze` to a row or a column               | dense, of the size of the result                              |
| `transpose` that keeps rows, or of matrices  | stays adapted: of matrices, the factors change places         |
| `concatenate`, `stack` along leading axes    | stays adapted, with adapters of equal rank and scale          |
| cast to a floating-point dtype               | stays adapted                                                 |
| `neg`, `mul`, `div` by a scalar              | stays adapted: base and second factor take it                 |
| all else                                     | dense                                                         |
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .._adapted import AdaptedArray
from .._compat import bind, promote_types
from .._dispatch import apply, register
from .._implicit import is_implicit


def _all(primitive: Any, *operands: Any, **params: Any) -> list[Any]:
    """The results of an equation, whether the base is quantized or not."""
    if any(map(is_implicit, operands)):
        return apply(primitive, operands, params)
    return bind(primitive, operands, params)


def _one(primitive: Any, *operands: Any, **params: Any) -> Any:
    return _all(primitive, *operands, **params)[0]


# ------------------------------------------------------------------------------------ elementwise


@register(lax.convert_element_type_p)
def convert_element_type_adapted(
    primitive: Any, x: AdaptedArray, *, new_dtype: Any, **params: Any
) -> Any:
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return NotImplemented
    return x.replace(casts=(*x.casts, jnp.dtype(new_dtype)))


@register(lax.neg_p)
def neg_adapted(primitive: Any, x: AdaptedArray, **params: Any) -> Any:
    return x.replace(base=_one(primitive, x.base, **params), b=-x.b)


@register(lax.mul_p, lax.div_p)
def mul_adapted_scalar(primitive: Any, x: AdaptedArray, y: Array, **params: Any) -> Any:
    return _by_scalar(primitive, x, y, params)


@register(lax.mul_p)
def mul_scalar_adapted(primitive: Any, x: Array, y: AdaptedArray, **params: Any) -> Any:
    return _by_scalar(primitive, y, x, params)


def _by_scalar(primitive: Any, x: AdaptedArray, scalar: Array, params: dict[str, Any]) -> Any:
    # (W + s B A) c = W c + s (B c) A.
    if scalar.ndim or x.casts or scalar.dtype != x.dtype or params.get("out_dtype") is not None:
        return NotImplemented
    b = x.b.astype(promote_types(x.b.dtype, jnp.float32))
    base = _one(primitive, x.base, scalar, **params)
    return x.replace(base=base, b=primitive.bind(b, scalar.astype(b.dtype), **params))


# ------------------------------------------------------------------------------------- structural


@register(lax.transpose_p)
def transpose_adapted(primitive: Any, x: AdaptedArray, *, permutation: Any, **params: Any) -> Any:
    out, n = x.out_axis, len(permutation)
    rows_stay = permutation[out] == out
    if any(axis >= out for axis in permutation[:out]) or (x.window_axes and not rows_stay):
        return NotImplemented
    base = _one(primitive, x.base, permutation=permutation, **params)
    if rows_stay:
        a = lax.transpose(x.a, permutation)
        return x.replace(base=base, a=a, b=lax.transpose(x.b, (*permutation[: out + 1], out + 1)))
    # (W + s B A)^T = W^T + s A^T B^T.
    exchanged = (*permutation[:out], n - 1, n - 2)
    return x.replace(base=base, a=lax.transpose(x.b, exchanged), b=lax.transpose(x.a, exchanged))


@register(lax.reshape_p)
def reshape_adapted(
    primitive: Any, x: AdaptedArray, *, new_sizes: Any, dimensions: Any = None, **params: Any
) -> Any:
    if dimensions is not None or params.get("sharding") is not None:
        return NotImplemented
    out, new = x.out_axis, tuple(new_sizes)
    batch, length = math.prod(x.shape[:out]), x.shape[out]
    # Rows stay rows where the axes before one of the same length hold as many elements. Where several do, which are
    # single elements, the one that leaves what a row holds as it was.
    places = [
        axis
        for axis in range(len(new) - 1)
        if new[axis] == length and math.prod(new[:axis]) == batch
    ]
    if not places or 0 in new:
        return NotImplemented
    axis = min(places, key=lambda axis: abs(len(new) - axis - 2 - x.window_axes))
    return x.replace(
        base=_one(primitive, x.base, new_sizes=new_sizes, dimensions=None, **params),
        a=x.a.reshape(*new[:axis], x.rank, *new[axis + 1 :]),
        b=x.b.reshape(*new[: axis + 1], x.rank),
        window_axes=len(new) - axis - 2,
    )


@register(lax.broadcast_in_dim_p)
def broadcast_in_dim_adapted(
    primitive: Any,
    x: AdaptedArray,
    *,
    shape: Any,
    broadcast_dimensions: Any,
    sharding: Any = None,
    **params: Any,
) -> Any:
    if sharding is not None:
        return NotImplemented
    out, to = x.out_axis, broadcast_dimensions
    of_a = (*shape[: to[out]], x.rank, *shape[to[out] + 1 :])
    of_b = (*shape[: to[out] + 1], x.rank)
    numbers = dict(shape=shape, broadcast_dimensions=to, sharding=sharding)
    return x.replace(
        base=_one(primitive, x.base, **numbers, **params),
        a=lax.broadcast_in_dim(x.a, of_a, to),
        b=lax.broadcast_in_dim(x.b, of_b, (*to[: out + 1], to[out] + 1)),
        window_axes=len(shape) - to[out] - 2,
    )


@register(lax.squeeze_p)
def squeeze_adapted(primitive: Any, x: AdaptedArray, *, dimensions: Any, **params: Any) -> Any:
    out, gone = x.out_axis, {axis % x.ndim for axis in dimensions}
    base = _one(primitive, x.base, dimensions=dimensions, **params)
    of_rows = x.window_axes + 1 - sum(axis > out for axis in gone)
    if out not in gone and of_rows:
        return x.replace(
            base=base,
            a=lax.squeeze(x.a, sorted(gone)),
            b=lax.squeeze(x.b, sorted(axis for axis in gone if axis < out)),
            window_axes=of_rows - 1,
        )
    # A row, or a column: used in arithmetic.
    axes, rank = [*range(x.ndim)], x.ndim
    kept = [axis for axis in axes if axis not in gone]
    product = _matrix_product(x.b, x.for_b(axes, rank), x.a, x.for_a(axes, rank), kept)
    return x.summed(base, product)


def _matrix_product(
    b: Array, of_b: list[int], a: Array, of_a: list[int], order: list[int]
) -> Array:
    """$B A$ as an array of the axes in `order`."""
    wide = promote_types(a.dtype, jnp.float32)
    return jnp.einsum(b.astype(wide), of_b, a.astype(wide), of_a, order)


@register(lax.slice_p)
def slice_adapted(
    primitive: Any,
    x: AdaptedArray,
    *,
    start_indices: Any,
    limit_indices: Any,
    strides: Any,
    **params: Any,
) -> Any:
    bounds = dict(start_indices=start_indices, limit_indices=limit_indices, strides=strides)
    starts, limits, steps = start_indices, limit_indices, strides or (1,) * x.ndim
    every = (0, x.rank, 1)
    return x.replace(
        base=_one(primitive, x.base, **bounds, **params),
        a=lax.slice(x.a, *map(x.for_a, (starts, limits, steps), every)),
        b=lax.slice(x.b, *map(x.for_b, (starts, limits, steps), every)),
    )


@register(lax.dynamic_slice_p)
def dynamic_slice_adapted(
    primitive: Any, x: AdaptedArray, *starts: Array, slice_sizes: Any, **params: Any
) -> Any:
    first = jnp.zeros_like(starts[0])
    return x.replace(
        base=_one(primitive, x.base, *starts, slice_sizes=slice_sizes, **params),
        a=lax.dynamic_slice(x.a, x.for_a(starts, first), x.for_a(slice_sizes, x.rank)),
        b=lax.dynamic_slice(x.b, x.for_b(starts, first), x.for_b(slice_sizes, x.rank)),
    )


@register(lax.rev_p)
def rev_adapted(primitive: Any, x: AdaptedArray, *, dimensions: Any, **params: Any) -> Any:
    return x.replace(
        base=_one(primitive, x.base, dimensions=dimensions, **params),
        a=lax.rev(x.a, [axis for axis in dimensions if axis != x.out_axis]),
        b=lax.rev(x.b, [axis for axis in dimensions if axis <= x.out_axis]),
    )


@register("split")
def split_adapted(primitive: Any, x: AdaptedArray, *, sizes: Any, axis: int, **params: Any) -> Any:
    bases = _all(primitive, x.base, sizes=sizes, axis=axis, **params)
    every_a = [x.a] * len(sizes) if axis == x.out_axis else lax.split(x.a, sizes, axis)
    every_b = [x.b] * len(sizes) if axis > x.out_axis else lax.split(x.b, sizes, axis)
    return [
        x.replace(base=base, a=a, b=b) for base, a, b in zip(bases, every_a, every_b, strict=True)
    ]


@register("unstack")
def unstack_adapted(primitive: Any, x: AdaptedArray, *, axis: int, **params: Any) -> Any:
    pieces = split_adapted(lax.split_p, x, sizes=(1,) * x.shape[axis], axis=axis)
    return [squeeze_adapted(lax.squeeze_p, piece, dimensions=(axis,)) for piece in pieces]


@register(lax.concatenate_p)
def concatenate_adapted(
    primitive: Any, *arrays: AdaptedArray, dimension: int, **params: Any
) -> Any:
    # Each matrix of a stack has its factors; rows with other factors would have another rank.
    first = arrays[0]
    facts = {(x.scale, x.dropout_rate, x.casts, x.window_axes, x.rank, x.dtype) for x in arrays}
    if len(facts) > 1 or dimension >= first.out_axis:
        return NotImplemented
    return first.replace(
        base=_one(primitive, *(x.base for x in arrays), dimension=dimension, **params),
        a=jnp.concatenate([x.a for x in arrays], dimension),
        b=jnp.concatenate([x.b for x in arrays], dimension),
    )


@register("stack")
def stack_adapted(primitive: Any, *arrays: AdaptedArray, axis: int, **params: Any) -> Any:
    first = arrays[0]
    if axis > first.out_axis:
        return NotImplemented
    shape = (*first.shape[:axis], 1, *first.shape[axis:])
    to = tuple(i for i in range(len(shape)) if i != axis)
    numbers = dict(shape=shape, broadcast_dimensions=to)
    rows = [broadcast_in_dim_adapted(lax.broadcast_in_dim_p, x, **numbers) for x in arrays]
    return concatenate_adapted(lax.concatenate_p, *rows, dimension=axis)


# ----------------------------------------------------------------------------------------- gather


@register(lax.gather_p)
def gather_adapted(
    primitive: Any,
    x: AdaptedArray,
    indices: Array,
    *,
    dimension_numbers: Any,
    slice_sizes: Any,
    mode: Any,
    **params: Any,
) -> Any:
    """Gathers from each factor along the axes that it has. Where an index is outside, the adapter is 0 and the base
    gives the value that fills."""
    numbers, out = dimension_numbers, x.out_axis
    base = _one(
        primitive,
        x.base,
        indices,
        dimension_numbers=numbers,
        slice_sizes=slice_sizes,
        mode=mode,
        **params,
    )
    fills = lax.GatherScatterMode.from_any(mode) == lax.GatherScatterMode.FILL_OR_DROP
    indexed = {
        axis
        for axis in (*numbers.start_index_map, *numbers.operand_batching_dims)
        if fills or slice_sizes[axis] != x.shape[axis]  # of a whole axis, the start is clamped to 0
    }
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for axis in range(x.ndim) if axis not in dropped]
    # One number for each axis of the result: those of the weight, and behind them those of the indices.
    of_indices = range(x.ndim, x.ndim + indices.ndim - 1)
    window, places = iter(kept), iter(of_indices)
    order = [next(window if i in numbers.offset_dims else places) for i in range(base.ndim)]
    rank = x.ndim + indices.ndim

    def gathered(factor: Array, axes: list[int]) -> tuple[Array, list[int]]:
        """The part of a factor that is needed, and which axes it has."""
        names = [axis for axis in axes if axis not in dropped]
        mine = [axis for axis in axes if axis in indexed]
        sizes = [factor.shape[i] if a == rank else slice_sizes[a] for i, a in enumerate(axes)]
        if not mine:
            needed = lax.slice(factor, [0] * factor.ndim, sizes)
            return lax.squeeze(needed, [i for i, a in enumerate(axes) if a in dropped]), names
        columns = [i for i, axis in enumerate(numbers.start_index_map) if axis in mine]
        pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
        batching = [(axes.index(a), i) for a, i in pairs if a in axes]
        rows = lax.gather(
            factor,
            indices[..., np.asarray(columns, int)],
            lax.GatherDimensionNumbers(
                offset_dims=tuple(len(of_indices) + i for i in range(len(names))),
                collapsed_slice_dims=tuple(
                    axes.index(a) for a in numbers.collapsed_slice_dims if a in axes
                ),
                start_index_map=tuple(axes.index(numbers.start_index_map[i]) for i in columns),
                operand_batching_dims=tuple(axis for axis, _ in batching),
                start_indices_batching_dims=tuple(i for _, i in batching),
            ),
            tuple(sizes),
            mode=mode,
            fill_value=0 if fills else None,
        )
        return rows, [*of_indices, *names]

    every = [*range(x.ndim)]
    (a, of_a), (b, of_b) = gathered(x.a, x.for_a(every, rank)), gathered(x.b, x.for_b(every, rank))
    lengths = dict(zip(order, base.shape, strict=True)) | {rank: x.rank}

    def arranged(part: Array, axes: list[int], wanted: list[int]) -> Array:
        there = [axis for axis in wanted if axis in axes]
        part = lax.transpose(part, [axes.index(axis) for axis in there])
        at = [i for i, axis in enumerate(wanted) if axis in axes]
        return lax.broadcast_in_dim(part, [lengths[axis] for axis in wanted], at)

    batch, matrix = order[: out - x.ndim], every[out:]
    whole = all(axis not in indexed and x.shape[axis] == slice_sizes[axis] for axis in matrix)
    if whole and order[out - x.ndim :] == matrix:
        a = arranged(a, of_a, [*batch, rank, *matrix[1:]])
        return x.replace(base=base, a=a, b=arranged(b, of_b, [*batch, out, rank]))
    there = [axis for axis in order if axis in of_a or axis in of_b]
    return x.summed(base, arranged(_matrix_product(b, of_b, a, of_a, there), there, order))


# --------------------------------------------------------------------------------------- products


@register(lax.dot_general_p)
def dot_general_array_adapted(
    primitive: Any, x: Array, w: AdaptedArray, *, dimension_numbers: Any, **params: Any
) -> Any:
    (xc, wc), (xb, wb) = dimension_numbers
    of_x, free_x, free_w = _names(x, (*xc, *xb), w, (*wc, *wb))
    product = partial(_one, primitive, x, _base(w), dimension_numbers=dimension_numbers)
    return _with_adapter(product, x, of_x, w, [*wb, *free_x, *free_w], params)


@register(lax.dot_general_p)
def dot_general_adapted_array(
    primitive: Any, w: AdaptedArray, x: Array, *, dimension_numbers: Any, **params: Any
) -> Any:
    (wc, xc), (wb, xb) = dimension_numbers
    of_x, free_x, free_w = _names(x, (*xc, *xb), w, (*wc, *wb))
    product = partial(_one, primitive, _base(w), x, dimension_numbers=dimension_numbers)
    return _with_adapter(product, x, of_x, w, [*wb, *free_w, *free_x], params)


def _base(w: AdaptedArray) -> Any:
    """The base in the dtype of the weight."""
    if w.base.dtype == w.dtype:
        return w.base
    cast = dict(new_dtype=w.dtype, weak_type=False, sharding=None)
    return _one(lax.convert_element_type_p, w.base, **cast)


def _names(
    x: Array, axes: Sequence[int], w: AdaptedArray, met: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """A number for each axis of `x`: that of the axis of the weight that it meets, or its own; and which numbers
    of `x`, and of the weight, meet none."""
    meets = dict(zip(axes, met, strict=True))
    of_x = [meets.get(axis, w.ndim + axis) for axis in range(x.ndim)]
    return (
        of_x,
        [name for name in of_x if name not in met],
        [name for name in range(w.ndim) if name not in met],
    )


def _with_adapter(
    product: Callable[..., Array],
    x: Array,
    of_x: list[int],
    w: AdaptedArray,
    order: list[int],
    params: dict[str, Any],
) -> Any:
    """The product with the base, and that with the adapter."""
    if params.get("out_sharding") is not None:
        return NotImplemented
    y = product(**params)
    # x (W + s B A)^T = x W^T + s (x A^T) B^T: first the factor that is summed over.
    rank, every = w.ndim + x.ndim, [*range(w.ndim)]
    a, b = (w.a, w.for_a(every, rank)), (w.b, w.for_b(every, rank))
    (near, of_near), (far, of_far) = (
        (a, b) if any(w.out_axis < i < w.ndim for i in of_x) else (b, a)
    )
    needed = {*order, *of_far}
    between = [name for name in dict.fromkeys([*of_x, *of_near]) if name in needed]
    wide, operand = promote_types(y.dtype, near.dtype), promote_types(x.dtype, near.dtype)
    options: Any = dict(precision=params.get("precision"), preferred_element_type=wide)
    inner = jnp.einsum(x.astype(operand), of_x, near.astype(operand), of_near, between, **options)
    outer = jnp.einsum(inner, between, far.astype(inner.dtype), of_far, order, **options)
    return (y.astype(wide) + w.scale * outer).astype(y.dtype)


@register("ragged_dot_general")
def ragged_dot_general_array_adapted(
    primitive: Any, x: Array, w: AdaptedArray, group_sizes: Array, **params: Any
) -> Any:
    """Rows of `x` times the matrix of their group: `lax.ragged_dot`."""
    numbers = params["ragged_dot_dimension_numbers"]
    (xc, wc), (xb, wb) = numbers.dot_dimension_numbers
    plain = (tuple(xc), tuple(wc), tuple(xb), tuple(wb)) == ((1,), (1,), (), ())
    groups = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
    if (
        not plain
        or groups != ((0,), (0,))
        or w.window_axes
        or params.get("group_offset") is not None
    ):
        return NotImplemented
    y = _one(primitive, x, _base(w), group_sizes, **params)
    wide = promote_types(x.dtype, y.dtype, w.a.dtype)
    params |= dict(preferred_element_type=wide)
    outer = x.astype(wide)
    for factor in (w.b, w.a):  # x (B A) = (x B) A
        outer = _one(primitive, outer, factor.astype(wide), group_sizes, **params)
    return (y.astype(wide) + w.scale * outer).astype(y.dtype)


@register(lax.conv_general_dilated_p)
def conv_general_dilated_array_adapted(
    primitive: Any,
    x: Array,
    w: AdaptedArray,
    *,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    **params: Any,
) -> Any:
    """A convolution with the base, one with $A$, and a product of the channels with $B$."""
    out, into, *_ = dimension_numbers.rhs_spec
    groups = feature_group_count * batch_group_count  # one of them is 1
    forward, backward = (out, into) == (0, 1), (out, into) == (1, 0) and groups == 1
    if w.window_axes != w.ndim - 2 or not (forward or backward):
        return NotImplemented
    if params.get("out_sharding") is not None:
        return NotImplemented
    params |= dict(
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
    )
    y = _one(primitive, x, _base(w), **params)
    wide = promote_types(x.dtype, y.dtype, w.a.dtype)
    x, a, b = (each.astype(wide) for each in (x, w.a, w.b))
    params["preferred_element_type"] = wide
    if forward:
        # x * (B A) = B (x * A), in each group of channels; all groups have the same A.
        inner = primitive.bind(x, jnp.concatenate([a] * groups), **params)
        outer = _mixed(
            inner, b.reshape(groups, len(b) // groups, w.rank), dimension_numbers.out_spec[1]
        )
    else:
        # Back from outputs to inputs, as derivatives go: B first.
        mixed = _mixed(x, b.T[None], dimension_numbers.lhs_spec[1])
        outer = primitive.bind(mixed, a, **params)
    return (y.astype(wide) + w.scale * outer).astype(y.dtype)


def _mixed(x: Array, factor: Array, axis: int) -> Array:
    """The channels of each group times its matrix, of shape (groups, to, from)."""
    groups, to, channels = factor.shape
    split = x.reshape(*x.shape[:axis], groups, channels, *x.shape[axis + 1 :])
    names = [*range(split.ndim)]
    mixed = [*names[: axis + 1], split.ndim, *names[axis + 2 :]]
    y = jnp.einsum(split, names, factor, [axis, split.ndim, axis + 1], mixed)
    return y.reshape(*x.shape[:axis], groups * to, *x.shape[axis + 1 :])
