"""Primitives that have no packed form: the dense answer, and it is said that it was made dense.

`DENSE_PROGRAMS` has a program for each; `NO_QUANTIZED_OPERAND` says why the others have none.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


_UNARY = (
    "abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf "
    "erf_inv erfc exp exp2 expm1 floor is_finite lgamma log log1p logistic real imag round rsqrt "
    "sign sin sinh sqrt square tan tanh"
).split()
_BINARY = "add sub mul div rem max min pow atan2 nextafter eq ne lt le gt ge complex".split()


def _unary(name, x):
    return getattr(lax, name)(x)


def _binary(name, x):
    return getattr(lax, name)(x, x)


def _positive(x):
    return jnp.clip(jnp.abs(x), 0.01, 0.99).astype(x.dtype)


DENSE_PROGRAMS: dict[str, Callable[[Any], Any]] = {
    **{name: partial(_unary, name) for name in _UNARY},
    **{name: partial(_binary, name) for name in _BINARY},
    "imag": lambda x: lax.imag(x.astype(jnp.complex64)),
    "real": lambda x: lax.real(x.astype(jnp.complex64)),
    "conj": lambda x: lax.conj(x.astype(jnp.complex64)),
    "round": lambda x: lax.round(x),
    "log2": lambda x: jnp.log2(x),
    "clamp": lambda x: lax.clamp(jnp.asarray(-1, x.dtype), x, jnp.asarray(1, x.dtype)),
    "integer_pow": lambda x: lax.integer_pow(x, 3),
    "reduce_precision": lambda x: lax.reduce_precision(x, 5, 4),
    "igamma": lambda x: lax.igamma(_positive(x), x),
    "igammac": lambda x: lax.igammac(_positive(x), x),
    "igamma_grad_a": lambda x: lax.igamma_grad_a(_positive(x), x),
    "polygamma": lambda x: lax.polygamma(jnp.ones_like(x), x),
    "zeta": lambda x: lax.zeta(x, _positive(x)),
    "regularized_incomplete_beta": lambda x: lax.betainc(_positive(x), _positive(x), x),
    "eq_to": lambda x: lax.eq_to_p.bind(x, x),
    "le_to": lambda x: lax.le_to_p.bind(x, x),
    "lt_to": lambda x: lax.lt_to_p.bind(x, x),
    "bitcast_convert_type": lambda x: lax.bitcast_convert_type(x, jnp.uint8),
    "cumsum": lambda x: lax.cumsum(x, 0),
    "cumprod": lambda x: lax.cumprod(x, 0),
    "cummax": lambda x: lax.cummax(x, 0),
    "cummin": lambda x: lax.cummin(x, 0),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x, 0),
    "sort": lambda x: lax.sort(x),
    "top_k": lambda x: lax.top_k(x, 2),
    "approx_top_k": lambda x: lax.approx_max_k(x, 2),
    "fft": lambda x: lax.fft(x.astype(jnp.complex64), "fft", x.shape[-1:]),
    "reduce": lambda x: lax.reduce(x, jnp.asarray(0, x.dtype), lambda a, b: a + b * 1, (0,)),
    "reduce_window": lambda x: lax.reduce_window(
        x, jnp.asarray(0, x.dtype), lambda a, b: a + b * 1, (1,) * x.ndim, (1,) * x.ndim, "VALID"
    ),
    "reduce_window_sum": lambda x: lax.reduce_window(
        x, 0.0, lax.add, (2,) * x.ndim, (1,) * x.ndim, "SAME"
    ),
    "reduce_window_max": lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (2,) * x.ndim, (1,) * x.ndim, "SAME"
    ),
    "reduce_window_min": lambda x: lax.reduce_window(
        x, jnp.inf, lax.min, (2,) * x.ndim, (1,) * x.ndim, "SAME"
    ),
    "select_and_scatter_add": lambda x: jax.grad(
        lambda x: lax.reduce_window(
            x, -jnp.inf, lax.max, (2,) * x.ndim, (2,) * x.ndim, "SAME"
        ).sum()
    )(x),
    "scatter-add": lambda x: x.at[0].add(1),
    "scatter-sub": lambda x: x.at[0].subtract(1),
    "scatter-mul": lambda x: x.at[0].multiply(2),
    "scatter-min": lambda x: x.at[0].min(0),
    "scatter-max": lambda x: x.at[0].max(0),
    "one_minus_square": lambda x: lax.one_minus_square_p.bind(x),  # pyright: ignore
    "custom_linear_solve": lambda x: lax.custom_linear_solve(
        lambda v: v * (1 + jnp.abs(x)), x, lambda f, b: b / (1 + jnp.abs(x)), symmetric=True
    ),
    "linear_call": lambda x: jax.custom_derivatives.linear_call(
        lambda r, v: r * v, lambda r, ct: r * ct, x, x
    ),
    "cholesky": lambda x: lax.linalg.cholesky(
        x[..., :1, :1].astype(jnp.float32) ** 2 + 1, symmetrize_input=False
    ),
    "while_scalar": lambda x: lax.while_loop(lambda c: c.sum() < 1e6, lambda c: abs(c) * 2 + 1, x),
}
"""By the name of a primitive: a program that makes its operand dense."""

NO_QUANTIZED_OPERAND = {
    "after_all": "tokens only",
    "create_token": "no operands",
    "axis_index": "no operands",
    "iota": "no operands",
    "rng_bit_generator": "integer keys",
    "rng_uniform": "not supported by this backend under every transformation; scalar bounds",
    "and": "integers",
    "or": "integers",
    "xor": "integers",
    "not": "integers",
    "clz": "integers",
    "mulhi": "integers",
    "population_count": "integers",
    "shift_left": "integers",
    "shift_right_arithmetic": "integers",
    "shift_right_logical": "integers",
    "reduce_and": "integers",
    "reduce_or": "integers",
    "reduce_xor": "integers",
    "all_gather": "collective: under shard_map, see test_transformations",
    "all_to_all": "collective",
    "pmax": "collective",
    "pmin": "collective",
    "ppermute": "collective",
    "psum": "collective",
    "ragged_all_to_all": "collective",
    "dce_sink": "no result",
    "stage": "no array semantics",
    "cond": "control flow: see test_transformations",
    "scan": "control flow: see test_transformations",
    "while": "control flow: see test_transformations",
    "sharding_constraint": "see test_sharding",
    "select_and_gather_add": "only made by derivatives of reduce_window",
    "select_and_scatter": "no public function makes it",
    "add_any": "only made by transposition",
    "polynomial": "no public function makes it",
}
"""By the name of a primitive: why it meets no quantized operand, or where it is tested."""
