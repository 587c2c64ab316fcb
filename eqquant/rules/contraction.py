"""Contractions: products and reductions that read the packed leaves and never hold the matrix.

| primitive              | operands                     | how                                            |
|------------------------|------------------------------|------------------------------------------------|
| `dot_general`          | one quantized, either side   | `kernels.quantized_dot_general`                |
| `dot_general`          | both quantized               | the smaller one is made dense                  |
| `ragged_dot_general`   | groups of quantized matrices | `kernels.quantized_ragged_dot`                 |
| `conv_general_dilated` | quantized kernel             | `kernels.convolve`                             |
| `reduce_sum`, `max`, … | quantized                    | decoded inside the reduction, in one pass      |
| `reduce` by a function | quantized                    | dense                                          |
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._array import QuantizedArray
from .._daylight import dense_nbytes, report_materialized
from .._dispatch import apply, densify, register, transparent
from .._scaled import AbstractScaledArray
from .._transposed import ColumnMajor, TransposedView
from ..kernels import convolve, quantized_dot_general, quantized_ragged_dot


# ---------------------------------------------------------------------------------- dot_general


@register(lax.dot_general_p)
def dot_general_array_scaled(
    primitive: Any, x: Array, w: AbstractScaledArray, *, dimension_numbers: Any, **params: Any
) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return NotImplemented
    return quantized_dot_general(x, w, dimension_numbers, **params)


@register(lax.dot_general_p)
def dot_general_scaled_array(
    primitive: Any, w: AbstractScaledArray, x: Array, *, dimension_numbers: Any, **params: Any
) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return NotImplemented
    (wc, xc), (wb, xb) = dimension_numbers
    if params.get("out_sharding") is not None:
        return NotImplemented
    y = quantized_dot_general(x, w, ((xc, wc), (xb, wb)), **params)
    # y has the batch axes, the free axes of x, those of w; the last two groups change places.
    batch, x_free = len(xb), x.ndim - len(xb) - len(xc)
    moved = [*range(batch), *range(batch + x_free, y.ndim), *range(batch, batch + x_free)]
    return lax.transpose(y, moved)


@register(lax.dot_general_p)
def dot_general_array_view(
    primitive: Any, x: Array, w: TransposedView, *, dimension_numbers: Any, **params: Any
) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.floating) or params.get("out_sharding") is not None:
        return NotImplemented
    (xc, wc), (xb, wb) = dimension_numbers
    stored = w.permutation
    y = quantized_dot_general(
        x, w.array, ((xc, [stored[a] for a in wc]), (xb, [stored[a] for a in wb])), **params
    )
    # The free axes of w come in stored order; put them in the order of the view.
    free = [stored[a] for a in range(len(stored)) if a not in (*wc, *wb)]
    first = y.ndim - len(free)
    return lax.transpose(y, [*range(first), *(first + sorted(free).index(a) for a in free)])


@register(lax.dot_general_p)
def dot_general_view_array(
    primitive: Any, w: TransposedView, x: Array, *, dimension_numbers: Any, **params: Any
) -> Any:
    (wc, xc), (wb, xb) = dimension_numbers
    y = dot_general_array_view(primitive, x, w, dimension_numbers=((xc, wc), (xb, wb)), **params)
    if y is NotImplemented:
        return NotImplemented
    batch, x_free = len(xb), x.ndim - len(xb) - len(xc)
    moved = [*range(batch), *range(batch + x_free, y.ndim), *range(batch, batch + x_free)]
    return lax.transpose(y, moved)


@register(lax.dot_general_p)
@transparent
def dot_general_array_column_major(primitive: Any, x: Array, w: ColumnMajor, **params: Any) -> Any:
    return apply(primitive, [x, w.view], params)[0]


@register(lax.dot_general_p)
@transparent
def dot_general_column_major_array(primitive: Any, w: ColumnMajor, x: Array, **params: Any) -> Any:
    return apply(primitive, [w.view, x], params)[0]


@register(lax.dot_general_p)
@transparent
def dot_general_both(primitive: Any, x: QuantizedArray, y: QuantizedArray, **params: Any) -> Any:
    """Of two quantized operands, the smaller plays the activation."""
    smaller, x_is_smaller = (x, True) if dense_nbytes(x) <= dense_nbytes(y) else (y, False)
    report_materialized(primitive.name, [smaller])
    dense = smaller.materialize()
    return apply(primitive, (dense, y) if x_is_smaller else (x, dense), params)[0]


@register("ragged_dot_general")
def ragged_dot_general_array_scaled(
    primitive: Any, x: Array, w: AbstractScaledArray, group_sizes: Array, **params: Any
) -> Any:
    """Rows of `x` times the matrix of their group: `lax.ragged_dot`."""
    numbers = params["ragged_dot_dimension_numbers"]
    plain = (((1,), (1,)), ((), ()))
    if (
        _as_tuples(numbers.dot_dimension_numbers) != plain
        or tuple(numbers.lhs_ragged_dimensions) != (0,)
        or tuple(numbers.rhs_group_dimensions) != (0,)
        or params.get("group_offset") is not None
        or group_sizes.ndim != 1
        or w.payload_leaf.is_packed_along(0)
        or not jnp.issubdtype(x.dtype, jnp.floating)
    ):
        return NotImplemented
    return quantized_ragged_dot(
        x, w, group_sizes, params["precision"], params["preferred_element_type"]
    )


def _as_tuples(numbers: Any) -> Any:
    return tuple(tuple(tuple(map(int, axes)) for axes in pair) for pair in numbers)


# --------------------------------------------------------------------------------- convolution


@register(lax.conv_general_dilated_p)
def conv_general_dilated_array_scaled(
    primitive: Any, x: Array, w: AbstractScaledArray, *, dimension_numbers: Any, **params: Any
) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return NotImplemented
    return convolve(x, w, dimension_numbers=dimension_numbers, **params)


# ---------------------------------------------------------------------------------- reductions


@register(
    lax.reduce_sum_p,
    lax.reduce_max_p,
    lax.reduce_min_p,
    lax.reduce_prod_p,
    lax.argmax_p,
    lax.argmin_p,
)
def reduce_scaled(primitive: Any, x: AbstractScaledArray, **params: Any) -> Any:
    """Decoding is elementwise, so XLA does it inside the reduction."""
    return _decode_and_reduce(primitive, tuple(params.items()))(x)


@functools.lru_cache(maxsize=256)
def _decode_and_reduce(primitive: Any, params: Any) -> Callable[..., Array]:
    """One function for each reduction, so that it is compiled once."""

    def decode_and_reduce(x: AbstractScaledArray) -> Array:
        return primitive.bind(x.materialize(), **dict(params))

    decode_and_reduce.__name__ = f"{primitive.name}_quantized"
    return jax.jit(decode_and_reduce)


@register(lax.reduce_p)
@transparent
def reduce_dense(primitive: Any, *operands: QuantizedArray | Array, **params: Any) -> Any:
    """A reduction by a function of the user's."""
    return densify(primitive, operands, params)
