"""The primitive `quantized_dot_general`: linear in `x`, so its residuals are the packed leaves.

Which implementation runs is decided when it is lowered, for each platform.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import Array, lax

from .. import _compat
from .._compat import ad, batching, mlir
from .._daylight import note_kernel
from .._dispatch import preferred_implementation
from .._scaled import AbstractScaledArray
from ..tiles import spread
from .matmul.choice import check, check_lowering, check_name, choose, computes, IMPLEMENTATIONS
from .matmul.integer import DIGITS, rounded_rows
from .matmul.reference import Axes


quantized_dot_general_p = _compat.Primitive("quantized_dot_general")
"""Operands: `x`, then the leaves of `w`. Parameters: the treedef of `w`, those of `lax.dot_general`,
how many 8-bit digits the rows of `x` have, if they are integers up to a factor, the name of the
implementation, or None, and that of the preferred one, or None. Result: batch axes, free axes of `x`, free axes of `w`."""


def quantized_dot_general(
    x: Array,
    w: AbstractScaledArray,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    implementation: str | None = None,
) -> Array:
    """`lax.dot_general(x, w.materialize(), ...)` without the dense weight.

    **Arguments:**

    - `x`: a floating-point array. If `w.activations` is `"int8"`, it is rounded: the numbers that are
        summed up together share a scale, the largest magnitude over 127.
    - `w`: the quantized operand; all others as in `jax.lax.dot_general`.
    - `implementation`: by default the one that serves best where the program runs, or that
        [`implicit`][eqquant.implicit] was given. One of them by name,
        `"reference"`, `"fused"`, `"tiled"`, `"integer"`, `"tables"`, `"gpu"` or `"tpu"`, also computes
        the derivative in `x`, where it can.

    **Returns:** an array of the shape and dtype that `jax.lax.dot_general` gives. Sums are
    accumulated in float32 (float64 if an operand is).

    **Raises:** `ValueError` if there is no implementation of that name, or if it does not compute this
    product or does not run where the program is compiled for.

    !!! example

        ```python
        import jax.numpy as jnp
        import eqquant as eqq
        from eqquant.kernels import quantized_dot_general

        w = eqq.Array8B.quantize(jnp.ones((3, 4)))
        y = quantized_dot_general(jnp.ones((2, 4)), w, (((1,), (1,)), ((), ())))
        assert y.shape == (2, 3)
        ```
    """
    leaves, treedef = jtu.tree_flatten(w)
    axes, digits = Axes.of(dimension_numbers), DIGITS
    out_dtype = _out_dtype(x, w, preferred_element_type)
    explicit = _compat.has_explicit_axes(x, *leaves)
    preferred = preferred_implementation()
    check_name(preferred)
    if implementation is not None:
        check(implementation, x, w, axes, _accumulate_dtype(x, w, out_dtype))
        if explicit:
            raise ValueError(
                f"implementation={implementation!r} cannot be asked for with explicit mesh axes, where XLA's "
                "own product is used; leave it out."
            )
    if w.activations == "int8":
        x, digits = rounded_rows(x, axes.x_contract), 1
    params = dict(treedef=treedef, axes=axes, precision=precision, out_dtype=out_dtype)
    if explicit:
        # Shardings are part of the types here: let JAX's own dot check and propagate them.
        return jax.checkpoint(partial(_explicit, **params, out_sharding=out_sharding))(x, *leaves)
    accumulate = _accumulate_dtype(x, w, out_dtype)
    how: dict[str, Any] = dict(digits=digits, preferred=preferred)
    note_kernel(lambda platform: implementation or choose(platform, x, w, axes, accumulate, **how))
    params |= how | dict(implementation=implementation)
    return quantized_dot_general_p.bind(x, *leaves, **params)


def _out_dtype(x: Any, w: Any, preferred: Any) -> Any:
    return jnp.dtype(jnp.promote_types(x.dtype, w.dtype) if preferred is None else preferred)


def _accumulate_dtype(x: Any, w: Any, out_dtype: Any) -> Any:
    double = jnp.float64 in (x.dtype, w.dtype, out_dtype)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def _compute(
    x: Array,
    *leaves: Array,
    treedef: Any,
    axes: Axes,
    precision: Any,
    out_dtype: Any,
    digits: int,
    implementation: str | None,
    preferred: str | None,
    platform: str | None = None,
    plain: bool = True,
) -> Array:
    w = jtu.tree_unflatten(treedef, leaves).expanded()
    accumulate = _accumulate_dtype(x, w, out_dtype)
    if implementation is not None:
        check(implementation, x, w, axes, accumulate)  # vmap may have added axes
    how: dict[str, Any] = dict(digits=digits, preferred=preferred, plain=plain)
    name = implementation or choose(platform, x, w, axes, accumulate, **how)
    options: dict[str, Any] = dict(axes=axes, precision=precision, accumulate=accumulate)
    if name == "integer":
        options["digits"] = digits
    if name == "fused":
        options["half"] = platform != "cpu"  # where XLA cannot multiply bfloat16 in every layout
        options["for_tpu"] = platform == "tpu"
    if name == "gpu":
        options["device"] = _compat.gpu_kind()
    with jax.named_scope(f"quantized_dot_general_{name}"):
        return IMPLEMENTATIONS[name](x, w, **options).astype(out_dtype)


def _explicit(
    x: Array,
    *leaves: Array,
    treedef: Any,
    axes: Axes,
    precision: Any,
    out_dtype: Any,
    out_sharding: Any,
) -> Array:
    w = jtu.tree_unflatten(treedef, leaves)
    accumulate = _accumulate_dtype(x, w, out_dtype)
    scale = None if w.scale_leaf is None else spread(w.scale_leaf).astype(accumulate)
    values = w.values(accumulate)
    return lax.dot_general(
        x.astype(accumulate),
        values if scale is None else values * scale,
        axes.dimension_numbers,
        precision=precision,
        preferred_element_type=out_dtype,
        out_sharding=out_sharding,
    )


# ------------------------------------------------------------------------ types and lowering


@quantized_dot_general_p.def_abstract_eval
def _abstract(
    x: Any, *leaves: Any, treedef: Any, axes: Axes, precision: Any, out_dtype: Any, **params: Any
) -> Any:
    w = jtu.tree_unflatten(treedef, leaves)
    payload: Any = w.payload_leaf.array
    w_aval = payload.update(shape=w.shape, dtype=x.dtype, weak_type=False)
    return _compat.output_aval(
        lax.dot_general_p,
        x,
        w_aval,
        dimension_numbers=axes.dimension_numbers,
        precision=precision,
        preferred_element_type=out_dtype,
        out_sharding=None,
    )


quantized_dot_general_p.def_impl(partial(_compat.apply_primitive, quantized_dot_general_p))


def _lower_for(platform: str | None) -> Any:
    def lower(ctx: Any, *operands: Any, implementation: str | None, **params: Any) -> Any:
        plain = _compat.is_partitioned(ctx)
        if platform == "cuda":
            plain = plain or not _compat.takes_triton(ctx)
        if platform == "tpu":
            plain = plain or not _compat.looks_up_rows()
        if implementation is not None:
            check_lowering(implementation, platform, plain)
        run = partial(_compute, implementation=implementation, platform=platform, plain=plain)
        with _compat.triton_without_warning():
            return mlir.lower_fun(run, multiple_results=False)(ctx, *operands, **params)

    return lower


mlir.register_lowering(quantized_dot_general_p, _lower_for(None))
for _platform in ("cpu", "cuda", "tpu"):
    mlir.register_lowering(quantized_dot_general_p, _lower_for(_platform), platform=_platform)


# --------------------------------------------------------------------------- transformations


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    x, *leaves = primals
    x_dot, *leaves_dot = tangents
    y = quantized_dot_general_p.bind(x, *leaves, **params)
    params["digits"] = DIGITS  # of tangents
    of_scales: dict[str, Any] = params | dict(implementation="tiled")
    terms = []
    if type(x_dot) is not ad.Zero:
        terms.append(quantized_dot_general_p.bind(x_dot, *leaves, **params))
    moving = [i for i, t in enumerate(leaves_dot) if type(t) is not ad.Zero]
    if moving:  # scales are being differentiated

        def of_moving(*values: Array) -> Array:
            filled = list(leaves)
            for i, value in zip(moving, values, strict=True):
                filled[i] = value
            return _compute(x, *filled, **of_scales)

        _, y_dot = jax.jvp(of_moving, [leaves[i] for i in moving], [leaves_dot[i] for i in moving])
        terms.append(y_dot)
    if not terms:
        return y, ad.Zero.from_primal_value(y)  # pyright: ignore[reportAttributeAccessIssue]
    return y, terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _transpose(
    ct: Any,
    x: Any,
    *leaves: Any,
    treedef: Any,
    axes: Axes,
    precision: Any,
    out_dtype: Any,
    digits: int,
    implementation: str | None,
    preferred: str | None,
) -> list[Any]:
    nothing = [None] * len(leaves)
    if type(ct) is ad.Zero:
        return [None, *nothing]
    if not ad.is_undefined_primal(x):
        return [None, *_transpose_leaves(ct, x, leaves, treedef, axes, precision, out_dtype)]
    x_aval = x.aval
    w = jtu.tree_unflatten(treedef, leaves)
    x_free, w_free = axes.x_free(x_aval.ndim), axes.w_free(w.ndim)
    n_batch, n_free = len(axes.x_batch), len(x_free)
    # y[b, f, o] = sum_k x[b, f, k] w[b, o, k], so ct_x[b, f, k] = sum_o ct[b, f, o] w[b, o, k].
    back = Axes(
        tuple(range(n_batch + n_free, ct.ndim)), tuple(w_free), tuple(range(n_batch)), axes.w_batch
    )
    accumulate = _accumulate_dtype(ct, w, x_aval.dtype)
    if implementation is not None and not computes(implementation, ct, w, back, accumulate):
        implementation = None
    ct_x = quantized_dot_general_p.bind(
        ct,
        *leaves,
        treedef=treedef,
        axes=back,
        precision=precision,
        out_dtype=x_aval.dtype,
        digits=DIGITS,
        implementation=implementation,
        preferred=preferred,
    )
    of_w = dict(zip(axes.w_contract, axes.x_contract, strict=True))
    order = [*axes.x_batch, *x_free, *(of_w[axis] for axis in sorted(axes.w_contract))]
    ct_x = lax.transpose(ct_x, [order.index(axis) for axis in range(x_aval.ndim)])
    return [ct_x, *nothing]


def _transpose_leaves(
    ct: Any, x: Any, leaves: Sequence[Any], treedef: Any, axes: Axes, precision: Any, out_dtype: Any
) -> list[Any]:
    """The product is linear in the scale too, where a tangent of a scale takes its place."""
    linear = [i for i, leaf in enumerate(leaves) if ad.is_undefined_primal(leaf)]

    def of_linear(*values: Array) -> Array:
        filled = list(leaves)
        for i, value in zip(linear, values, strict=True):
            filled[i] = value
        return _compute(
            x,
            *filled,
            treedef=treedef,
            axes=axes,
            precision=precision,
            out_dtype=out_dtype,
            digits=DIGITS,
            implementation="tiled",
            preferred=None,
        )

    zeros = [jnp.zeros(leaves[i].aval.shape, leaves[i].aval.dtype) for i in linear]
    found = iter(jax.vjp(of_linear, *zeros)[1](ct))
    return [next(found) if i in linear else None for i in range(len(leaves))]


def _batch(
    operands: Sequence[Any], dims: Sequence[Any], *, treedef: Any, axes: Axes, **params: Any
) -> tuple[Any, int]:
    (x, *leaves), (x_dim, *leaf_dims) = operands, dims
    unmapped = None
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not unmapped)
    w_is_mapped = any(d is not unmapped for d in leaf_dims)
    if x_dim is not unmapped:
        x = jnp.moveaxis(x, x_dim, 0)
    if w_is_mapped:
        leaves = [
            jnp.broadcast_to(leaf, (size, *leaf.shape))
            if dim is unmapped
            else jnp.moveaxis(leaf, dim, 0)
            for leaf, dim in zip(leaves, leaf_dims, strict=True)
        ]

    def shift(axes: tuple[int, ...], by: int) -> tuple[int, ...]:
        return tuple(axis + by for axis in axes)

    by_x, by_w = int(x_dim is not unmapped), int(w_is_mapped)
    both = bool(by_x and by_w)
    new = Axes(
        shift(axes.x_contract, by_x),
        shift(axes.w_contract, by_w),
        (0,) * both + shift(axes.x_batch, by_x),
        (0,) * both + shift(axes.w_batch, by_w),
    )
    y = quantized_dot_general_p.bind(x, *leaves, treedef=treedef, axes=new, **params)
    if both:
        return y, 0
    # The new axis is the first free one of its operand.
    n_batch = len(axes.x_batch)
    return y, n_batch if by_x else x.ndim - len(axes.x_contract)


ad.primitive_jvps[quantized_dot_general_p] = _jvp
ad.primitive_transposes[quantized_dot_general_p] = _transpose
batching.primitive_batchers[quantized_dot_general_p] = _batch
