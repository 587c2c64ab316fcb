"""Elementwise primitives.

| primitive                                        | result                                       |
|--------------------------------------------------|----------------------------------------------|
| `neg`, `mul`, `div` by a scalar                  | packed: the scale takes the factor           |
| `convert_element_type` to a floating-point dtype | packed                                       |
| `copy`, `stop_gradient`, `name`, …               | packed: acts on each leaf                    |
| `optimization_barrier`, `device_put`, …          | packed: acts on each leaf                    |
| `sharding_constraint`, `reshard`                 | packed: payload and scale are split together |
| all other arithmetic, `exp`, `sqrt`, `lt`, …     | dense, as the result has to be               |
"""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jax import Array, lax
from jax.sharding import NamedSharding

from .. import _compat
from .._array import QuantizedArray
from .._compat import promote_types
from .._daylight import report_materialized
from .._dispatch import register, transparent
from .._implicit_array import as_dense, ImplicitArray
from .._scaled import AbstractScaledArray, cast
from .._transposed import ColumnMajor


_ON_EACH_LEAF = ("copy", "copy_p", "stop_gradient", "name", "pvary", "pcast")
_ARITHMETIC = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp "
    "clz complex conj convert_element_type cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt "
    "igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p log2 logistic "
    "lt lt_to max min mul mulhi ne neg nextafter not one_minus_square or polygamma polynomial "
    "population_count pow real reduce_precision regularized_incomplete_beta rem round rsqrt "
    "shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh "
    "xor zeta"
).split()


# ------------------------------------------------------------------------------- dense results


@register(*_ARITHMETIC)
@transparent
def elementwise_dense(primitive: Any, *operands: QuantizedArray | Array, **params: Any) -> Any:
    """The result has a value of its own for each element: it is dense, and so is the weight."""
    report_materialized(primitive.name, operands, "Elementwise arithmetic")
    return _compat.bind(primitive, [as_dense(x) for x in operands], params)[0]


# ------------------------------------------------------------------------------ packed results


@register(lax.neg_p)
def neg_scaled(primitive: Any, x: AbstractScaledArray, **params: Any) -> Any:
    # -(s q) = (-s) q, exactly.
    return _rescaled(x, lambda scale: -scale)


@register(lax.mul_p)
def mul_scaled_scalar(primitive: Any, x: AbstractScaledArray, y: Array, **params: Any) -> Any:
    # (s q) c = (s c) q: a scalar goes to the scale.
    return _by_scalar(primitive, x, y, params)


@register(lax.mul_p)
def mul_scalar_scaled(primitive: Any, x: Array, y: AbstractScaledArray, **params: Any) -> Any:
    return _by_scalar(primitive, y, x, params)


@register(lax.div_p)
def div_scaled_scalar(primitive: Any, x: AbstractScaledArray, y: Array, **params: Any) -> Any:
    return _by_scalar(primitive, x, y, params)


def _by_scalar(primitive: Any, x: AbstractScaledArray, scalar: Array, params: Any) -> Any:
    result_dtype = params.get("out_dtype") or params.get("preferred_element_type")
    plain = scalar.dtype == x.dtype and jnp.issubdtype(x.dtype, jnp.floating)
    if scalar.ndim or not plain or result_dtype not in (None, x.dtype):
        return NotImplemented

    def change(scale: Array) -> Array:
        # In float16 it would lose digits.
        scale = scale.astype(promote_types(scale.dtype, jnp.float32))
        return primitive.bind(scale, scalar.astype(scale.dtype), **params)

    return _rescaled(x, change)


def _rescaled(x: AbstractScaledArray, change: Any) -> Any:
    changed = None if x.casts else x.with_multiplied(change)
    return NotImplemented if changed is None else changed


@register(lax.convert_element_type_p)
def convert_element_type_scaled(
    primitive: Any, x: AbstractScaledArray, *, new_dtype: Any, **params: Any
) -> Any:
    if not jnp.issubdtype(new_dtype, jnp.floating) or jnp.dtype(new_dtype).itemsize < 2:
        return NotImplemented
    dtype, casts = cast(x, new_dtype)
    return x.with_dtype(dtype, casts)


@register(lax.reduce_precision_p)
def reduce_precision_any(
    primitive: Any, x: QuantizedArray, *, exponent_bits: int, mantissa_bits: int, **params: Any
) -> Any:
    """To the precision that `x` has: how `jax.checkpoint` marks what its policy saves."""
    dtype = jnp.finfo(x.dtype)
    keeps_all = exponent_bits >= dtype.nexp and mantissa_bits >= dtype.nmant
    return x if keeps_all else NotImplemented


@register(*_ON_EACH_LEAF)
def pass_through_any(primitive: Any, x: ImplicitArray, **params: Any) -> Any:
    """Primitives that do not look at values act on each leaf."""
    return jtu.tree_map(lambda leaf: _compat.bind(primitive, [leaf], params)[0], x)


@register(lax.optimization_barrier_p)
def optimization_barrier_any(primitive: Any, *xs: QuantizedArray | Array, **params: Any) -> Any:
    return lax.optimization_barrier(list(xs))


@register(lax.sharding_constraint_p, "reshard")
def sharding_constraint_scaled(primitive: Any, x: AbstractScaledArray, **params: Any) -> Any:
    sharding = params["sharding"] if "sharding" in params else params["dst_sharding"]
    if not isinstance(sharding, NamedSharding):
        return NotImplemented
    return x.with_sharding(sharding)


@register(lax.device_put_p)
def device_put_any(primitive: Any, *xs: QuantizedArray | Array, **params: Any) -> Any:
    out = []
    for x, device, source, copy in zip(
        xs, params["devices"], params["srcs"], params["copy_semantics"], strict=True
    ):
        if isinstance(x, AbstractScaledArray | ColumnMajor) and isinstance(device, NamedSharding):
            out.append(x.with_sharding(device))
        else:
            each = dict(params, devices=(device,), srcs=(source,), copy_semantics=(copy,))
            out.append(jtu.tree_map(lambda leaf: _compat.bind(primitive, [leaf], each)[0], x))  # noqa: B023
    return out
