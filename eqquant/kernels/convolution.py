"""The primitive `quantized_convolution`: linear in `x`, so its residuals are the packed leaves.

Its transpose is the convolution with the reversed kernel, which is packed too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import Array, lax

from .. import _compat, tiles
from .._compat import ad, batching, mlir
from .._scaled import AbstractScaledArray
from .dot_general import quantized_dot_general
from .pieces import by_pieces, rows_per_piece


SMALL_BYTES = 128 << 10
PIECES = 12

quantized_convolution_p = _compat.Primitive("quantized_convolution")
"""Operands: `x`, then the leaves of `w`. Parameters: the treedef of `w`, whether its spatial axes
are reversed, the dtype of the result, and those of `lax.conv_general_dilated`."""


def convolve(
    x: Array,
    w: AbstractScaledArray,
    *,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    **params: Any,
) -> Array:
    """`lax.conv_general_dilated(x, w.materialize(), ...)`, without the dense kernel if it is large.

    A kernel that is small, or whose channels are grouped, is decoded as a whole, but never saved
    for the backward pass. With a large one that spans a single point, this is a product of matrices.

    **Arguments:**

    - `x`: a floating-point array.
    - `w`: the quantized kernel. All others are the parameters of the JAX primitive.

    **Returns:** an array of the shape and dtype that `lax.conv_general_dilated` gives. Sums are
    accumulated in float32 (float64 if an operand is).

    !!! example

        ```python
        import jax.numpy as jnp
        from jax import lax
        import eqquant as eqq
        from eqquant.kernels import convolve

        x = jnp.ones((1, 3, 16, 16))
        w = eqq.Array8B.quantize(jnp.ones((8, 3, 3, 3)), axis=(1, 2, 3))
        y = convolve(
            x, w, window_strides=(1, 1), padding=((1, 1), (1, 1)),
            lhs_dilation=(1, 1), rhs_dilation=(1, 1),
            dimension_numbers=lax.conv_dimension_numbers(x.shape, w.shape, None),
            feature_group_count=1, batch_group_count=1, precision=None,
        )
        assert y.shape == (1, 8, 16, 16)
        ```
    """
    leaves, treedef = jtu.tree_flatten(w)
    out_dtype = jnp.dtype(preferred_element_type or jnp.promote_types(x.dtype, w.dtype))
    params |= dict(reverse=False, out_dtype=out_dtype)
    grouped = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
    small = w.size * out_dtype.itemsize <= SMALL_BYTES
    if grouped or small or _compat.has_explicit_axes(x, *leaves):
        return jax.checkpoint(partial(_whole, out_sharding=out_sharding, **params))(x, w)
    if _spans_a_point(w, **params):
        return _product(x, w, **params)
    return quantized_convolution_p.bind(x, *leaves, treedef=treedef, **params)


def _spans_a_point(
    w: AbstractScaledArray, *, dimension_numbers: Any, padding: Any, lhs_dilation: Any, **_: Any
) -> bool:
    """Whether the convolution only mixes channels: a product, along an axis that can be summed over alone."""
    spatial = dimension_numbers.rhs_spec[2:]
    return (
        all(w.shape[axis] == 1 and not w.payload_leaf.is_packed_along(axis) for axis in spatial)
        and all(edge == (0, 0) for edge in map(tuple, padding))
        and all(step == 1 for step in lhs_dilation)
        and w.activations == "float"  # a product would round them
    )


def _product(
    x: Array,
    w: AbstractScaledArray,
    *,
    dimension_numbers: Any,
    window_strides: Sequence[int],
    precision: Any,
    out_dtype: Any,
    **_: Any,
) -> Array:
    r"""As `_whole`, where the kernel spans a point: $y_{no} = \sum_i x_{ni} w_{oi}$ at each point."""
    (n, c, *points), (out, into, *spatial), y_spec = dimension_numbers
    for axis, step in zip(points, window_strides, strict=True):
        x = lax.slice_in_dim(x, 0, None, step, axis)
    leaves = w.expanded().leaves()
    for axis in sorted(spatial, reverse=True):
        leaves = {name: tiles.remove_axis(leaf, axis) for name, leaf in leaves.items()}
    contract = (((c,), (int(into > out),)), ((), ()))
    y = quantized_dot_general(x, w.with_leaves(leaves), contract, precision, out_dtype)
    free = [axis for axis in range(x.ndim) if axis != c]
    made = [free.index(n), x.ndim - 1, *map(free.index, points)]  # of the axes that `y_spec` names
    return lax.transpose(y, [made[y_spec.index(axis)] for axis in range(x.ndim)])


def _whole(
    x: Array,
    w: AbstractScaledArray,
    *,
    dimension_numbers: Any,
    reverse: bool,
    out_dtype: Any,
    out_sharding: Any = None,
    **params: Any,
) -> Array:
    compute = jnp.promote_types(jnp.promote_types(x.dtype, out_dtype), jnp.float32)
    out_axis, *others = dimension_numbers.rhs_spec
    scale = None if w.scale_leaf is None else w.scale_leaf
    values, factors = w.values(compute), None
    if w.offset_leaf is not None:
        values = w.values(compute) * (1 if scale is None else tiles.spread(scale).astype(compute))
        values, scale = values + tiles.spread(w.offset_leaf).astype(compute), None
    if scale is not None and all(map(scale.is_constant_along, others)):
        # Each output channel o sums over q[o, ...] alone: its scale leaves the sum.
        factors = tiles.spread(scale, [out_axis]).reshape(-1).astype(compute)
    elif scale is not None:
        values = values * tiles.spread(scale).astype(compute)
    y = lax.conv_general_dilated_p.bind(
        x.astype(compute),
        lax.rev(values, dimension_numbers.rhs_spec[2:]) if reverse else values,
        dimension_numbers=dimension_numbers,
        preferred_element_type=compute,
        out_sharding=out_sharding,
        **params,
    )
    if factors is not None:
        y = y * lax.broadcast_in_dim(factors, y.shape, (dimension_numbers.out_spec[1],))
    return y.astype(out_dtype)


def _in_pieces(x: Array, w: AbstractScaledArray, *, dimension_numbers: Any, **params: Any) -> Array:
    """As `_whole`, some output channels at a time.

    Channels go last: XLA for CPU rearranges the axes of a convolution only outside of loops, and
    inside one any other order runs 40 times slower.
    """
    x_spec, w_spec, y_spec = dimension_numbers
    last = x.ndim - 1
    nhwc, hwio = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
    numbers = lax.ConvDimensionNumbers(nhwc, hwio, nhwc)

    def product(x: Array, w: AbstractScaledArray) -> Array:
        order = (*w_spec[2:], w_spec[1], w_spec[0])
        leaves = {name: tiles.transpose(leaf, order) for name, leaf in w.leaves().items()}
        return _whole(x, w.with_leaves(leaves), dimension_numbers=numbers, **params)

    x = lax.transpose(x, (x_spec[0], *x_spec[2:], x_spec[1]))
    y = by_pieces(
        product,
        x,
        w,
        axis=w_spec[0],
        rows=rows_per_piece(w, w_spec[0], max(w.size // PIECES, 1)),
        x_axis=None,
        y_axis=last,
        shape=jax.eval_shape(product, x, w).shape,
        dtype=params["out_dtype"],
    )
    return lax.transpose(y, np.argsort((y_spec[0], *y_spec[2:], y_spec[1])))


# ------------------------------------------------------------------------ types and lowering


@quantized_convolution_p.def_abstract_eval
def _abstract(
    x: Any, *leaves: Any, treedef: Any, reverse: bool, out_dtype: Any, **params: Any
) -> Any:
    w = jtu.tree_unflatten(treedef, leaves)
    payload: Any = w.payload_leaf.array
    y = _compat.output_aval(
        lax.conv_general_dilated_p,
        x,
        payload.update(shape=w.shape, dtype=x.dtype, weak_type=False),
        preferred_element_type=None,
        out_sharding=None,
        **params,
    )
    return y.update(dtype=out_dtype)


def _lowering(implementation: Any) -> Any:
    def quantized_convolution(x: Array, *leaves: Array, treedef: Any, **params: Any) -> Array:
        return implementation(x, jtu.tree_unflatten(treedef, leaves).expanded(), **params)

    return mlir.lower_fun(quantized_convolution, multiple_results=False)


def _lower_cpu(ctx: Any, *operands: Any, **params: Any) -> Any:
    implementation = _whole if _compat.is_partitioned(ctx) else _in_pieces
    return _lowering(implementation)(ctx, *operands, **params)


quantized_convolution_p.def_impl(partial(_compat.apply_primitive, quantized_convolution_p))
mlir.register_lowering(quantized_convolution_p, _lowering(_whole))
mlir.register_lowering(quantized_convolution_p, _lower_cpu, platform="cpu")


# --------------------------------------------------------------------------- transformations


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    x, *leaves = primals
    x_dot, *leaves_dot = tangents
    y = quantized_convolution_p.bind(x, *leaves, **params)
    terms = []
    if type(x_dot) is not ad.Zero:
        terms.append(quantized_convolution_p.bind(x_dot, *leaves, **params))
    moving = [i for i, t in enumerate(leaves_dot) if type(t) is not ad.Zero]
    if moving:  # scales are being differentiated
        rest = {name: value for name, value in params.items() if name != "treedef"}

        @jax.checkpoint
        def of_moving(*values: Array) -> Array:
            filled = dict(enumerate(leaves)) | dict(zip(moving, values, strict=True))
            return _whole(x, jtu.tree_unflatten(params["treedef"], filled.values()), **rest)

        at, towards = [leaves[i] for i in moving], [leaves_dot[i] for i in moving]
        terms.append(jax.jvp(of_moving, at, towards)[1])
    if not terms:
        return y, ad.Zero.from_primal_value(y)  # pyright: ignore[reportAttributeAccessIssue]
    return y, terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _transpose(
    ct: Any, x: Any, *leaves: Any, treedef: Any, dimension_numbers: Any, **params: Any
) -> list[Any]:
    nothing = [None] * len(leaves)
    if type(ct) is ad.Zero:
        return [None, *nothing]
    x_spec, w_spec, y_spec = dimension_numbers
    shape = jtu.tree_unflatten(treedef, leaves).shape
    stride, dilation = params["window_strides"], params["lhs_dilation"]
    padding = []
    for i, (low, _) in enumerate(params["padding"]):
        window = _dilated(shape[w_spec[2 + i]], params["rhs_dilation"][i])
        before = window - low - 1
        inside = _dilated(x.aval.shape[x_spec[2 + i]], dilation[i])
        after = inside + window - 1 - _dilated(ct.shape[y_spec[2 + i]], stride[i]) - before
        padding.append((before, after))
    params |= dict(
        window_strides=dilation,
        lhs_dilation=stride,
        padding=tuple(padding),
        reverse=not params["reverse"],
        out_dtype=x.aval.dtype,
    )
    swapped = (w_spec[1], w_spec[0], *w_spec[2:])
    back = lax.ConvDimensionNumbers(y_spec, swapped, x_spec)
    ct_x = quantized_convolution_p.bind(
        ct, *leaves, treedef=treedef, dimension_numbers=back, **params
    )
    return [ct_x, *nothing]


def _dilated(length: int, by: int) -> int:
    return 1 + by * (length - 1) if length else 0


def _batch(
    operands: Sequence[Any], dims: Sequence[Any], *, treedef: Any, **params: Any
) -> tuple[Any, int]:
    (x, *leaves), (dim, *leaf_dims) = operands, dims
    if any(d is not None for d in leaf_dims):

        def one(x: Array, *leaves: Array) -> Array:
            return _whole(x, jtu.tree_unflatten(treedef, leaves), **params)

        return jax.vmap(jax.checkpoint(one), in_axes=tuple(dims))(*operands), 0
    # Examples are independent: the new axis is a part of the batch.
    axis, out_axis = (
        params["dimension_numbers"].lhs_spec[0],
        params["dimension_numbers"].out_spec[0],
    )
    size = x.shape[dim]
    x = jnp.moveaxis(x, dim, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    y = quantized_convolution_p.bind(x, *leaves, treedef=treedef, **params)
    return y.reshape(*y.shape[:out_axis], size, -1, *y.shape[out_axis + 1 :]), out_axis


ad.primitive_jvps[quantized_convolution_p] = _jvp
ad.primitive_transposes[quantized_convolution_p] = _transpose
batching.primitive_batchers[quantized_convolution_p] = _batch
