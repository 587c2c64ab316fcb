"""Maps `y = f(x, w)` that are linear in `x`, of a packed weight: what JAX has to know of their primitives.

The derivative in `x` is the same map, and its transpose another one: what they save are the packed leaves of `w`. Which
operations compute it is decided when the primitive is lowered, for each platform.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import Array

from .. import _compat
from .._compat import ad, batching, mlir
from .._scaled import AbstractScaledArray
from .matmul.product import Target


def linear_primitive(
    name: str,
    *,
    output: Callable[..., Any],
    compute: Callable[..., Array],
    compute_differentiably: Callable[..., Array],
    transpose: Callable[..., Array],
    batch: Callable[..., tuple[Array, int]],
    of_tangents: dict[str, Any] | None = None,
) -> Any:
    """The primitive of this name. Its operands are `x` and the leaves of `w`; its parameters the `treedef` of `w` and
    any others, which all of these functions take:

    - `output(x, w, **params)`: the abstract result of abstract operands.
    - `compute(x, w, target, **params)`: the result, in a program for this target.
    - `compute_differentiably(x, w, **params)`: the same by operations that JAX can differentiate in the scales of `w`.
    - `transpose(ct, x, w, **params)`: the cotangent of the abstract `x`.
    - `batch(x, w, x_mapped, w_mapped, **params)`: the results for each entry of the first axis of what is
        mapped, and along which axis they lie.

    `of_tangents` replaces parameters that hold for `x`, but not for what is put in its place.
    """
    primitive = _compat.Primitive(name)
    replaced: dict[str, Any] = of_tangents or {}

    def abstract(x: Any, *leaves: Any, treedef: Any, **params: Any) -> Any:
        w = jtu.tree_unflatten(treedef, leaves)
        payload: Any = w.payload_leaf.array
        return output(x, payload.update(shape=w.shape, dtype=x.dtype, weak_type=False), **params)

    def lower(platform: str | None, ctx: Any, *operands: Any, treedef: Any, **params: Any) -> Any:
        target = _target(platform, ctx)

        def run(x: Array, *leaves: Array) -> Array:
            return compute(x, unflatten(treedef, leaves), target, **params)

        with _compat.triton_without_warning():
            return mlir.lower_fun(run, multiple_results=False)(ctx, *operands)

    def of_leaves(
        which: Sequence[int], x: Array, leaves: Sequence[Any], treedef: Any, params: Any
    ) -> Callable[..., Array]:
        """The map as a function of some of the leaves."""

        def of_these(*values: Array) -> Array:
            filled = dict(enumerate(leaves)) | dict(zip(which, values, strict=True))
            w = unflatten(treedef, filled.values())
            return compute_differentiably(x, w, **params)

        return of_these

    def jvp(primals: Any, tangents: Any, *, treedef: Any, **params: Any) -> tuple[Any, Any]:
        (x, *leaves), (x_dot, *leaves_dot) = primals, tangents
        y = primitive.bind(x, *leaves, treedef=treedef, **params)
        terms, params = [], params | replaced
        if type(x_dot) is not ad.Zero:
            terms.append(primitive.bind(x_dot, *leaves, treedef=treedef, **params))
        moving = [i for i, tangent in enumerate(leaves_dot) if type(tangent) is not ad.Zero]
        if moving:  # scales are being differentiated
            at, towards = [leaves[i] for i in moving], [leaves_dot[i] for i in moving]
            terms.append(jax.jvp(of_leaves(moving, x, leaves, treedef, params), at, towards)[1])
        if not terms:
            return y, ad.Zero.from_primal_value(y)  # pyright: ignore[reportAttributeAccessIssue]
        return y, terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def transpose_(ct: Any, x: Any, *leaves: Any, treedef: Any, **params: Any) -> list[Any]:
        cts: list[Any] = [None] * (1 + len(leaves))
        params |= replaced
        if type(ct) is ad.Zero:
            return cts
        if ad.is_undefined_primal(x):
            cts[0] = transpose(ct, x.aval, jtu.tree_unflatten(treedef, leaves), **params)
            return cts
        # The map is linear in the scale too, where a tangent of a scale takes its place.
        linear = [i for i, leaf in enumerate(leaves) if ad.is_undefined_primal(leaf)]
        zeros = [jnp.zeros(leaves[i].aval.shape, leaves[i].aval.dtype) for i in linear]
        found = jax.vjp(of_leaves(linear, x, leaves, treedef, params), *zeros)[1](ct)
        for i, ct_leaf in zip(linear, found, strict=True):
            cts[1 + i] = ct_leaf
        return cts

    def batch_(operands: Any, dims: Any, *, treedef: Any, **params: Any) -> tuple[Any, int]:
        (x, *leaves), (x_dim, *leaf_dims) = operands, dims
        size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
        w_mapped = any(dim is not None for dim in leaf_dims)
        if x_dim is not None:
            x = jnp.moveaxis(x, x_dim, 0)
        if w_mapped:
            leaves = [
                jnp.broadcast_to(leaf, (size, *leaf.shape))
                if dim is None
                else jnp.moveaxis(leaf, dim, 0)
                for leaf, dim in zip(leaves, leaf_dims, strict=True)
            ]
        w = jtu.tree_unflatten(treedef, leaves)
        return batch(x, w, x_dim is not None, w_mapped, **params)

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(partial(_compat.apply_primitive, primitive))
    mlir.register_lowering(primitive, partial(lower, None))
    for platform in ("cpu", "cuda", "tpu"):
        mlir.register_lowering(primitive, partial(lower, platform), platform=platform)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose_
    batching.primitive_batchers[primitive] = batch_
    return primitive


def unflatten(treedef: Any, leaves: Iterable[Any]) -> AbstractScaledArray:
    """The weight, each number of whose scales stands by itself: what kernels cut."""
    return jtu.tree_unflatten(treedef, leaves).expanded()


def bind(primitive: Any, x: Any, w: AbstractScaledArray, **params: Any) -> Array:
    """The result of a linear primitive."""
    leaves, treedef = jtu.tree_flatten(w)
    return primitive.bind(x, *leaves, treedef=treedef, **params)


def _target(platform: str | None, ctx: Any) -> Target:
    partitioned, device = _compat.is_partitioned(ctx), None
    if platform == "cuda":
        partitioned, device = partitioned or not _compat.takes_triton(ctx), _compat.gpu_kind()
    if platform == "tpu":
        partitioned = partitioned or not _compat.looks_up_rows()
    return Target(platform, partitioned, device, calls_out=not _compat.is_exported(ctx))
