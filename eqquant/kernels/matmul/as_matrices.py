"""A product of any rank as products of matrices, for kernels that compute no others."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import Array, lax

from ..._scaled import AbstractScaledArray
from ...tiles import Leaf, reshape, to_elements, Unaligned
from .axes import Axes
from .product import Product


OfMatrix = Callable[[Any, AbstractScaledArray, Leaf | None, int], Any]


def by_matrices(
    of_matrix: OfMatrix, x: Array, w: AbstractScaledArray, axes: Axes, all_scales: bool = False
) -> Array:
    """The product of `x` and `w` along these axes, by `of_matrix(x, w, scale, axis)` of a matrix (rows, inputs) and
    the values of a quantized one, times the scale unless that is None, summed over that axis: a matrix (rows, outputs).
    A scale that is constant along that axis is multiplied in here, unless `all_scales` are left to `of_matrix`.

    Neighbouring axes of `w` of the same kind become one; over the others `of_matrix` is mapped.

    **Raises:** `Unaligned` if `w` cannot be seen as a matrix or a stack of them.
    """
    if axes.w_batch:
        return _mapped(of_matrix, x, w, axes, axes.x_batch[0], axes.w_batch[0], 0, all_scales)
    is_summed = [axis in axes.w_contract for axis in range(w.ndim)]
    kinds = [kind for kind, _ in itertools.groupby(is_summed)]
    if kinds == [False, True, False]:
        out = len(axes.x_free(x.ndim))
        return _mapped(of_matrix, x, w, axes, None, 0, out, all_scales)
    if sorted(kinds) != [False, True]:
        raise Unaligned
    inputs = [i for _, i in sorted(zip(axes.w_contract, axes.x_contract, strict=True))]
    x = lax.transpose(x, [*axes.x_free(x.ndim), *inputs])
    batch = x.shape[: x.ndim - len(inputs)]
    outputs = [w.shape[axis] for axis in axes.w_free(w.ndim)]
    sizes = math.prod(outputs), math.prod(w.shape) // math.prod(outputs)
    w = w.expanded()
    if w.ndim > 2:
        matrix = sizes if kinds[1] else sizes[::-1]
        w = w.moved(lambda leaf: reshape(leaf, matrix))
    axis, scale, x = int(kinds[1]), w.scale_leaf, x.reshape(-1, sizes[1])
    if scale is not None and scale.is_constant_along(axis) and not all_scales:
        y = of_matrix(x, w, None, axis) * scale_of_outputs(scale, axis)
    else:
        y = of_matrix(x, w, scale, axis)
    return y.reshape(*batch, *outputs)


def scale_of_outputs(scale: Leaf, axis: int) -> Array:
    """What the outputs are multiplied with, if the scale of a matrix is constant along the axis that is summed over."""
    # sum_j x_j (s_i q_ij) = s_i sum_j x_j q_ij: a scale constant along j leaves the sum.
    return to_elements(scale, [1 - axis]).reshape(-1)


def scale_of_inputs(scale: Leaf, axis: int) -> Array:
    """What the inputs are multiplied with, if the scale of a matrix is constant along the axis of the outputs."""
    # sum_j x_j (s_j q_ij) = sum_j (x_j s_j) q_ij: a scale constant along i goes to the input.
    return to_elements(scale, [axis]).reshape(-1)


def _mapped(
    of_matrix: OfMatrix,
    x: Array,
    w: AbstractScaledArray,
    axes: Axes,
    x_axis: Any,
    axis: int,
    out: int,
    all_scales: bool,
) -> Array:
    """`by_matrices` for each entry of `axis` of `w`, and of `x_axis` of `x` unless that is None."""
    w = w.expanded()
    if w.packing is not None and w.packing.axis % w.ndim <= axis:
        raise Unaligned  # the packed axis is counted from the end
    leaves, treedef = jtu.tree_flatten(w)
    length = w.shape[axis]
    shared = [leaf.shape[axis] != length for leaf in leaves]  # one scale for all
    if any(one and leaf.shape[axis] != 1 for leaf, one in zip(leaves, shared, strict=True)):
        raise Unaligned  # blocks of scales
    leaves = [
        lax.squeeze(leaf, (axis,)) if one else leaf
        for leaf, one in zip(leaves, shared, strict=True)
    ]
    rest = axes.without(x_axis, axis)

    def each(x: Array, *leaves: Array) -> Array:
        return by_matrices(of_matrix, x, jtu.tree_unflatten(treedef, leaves), rest, all_scales)

    in_axes = (x_axis, *(None if one else axis for one in shared))
    return jax.vmap(each, in_axes, out)(x, *leaves)


def holds_for_matrices(
    condition: OfMatrix, product: Product, dtypes: Sequence[Any], all_scales: bool = False
) -> bool:
    """Whether `by_matrices` computes this product, in float32 and from operands of these dtypes that 32 bits can
    count, and the condition holds for what it gives to `of_matrix`."""
    x, w, found = product.x, product.w, []
    if product.accumulate != jnp.float32 or x.dtype not in dtypes or w.dtype not in dtypes:
        return False
    if not 0 < product.inputs < 2**31 or not 0 < w.size < 2**31:
        return False

    def of_matrix(x: Array, w: AbstractScaledArray, scale: Leaf | None, axis: int) -> Array:
        found.append(condition(x, w, scale, axis))
        return jnp.zeros((len(x), w.shape[1 - axis]))

    try:
        jax.eval_shape(lambda x, w: by_matrices(of_matrix, x, w, product.axes, all_scales), x, w)
    except Unaligned:
        return False
    return all(found)
