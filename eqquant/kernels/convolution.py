"""Convolution with a quantized kernel, and its primitive.

Its transpose is the convolution with the reversed kernel, which is packed too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .. import _compat, tiles
from .._compat import promote_types
from .._scaled import AbstractScaledArray
from .dot_general import quantized_dot_general
from .in_pieces import by_pieces
from .linear import bind, linear_primitive
from .matmul.product import Target
from .matmul.reference import dense


SMALL_BYTES = 128 << 10
PIECES = 12


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
    out_dtype = jnp.dtype(preferred_element_type or promote_types(x.dtype, w.dtype))
    params |= dict(reverse=False, out_dtype=out_dtype)
    grouped = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
    small = w.size * out_dtype.itemsize <= SMALL_BYTES
    if grouped or small or _compat.has_explicit_axes(x, *jax.tree.leaves(w)):
        return jax.checkpoint(partial(_whole, out_sharding=out_sharding, **params))(x, w)
    if _spans_a_point(w, **params):
        return _product(x, w, **params)
    return bind(quantized_convolution_p, x, w, **params)


def _spans_a_point(
    w: AbstractScaledArray, *, dimension_numbers: Any, padding: Any, lhs_dilation: Any, **_: Any
) -> bool:
    """Whether the convolution only mixes channels: a product, along an axis that can be summed over alone."""
    spatial = dimension_numbers.rhs_spec[2:]
    return (
        all(w.shape[axis] == 1 and not w.payload_leaf.is_packed_along(axis) for axis in spatial)
        and all(edge == (0, 0) for edge in map(tuple, padding))
        and all(step == 1 for step in lhs_dilation)
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
    y = quantized_dot_general(
        x, w.with_leaves(leaves), contract, precision, out_dtype, activations="float"
    )
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
    compute = promote_types(x.dtype, out_dtype, jnp.float32)
    out_axis, *others = dimension_numbers.rhs_spec
    scale, factors = w.scale_leaf, None
    if scale is None or w.offset_leaf is not None or not all(map(scale.is_constant_along, others)):
        values = dense(w, compute)
    else:
        # Each output channel o sums over q[o, ...] alone: its scale leaves the sum.
        values = w.values(compute)
        factors = tiles.to_elements(scale, [out_axis]).reshape(-1).astype(compute)
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
        w = w.moved(lambda leaf: tiles.transpose(leaf, order))
        return _whole(x, w, dimension_numbers=numbers, **params)

    x = lax.transpose(x, (x_spec[0], *x_spec[2:], x_spec[1]))
    y = by_pieces(
        product,
        x,
        w,
        axis=w_spec[0],
        limit=max(w.size // PIECES, 1),
        x_axis=None,
        y_axis=last,
        shape=jax.eval_shape(product, x, w).shape,
        dtype=params["out_dtype"],
    )
    return lax.transpose(y, np.argsort((y_spec[0], *y_spec[2:], y_spec[1])))


# ------------------------------------------------------------------------------- the primitive


def _compute(x: Array, w: AbstractScaledArray, target: Target, **params: Any) -> Array:
    in_pieces = target.platform == "cpu" and not target.partitioned
    return (_in_pieces if in_pieces else _whole)(x, w, **params)


def _compute_differentiably(x: Array, w: AbstractScaledArray, **params: Any) -> Array:
    return jax.checkpoint(partial(_whole, **params))(x, w)


def _output(x: Any, w: Any, *, reverse: bool, out_dtype: Any, **params: Any) -> Any:
    params |= dict(preferred_element_type=None, out_sharding=None)
    return _compat.output_aval(lax.conv_general_dilated_p, x, w, **params).update(dtype=out_dtype)


def _transpose(
    ct: Any, x: Any, w: AbstractScaledArray, *, dimension_numbers: Any, **params: Any
) -> Array:
    x_spec, w_spec, y_spec = dimension_numbers
    stride, dilation = params["window_strides"], params["lhs_dilation"]
    padding = []
    for i, (low, _) in enumerate(params["padding"]):
        window = _dilated(w.shape[w_spec[2 + i]], params["rhs_dilation"][i])
        before = window - low - 1
        inside = _dilated(x.shape[x_spec[2 + i]], dilation[i])
        after = inside + window - 1 - _dilated(ct.shape[y_spec[2 + i]], stride[i]) - before
        padding.append((before, after))
    params |= dict(
        window_strides=dilation,
        lhs_dilation=stride,
        padding=tuple(padding),
        reverse=not params["reverse"],
        out_dtype=x.dtype,
    )
    swapped = (w_spec[1], w_spec[0], *w_spec[2:])
    back = lax.ConvDimensionNumbers(y_spec, swapped, x_spec)
    return bind(quantized_convolution_p, ct, w, dimension_numbers=back, **params)


def _dilated(length: int, by: int) -> int:
    return 1 + by * (length - 1) if length else 0


def _batch(
    x: Array, w: AbstractScaledArray, x_mapped: bool, w_mapped: bool, **params: Any
) -> tuple[Array, int]:
    if w_mapped:
        one = partial(_compute_differentiably, **params)
        return jax.vmap(one, (0 if x_mapped else None, 0))(x, w), 0
    # Examples are independent: the new axis is a part of the batch.
    numbers, size = params["dimension_numbers"], x.shape[0]
    axis, out_axis = numbers.lhs_spec[0], numbers.out_spec[0]
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    y = bind(quantized_convolution_p, x, w, **params)
    return y.reshape(*y.shape[:out_axis], size, -1, *y.shape[out_axis + 1 :]), out_axis


quantized_convolution_p = linear_primitive(
    "quantized_convolution",
    output=_output,
    compute=_compute,
    compute_differentiably=_compute_differentiably,
    transpose=_transpose,
    batch=_batch,
)
"""Operands: `x`, then the leaves of `w`. Parameters: the treedef of `w`, whether its spatial axes
are reversed, the dtype of the result, and those of `lax.conv_general_dilated`."""
