"""Control flow and calls: bodies are evaluated with the packed form intact, and the primitive is
emitted again through the public API of JAX, with quantized arrays as the pytrees they are.

| primitive                        | what is made dense                                             |
|----------------------------------|----------------------------------------------------------------|
| `jit`, `eval_jaxpr`, `remat2`, … | nothing                                                        |
| `scan`, `while`                  | a carry whose packed structure the body changes                |
| `cond`                           | an output whose packed structure differs between branches      |
| `custom_jvp_call`                | outputs, and tangents of the weight                            |
| `custom_vjp_call`                | outputs, and cotangents of the weight                          |
| `custom_vmap_call`               | outputs                                                        |
| `shard_map`                      | an output that is split along its packed axis                  |
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from .. import _compat, _sharding
from .._array import QuantizedArray
from .._daylight import recording, report_materialized
from .._dispatch import register, tracing_state, transparent
from .._implicit import as_array, evaluate, implicit, is_implicit
from .._implicit_array import as_dense, in_row_major
from .._scaled import AbstractScaledArray


def _structure(x: Any) -> Any:
    """What has to agree where two values meet: treedef, shapes and dtypes of the leaves."""
    leaves, treedef = jtu.tree_flatten(x)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _make_dense(primitive: Any, x: Any, where: str) -> Any:
    if is_implicit(x):
        report_materialized(primitive.name, [x], f"{primitive.name} ({where})")
    return as_dense(x)


def _dense_outputs(primitive: Any, outputs: Sequence[Any]) -> list[Any]:
    return [as_array(_make_dense(primitive, x, "an output")) for x in outputs]


def _abstract(f: Callable[..., Any], *args: Any) -> Any:
    """The abstract results of `f`. What it makes dense is reported when it runs, not here."""
    with recording():
        return jax.eval_shape(f, *args)


# ----------------------------------------------------------------------------------------- calls


@register("jit", "pjit")
@transparent
def jit_any(primitive: Any, *operands: QuantizedArray | Array, **params: Any) -> Any:
    kept = ("jaxpr", "name", "in_shardings", "out_shardings", "keep_unused", "inline")
    options = params["compiler_options_kvs"]
    # JAX gives the same jaxpr object for the same function and types: compile it once.
    return _jitted(*(params[key] for key in kept), options, tracing_state())(*operands)


@_compat.weakly_cached
def _jitted(
    jaxpr: Any,
    name: str,
    in_shardings: Sequence[Any],
    out_shardings: Sequence[Any],
    keep_unused: bool,
    inline: Any,
    options: Sequence[Any],
    state: Any,  # tracing again in another state: to warn, to raise or to record
) -> Callable[..., list[Any]]:
    traced = weakref.ref(jaxpr)  # what is compiled dies with it

    def body(*args: Any) -> list[Any]:
        placed = [_constrain(x, s) for x, s in zip(args, in_shardings, strict=True)]
        out = evaluate(traced(), placed)
        return [_constrain(x, s) for x, s in zip(out, out_shardings, strict=True)]

    body.__name__ = name
    return jax.jit(
        body, keep_unused=keep_unused, inline=inline, compiler_options=dict(options) or None
    )


def _constrain(x: Any, sharding: Any) -> Any:
    if not _compat.is_specified_sharding(sharding):
        return x
    if isinstance(x, AbstractScaledArray) and isinstance(sharding, NamedSharding):
        return x.with_sharding(sharding)
    return lax.with_sharding_constraint(as_dense(x), sharding)


@register("closed_call", "core_call", "call", "core_closed_call", "eval_jaxpr")
@transparent
def call_any(primitive: Any, *operands: QuantizedArray | Array, **params: Any) -> Any:
    return evaluate(params["call_jaxpr" if "call_jaxpr" in params else "jaxpr"], operands)


@register("remat2", "checkpoint", "remat")
@transparent
def checkpoint_any(primitive: Any, *operands: QuantizedArray | Array, **params: Any) -> Any:
    def body(*args: Any) -> list[Any]:
        return evaluate(params["jaxpr"], args)

    if params["differentiated"] and params["prevent_cse"]:
        # This is a backward pass: XLA must not merge its recomputation with the forward pass.
        operands = _compat.optimization_barrier(operands)
    return jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])(
        *operands
    )


# ------------------------------------------------------------------------------------------ loops


@register(lax.scan_p)
@transparent
def scan_any(primitive: Any, *operands: QuantizedArray | Array, **params: Any) -> Any:
    num_consts, num_carry = _compat.scan_counts(params)
    consts = operands[:num_consts]
    carry = list(operands[num_consts : num_consts + num_carry])
    xs = [_per_element_along(primitive, x) for x in operands[num_consts + num_carry :]]

    def body(carry: Any, x: Any) -> Any:
        out = evaluate(params["jaxpr"], [*consts, *carry, *x])
        return out[:num_carry], out[num_carry:]

    carry = _stable_carry(
        primitive, carry, lambda carry: _abstract(lambda c, x: body(c, _first(x))[0], carry, xs)
    )

    def dense_where_it_was(carry: Any, x: Any) -> Any:
        new, y = body(carry, x)
        return _like(primitive, new, carry), y

    carry, ys = lax.scan(
        dense_where_it_was,
        carry,
        xs,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        _split_transpose=params.get("_split_transpose", False),
    )
    return [*carry, *ys]


def _per_element_along(primitive: Any, x: Any, axes: Sequence[int] = (0,)) -> Any:
    """`x` with every leaf as long as `x` is along `axes`, to be cut or joined there as a pytree."""
    cut = x.per_element_along(axes) if is_implicit(x) else x
    return _make_dense(primitive, x, "cut along its packed axis") if cut is None else cut


def _first(xs: Any) -> Any:
    return jtu.tree_map(lambda leaf: leaf[0], xs)


def _stable_carry(primitive: Any, carry: list[Any], step: Callable[[Any], Any]) -> list[Any]:
    """`carry`, with each entry made dense whose packed structure a step changes."""
    while any(map(is_implicit, carry)):
        after = step(carry)
        unstable = [
            is_implicit(x) and _structure(x) != _structure(y)
            for x, y in zip(carry, after, strict=True)
        ]
        if not any(unstable):
            break
        carry = [
            _make_dense(primitive, x, "a carry that changes") if bad else x
            for x, bad in zip(carry, unstable, strict=True)
        ]
    return carry


def _like(primitive: Any, new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    return [
        x if is_implicit(y) else _make_dense(primitive, x, "a dense carry")
        for x, y in zip(new, old, strict=True)
    ]


@register(lax.while_p)
@transparent
def while_any(primitive: Any, *operands: QuantizedArray | Array, **params: Any) -> Any:
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = operands[:n_cond], operands[n_cond : n_cond + n_body]

    def predicate(carry: Any) -> Array:
        return evaluate(params["cond_jaxpr"], [*cond_consts, *carry])[0]

    def body(carry: Any) -> list[Any]:
        new = evaluate(params["body_jaxpr"], [*body_consts, *carry])
        if not batched:
            return new
        running = predicate(carry)
        return [_select(primitive, running, x, y) for x, y in zip(new, carry, strict=True)]

    batched = range(params["cond_jaxpr"].out_avals[0].ndim)  # by vmap: a loop for each element
    carry = list(operands[n_cond + n_body :])
    if batched:
        carry = [_per_element_along(primitive, x, batched) if is_implicit(x) else x for x in carry]
    carry = _stable_carry(primitive, carry, lambda carry: _abstract(body, carry))
    return lax.while_loop(
        lambda carry: jnp.any(predicate(carry)),
        lambda carry: _like(primitive, body(carry), carry),
        carry,
    )


def _select(primitive: Any, which: Array, x: Any, y: Any) -> Any:
    """`x` where `which` holds, else `y`; `which` has the leading axes of both."""
    if x is y:
        return x
    leads = all(leaf.shape[: which.ndim] == which.shape for leaf in jtu.tree_leaves((x, y)))
    if not leads or _structure(x) != _structure(y):
        x, y = (_make_dense(primitive, each, "a carry of a batched loop") for each in (x, y))

    def select(x: Array, y: Array) -> Array:
        return lax.select(lax.broadcast_in_dim(which, x.shape, range(which.ndim)), x, y)

    return jtu.tree_map(select, x, y)


@register(lax.cond_p)
@transparent
def cond_any(primitive: Any, index: Array, *operands: QuantizedArray | Array, **params: Any) -> Any:
    jaxprs = params["branches"]
    unset = [[_compat.is_unset(jaxpr, i) for i in range(len(jaxpr.outvars))] for jaxpr in jaxprs]
    results = [_abstract(functools.partial(evaluate, jaxpr), operands) for jaxpr in jaxprs]
    forms = [
        _common_form([x for x, skip in zip(each, skips, strict=True) if not skip])
        for each, skips in zip(zip(*results, strict=True), zip(*unset, strict=True), strict=True)
    ]

    def branch(jaxpr: Any, unset: Sequence[bool]) -> Callable[..., list[Any]]:
        def run(*args: Any) -> list[Any]:
            return [
                _make_dense(primitive, x, "branches differ")
                if form is None
                else jtu.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), form)
                if skip
                else x
                for x, form, skip in zip(evaluate(jaxpr, args), forms, unset, strict=True)
            ]

        return run

    branches = [branch(*each) for each in zip(jaxprs, unset, strict=True)]
    if params.get("branches_platforms"):  # lax.platform_dependent: one branch will be lowered
        named = {
            name: branch
            for branch, names in zip(branches, params["branches_platforms"], strict=True)
            for name in names or ("default",)
        }
        return lax.platform_dependent(*operands, **named)
    return lax.switch(index, branches, *operands)


def _common_form(xs: Sequence[Any]) -> Any:
    """The packed form that all of `xs` have, or None."""
    same = xs and is_implicit(xs[0]) and all(_structure(x) == _structure(xs[0]) for x in xs)
    return xs[0] if same else None


# ------------------------------------------------------------------------- custom derivatives


def _tangent_of(x: Any, tangent: Any) -> Any:
    """The tangent of the array that `x` stands for, from the tangents of its leaves."""
    leaves, treedef = jtu.tree_flatten(x)
    tangents = [
        jax.custom_derivatives.zero_from_primal(leaf) if _is_zero(t) else t
        for leaf, t in zip(leaves, jtu.tree_leaves(tangent, is_leaf=_is_zero), strict=True)
    ]
    moves = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    if not is_implicit(x):
        return tangents[0]
    if isinstance(x, AbstractScaledArray) and sum(moves) == 1 and x.offset_leaf is None:
        # The derivative of s q along s' is s' q: the tangent is packed too.
        mixed = [t if move else leaf for leaf, t, move in zip(leaves, tangents, moves, strict=True)]
        return jtu.tree_unflatten(treedef, mixed)

    def dense(*moving: Array) -> Array:
        values = iter(moving)
        mixed = [next(values) if move else leaf for leaf, move in zip(leaves, moves, strict=True)]
        return jtu.tree_unflatten(treedef, mixed).materialize()

    primals = [leaf for leaf, move in zip(leaves, moves, strict=True) if move]
    moving = [t for t, move in zip(tangents, moves, strict=True) if move]
    return jax.jvp(dense, primals, moving)[1]


def _is_zero(t: Any) -> bool:
    return isinstance(t, jax.custom_derivatives.SymbolicZero)


@register("custom_jvp_call")
@transparent
def custom_jvp_call_any(primitive: Any, *operands: QuantizedArray | Array, **params: Any) -> Any:
    consts, primals = operands[: params["num_consts"]], operands[params["num_consts"] :]

    @jax.custom_jvp
    def function(*args: Any) -> list[Any]:
        return _dense_outputs(primitive, evaluate(params["call_jaxpr"], [*consts, *args]))

    def derivative(primals: Any, tangents: Any) -> Any:
        zeros = [
            params["symbolic_zeros"] and all(map(_is_zero, jtu.tree_leaves(t, is_leaf=_is_zero)))
            for t in tangents
        ]
        jaxpr, jvp_consts, out_zeros = _compat.custom_jvp_parts(params, zeros)
        moving = [
            _tangent_of(x, t)
            for x, t, zero in zip(primals, tangents, zeros, strict=True)
            if not zero
        ]
        out = _dense_outputs(primitive, evaluate(jaxpr, [*jvp_consts, *primals, *moving]))
        results, nonzero = out[: len(out_zeros)], iter(out[len(out_zeros) :])
        return results, [
            jnp.zeros(y.shape, _compat.tangent_dtype(y.dtype)) if zero else next(nonzero)
            for y, zero in zip(results, out_zeros, strict=True)
        ]

    function.defjvp(derivative, symbolic_zeros=True)
    return function(*primals)


@register("custom_vjp_call", "custom_vjp_call_jaxpr")
@transparent
def custom_vjp_call_any(primitive: Any, *operands: QuantizedArray | Array, **params: Any) -> Any:
    consts, primals = operands[: params["num_consts"]], operands[params["num_consts"] :]

    @jax.custom_vjp
    def function(*args: Any) -> list[Any]:
        return _dense_outputs(primitive, evaluate(params["call_jaxpr"], [*consts, *args]))

    def forward(*perturbable: Any) -> Any:
        args = [jtu.tree_map(lambda leaf: leaf.value, x) for x in perturbable]
        perturbed = [any(leaf.perturbed for leaf in jtu.tree_leaves(x)) for x in perturbable]
        parts = _compat.custom_vjp_forward(params, perturbed)
        out = evaluate(parts.jaxpr, [*parts.consts, *args])
        fresh, results, given = iter(out), out[parts.num_fresh :], [*consts, *args]
        residuals = [next(fresh) if i is None else given[i] for i in parts.forwarded]
        return _dense_outputs(primitive, results), (residuals, args)

    def backward(saved: Any, cotangents: Any) -> Any:
        residuals, args = saved
        dense = implicit(_compat.custom_vjp_backward(params))(*residuals, *cotangents)
        return tuple(_cotangent_of(x, ct) for x, ct in zip(args, dense, strict=True))

    function.defvjp(forward, backward, symbolic_zeros=True)
    return function(*primals)


def _cotangent_of(x: Any, cotangent: Any) -> Any:
    """The cotangents of the leaves of `x`, from that of the array it stands for."""
    if not is_implicit(x):
        return cotangent
    _, pull_back = jax.vjp(lambda x: x.materialize(), x)
    return pull_back(as_dense(cotangent))[0]


@register("custom_vmap_call")
@transparent
def custom_vmap_call_any(primitive: Any, *operands: QuantizedArray | Array, **params: Any) -> Any:
    in_tree, out_tree, rule = params["in_tree"], params["out_tree"], params["rule"]

    @jax.custom_batching.custom_vmap
    def function(*args: Any) -> list[Any]:
        return _dense_outputs(primitive, evaluate(params["call"], args))

    @function.def_vmap
    def batched(axis_size: int, in_batched: Any, *args: Any) -> Any:
        flags = [any(jtu.tree_leaves(flag)) for flag in in_batched]
        stacked = [
            jtu.tree_map(
                lambda leaf, each: (
                    leaf if each else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
                ),
                x,
                each,
            )
            if flag
            else x
            for x, each, flag in zip(args, in_batched, flags, strict=True)
        ]
        all_batched = jtu.tree_unflatten(in_tree, flags)

        def call(*args: Any) -> Any:
            return rule(axis_size, all_batched, *jtu.tree_unflatten(in_tree, args))

        out, out_batched = implicit(call)(*stacked)
        flat = out_tree.flatten_up_to(out)
        return flat, out_tree.flatten_up_to(out_batched)

    return function(*operands)


# ---------------------------------------------------------------------------------- shard_map


@register("shard_map")
@transparent
def shard_map_any(primitive: Any, *operands: QuantizedArray | Array, **params: Any) -> Any:
    mesh = params["mesh"]
    operands = tuple(map(in_row_major, operands))
    flat = [x.expanded() if isinstance(x, AbstractScaledArray) else x for x in operands]

    def specs(x: Any, spec: PartitionSpec) -> Any:
        if not isinstance(x, AbstractScaledArray):
            return spec
        return {
            name: _sharding.leaf_spec(leaf, name, spec, mesh) for name, leaf in x.leaves().items()
        }

    def body(*shards: Any) -> list[Any]:
        args = [
            _shard(x, _varying_alike(shard, spec, params["check_vma"]))
            if isinstance(x, AbstractScaledArray)
            else shard
            for x, shard, spec in zip(flat, shards, in_specs, strict=True)
        ]
        # One spec serves all leaves of an output where all are as long as it along split axes.
        return [
            _per_element_along(
                primitive, x, [i for i, names in enumerate(spec) if names is not None]
            )
            for x, spec in zip(evaluate(params["jaxpr"], args), params["out_specs"], strict=True)
        ]

    in_specs = tuple(specs(x, s) for x, s in zip(flat, params["in_specs"], strict=True))
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=list(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=set(params["newly_manual_axes"]),
    )
    return mapped(*[_arrays(x) if isinstance(x, AbstractScaledArray) else x for x in flat])


def _arrays(x: AbstractScaledArray) -> dict[str, Array]:
    return {name: leaf.array for name, leaf in x.leaves().items()}


def _varying_alike(
    arrays: dict[str, Array], specs: dict[str, PartitionSpec], check_vma: bool
) -> dict[str, Array]:
    """The leaves of a shard, each varying over the mesh axes over which one of them does: they will be
    combined."""
    if not check_vma:
        return arrays
    own = {name: _sharding.names_of(spec) for name, spec in specs.items()}
    every = frozenset().union(*own.values())
    return {
        name: lax.pcast(array, tuple(every - own[name]), to="varying")
        if every - own[name]
        else array
        for name, array in arrays.items()
    }


def _shard(x: AbstractScaledArray, arrays: dict[str, Array]) -> AbstractScaledArray:
    """The part of `x` of which one device holds these arrays."""
    leaves = x.leaves()
    payload, held = leaves[x.payload], arrays[x.payload].shape
    shape = tuple(
        length if here == stored else here // tile.stored * tile.size
        for length, stored, here, tile in zip(
            x.shape, payload.array.shape, held, payload.tiles, strict=True
        )
    )
    return x.with_leaves(
        {name: leaf._replace(array=arrays[name], shape=shape) for name, leaf in leaves.items()}
    )
