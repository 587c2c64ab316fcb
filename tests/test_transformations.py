"""Control flow, calls and derivatives: a quantized array in every role that an array can play.

Each program is a function of a matrix `w`, a stack of matrices `ws` and a vector `x`. It has to
agree with itself on the materialized matrices: its value, its derivatives (with respect to the
scales, too), its Hessian, and batched; transformed inside of `implicit` and outside.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

import eqquant as eqq


LAYERS, SIZE = 3, 4


@dataclass(frozen=True)
class Program:
    """A function of `(w, ws, x)`, and what is known about it."""

    run: Callable[..., Any]
    dense: tuple[str, ...] = ()
    """The primitives that make a quantized operand dense, in order."""
    modes: str = "forward reverse"
    """The derivatives that JAX has of it."""
    dense_batched: bool = False
    """Whether it makes an operand dense when `x` is batched."""
    constant: bool = False
    """Whether no derivative with respect to the weights is passed on."""


PROGRAMS: dict[str, Program] = {}


def program(*dense: str, **options: Any) -> Callable[..., Any]:
    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        PROGRAMS[run.__name__] = Program(run, dense, **options)
        return run

    return add


def layer(w: Any, x: Any) -> jax.Array:
    return jnp.tanh(w @ x)


# ------------------------------------------------------------------------------------------ calls


@program()
def jit_argument(w, ws, x):
    return jax.jit(layer)(w, x)


@program()
def jit_closed_over(w, ws, x):
    return jax.jit(lambda x: layer(w, x))(x)


@program()
def jit_result(w, ws, x):
    return jax.jit(lambda w: {"again": -w.T})(w)["again"] @ x


@program()
def jit_of_jit_with_static_argument(w, ws, x):
    inner = jax.jit(lambda w, x, times: w @ x * times, static_argnums=2)
    return jax.jit(lambda w, x: inner(w, x, 3), inline=True)(w, x)


@program()
def checkpoint(w, ws, x):
    return jax.checkpoint(layer)(w, x)


@program()
def checkpoint_closed_over(w, ws, x):
    return jax.checkpoint(lambda x: layer(w, layer(w, x)))(x)


@program()
def checkpoint_result(w, ws, x):
    return jax.checkpoint(lambda w: 2 * w)(w) @ x


@program()
def checkpoint_policy(w, ws, x):
    from jax.ad_checkpoint import checkpoint_name

    policy = jax.checkpoint_policies.save_only_these_names("kept")
    call = jax.checkpoint(lambda w, x: layer(checkpoint_name(w, "kept"), jnp.sin(x)), policy=policy)
    return call(w, x)


# ------------------------------------------------------------------------------------------- scan


@program()
def scan_constant(w, ws, x):
    return lax.scan(lambda x, _: (layer(w, x), x), x, length=LAYERS)


@program()
def scan_xs(w, ws, x):
    return lax.scan(lambda x, w: (layer(w, x), x.sum()), x, ws)


@program()
def scan_xs_reverse_unrolled(w, ws, x):
    return lax.scan(lambda x, w: (layer(w, x), x), x, ws, reverse=True, unroll=2)


@program()
def scan_checkpoint(w, ws, x):
    return lax.scan(lambda x, w: (jax.checkpoint(layer)(w, x), None), x, ws)[0]


@program()
def scan_filter_checkpoint(w, ws, x):
    return lax.scan(lambda x, w: (eqx.filter_checkpoint(layer)(w, x), None), x, ws)[0]


@program()
def scan_carry_unchanged(w, ws, x):
    (w, x), _ = lax.scan(lambda c, _: ((c[0], layer(*c)), None), (w, x), length=LAYERS)
    return w @ x


@program()
def scan_carry_of_equal_structure(w, ws, x):
    def step(carry, _):
        v, w, x = carry
        return (w, -v, layer(v, x)), None

    (v, w, x), _ = lax.scan(step, (w, 2 * w, x), length=LAYERS)
    return v @ x + w @ x


@program("scan")
def scan_carry_of_other_structure(w, ws, x):
    (w, x), _ = lax.scan(lambda c, _: ((c[0].T, layer(*c)), None), (w, x), length=LAYERS)
    return w @ x


@program("scan")
def scan_carry_packed_too_late(w, ws, x):
    step = lambda c, w: ((w, layer(c[0], c[1])), None)  # noqa: E731
    (w, x), _ = lax.scan(step, (jnp.ones((SIZE, SIZE)), x), ws)
    return w @ x


@program("scan", "sin")
def scan_carry_computed(w, ws, x):
    (w, x), _ = lax.scan(lambda c, v: ((jnp.sin(v), layer(*c)), None), (w, x), ws)
    return w @ x


@program()
def scan_ys(w, ws, x):
    _, again = lax.scan(lambda i, v: (i, (v, -w)), 0, ws)
    return jnp.einsum("loi,i->o", again[0], x) + again[1][1] @ x


@program()
def scan_scan(w, ws, x):
    inner = lambda x, _: lax.scan(lambda x, v: (layer(v, layer(w, x)), None), x, ws)  # noqa: E731
    return lax.scan(inner, x, length=2)[0]


@program()
def scan_checkpoint_scan(w, ws, x):
    inner = jax.checkpoint(lambda w, x: lax.scan(lambda x, _: (layer(w, x), None), x, length=2)[0])
    return lax.scan(lambda x, w: (inner(w, x), None), x, ws)[0]


@program()
def scan_vmap(w, ws, x):
    step = lambda xs, _: (jax.vmap(layer)(ws, xs), None)  # noqa: E731
    return lax.scan(step, jnp.stack([x] * LAYERS), length=2)[0]


@program()
def vmap_scan(w, ws, x):
    scan = lambda w, x: lax.scan(lambda x, _: (layer(w, x), None), x, length=2)[0]  # noqa: E731
    return jax.vmap(scan, (0, None))(ws, x)


@program()
def lax_map(w, ws, x):
    return lax.map(lambda w: layer(w, x), ws)


# ------------------------------------------------------------------------------------ while, fori


@program(modes="forward")
def while_constant(w, ws, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, layer(w, c[1])), (0, x))[1]


@program(modes="forward")
def while_condition(w, ws, x):
    return lax.while_loop(lambda x: (w @ x).sum() > 1e3, lambda x: layer(w, x), x)


@program(modes="forward")
def while_carry_unchanged(w, ws, x):
    step = lambda c: (c[0] + 1, c[1], layer(*c[1:]))  # noqa: E731
    _, w, x = lax.while_loop(lambda c: c[0] < 3, step, (0, w, x))
    return w @ x


@program("while", modes="forward")
def while_carry_of_other_structure(w, ws, x):
    step = lambda c: (c[0] + 1, c[1].T, layer(*c[1:]))  # noqa: E731
    _, w, x = lax.while_loop(lambda c: c[0] < 3, step, (0, w, x))
    return w @ x


@program()
def fori(w, ws, x):
    return lax.fori_loop(0, LAYERS, lambda i, x: layer(w, x), x)


@program(modes="forward")
def fori_of_a_stack_and_traced_length(w, ws, x):
    length = jnp.where(x[0] < 100, LAYERS, 0)
    return lax.fori_loop(0, length, lambda i, x: layer(ws[i], x), x)


def repeat(times: Any, step: Callable[..., Any], *carry: Any) -> tuple[Any, ...]:
    """`step` applied `times` times; a `while` loop, since `times` is not known when tracing."""
    counted = lambda c: (c[0] + 1, *step(*c[1:]))  # noqa: E731
    return lax.while_loop(lambda c: c[0] < times, counted, (0, *carry))[1:]


@program(modes="forward")
def while_for_each_of_a_batch(w, ws, x):
    step = lambda v, w, x: (w, -v, layer(v, x))  # noqa: E731
    loop = lambda n, w, x: repeat(n + (x[0] > 0), step, w, 2 * w, x)  # noqa: E731
    v, w, x = jax.vmap(loop, (0, 0, None))(jnp.arange(LAYERS), ws, x)
    return jnp.einsum("loi,li->o", v, x) + w[1] @ x[1]


@program(modes="forward")
def while_for_each_with_one_carry(w, ws, x):
    step = lambda w, x: (-w, layer(w, x))  # noqa: E731
    loop = lambda n, x: repeat(n + (x[0] > 0), step, w, x)  # noqa: E731
    w, x = jax.vmap(loop, (0, None))(jnp.arange(LAYERS), x)
    return jnp.einsum("loi,li->o", w, x)


@program("while", modes="forward")
def while_for_each_of_other_structure(w, ws, x):
    step = lambda w, x: (w.T, layer(w, x))  # noqa: E731
    w, x = jax.vmap(lambda n: repeat(n, step, w, x))(jnp.arange(LAYERS))
    return jnp.einsum("loi,li->o", w, x)


# ------------------------------------------------------------------------------------ cond, switch


@program(dense_batched=True)
def cond_operand(w, ws, x):
    return lax.cond(x[0] < 0, lambda w, x: w @ x, layer, w, x)


@program(dense_batched=True)
def cond_closed_over(w, ws, x):
    return lax.cond(x[0] < 0, lambda: layer(w, x), lambda: layer(ws[0], x))


@program(dense_batched=True)
def cond_result(w, ws, x):
    return lax.cond(x[0] < 0, lambda: w, lambda: -w) @ x


@program("cond")
def cond_result_of_two_structures(w, ws, x):
    return lax.cond(x[0] < 9, lambda: w, lambda: jnp.ones_like(w)) @ x


@program(dense_batched=True)
def cond_where(w, ws, x):
    return jnp.where(x[0] < 0, w, -w) @ x


@program(dense_batched=True)
def switch(w, ws, x):
    branches = [lambda: layer(w, x), lambda: ws[1] @ x, lambda: x]
    return lax.switch(jnp.int32(jnp.abs(x[0]) < 9), branches)


@program(dense_batched=True)
def scan_cond(w, ws, x):
    step = lambda x, v: (lax.cond(x[0] < 0, layer, lambda v, x: layer(w, x), v, x), None)  # noqa: E731
    return lax.scan(step, x, ws)[0]


@program()
def platform_dependent(w, ws, x):
    return lax.platform_dependent(w, x, tpu=lambda w, x: x, default=layer)


# ----------------------------------------------------------------------------- custom derivatives


def twice_the_derivative(**options: Any) -> Callable[..., Any]:
    call = jax.custom_jvp(layer)

    def derivative(primals, tangents):
        tangents = [jnp.zeros_like(p) if _is_zero(t) else t for p, t in zip(primals, tangents)]  # noqa: B905
        y, y_dot = jax.jvp(layer, primals, tuple(tangents))
        return y, 2 * y_dot

    call.defjvp(derivative, **options)
    return call


def _is_zero(t: Any) -> bool:
    return isinstance(t, jax.custom_derivatives.SymbolicZero)


@program()
def custom_jvp(w, ws, x):
    return twice_the_derivative()(w, x)


@program()
def custom_jvp_symbolic_zeros(w, ws, x):
    return twice_the_derivative(symbolic_zeros=True)(w, x)


@program()
def custom_jvp_each(w, ws, x):
    """One rule for each argument; the integer has none."""
    call = jax.custom_jvp(lambda w, n, x: layer(w, x) * n)
    call.defjvps(lambda t, y, w, n, x: t @ x, None, lambda t, y, w, n, x: n * (w @ t))
    return call(w, jnp.int32(2), x)


@program("custom_jvp_call")
def custom_jvp_result(w, ws, x):
    call = jax.custom_jvp(lambda w: w)
    call.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))
    return call(w) @ x


@program()
def scan_custom_jvp(w, ws, x):
    return lax.scan(lambda x, w: (twice_the_derivative()(w, x), None), x, ws)[0]


def with_backward(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    call = jax.custom_vjp(lambda *args: forward(*args)[0])
    call.defvjp(forward, backward)
    return call


@program(modes="reverse")
def custom_vjp_weight_as_residual(w, ws, x):
    forward = lambda w, x: (w @ x, (w, x))  # noqa: E731
    backward = lambda saved, ct: (jnp.outer(ct, saved[1]), 2 * (ct @ saved[0]))  # noqa: E731
    return with_backward(forward, backward)(w, x)


@program(modes="reverse")
def custom_vjp_computed_residual(w, ws, x):
    forward = lambda w, x: (w @ x, (-w.T, jnp.sin(x)))  # noqa: E731
    backward = lambda saved, ct: (jnp.outer(ct, saved[1]), saved[0] @ ct)  # noqa: E731
    return with_backward(forward, backward)(w, x)


@program(modes="reverse")
def custom_vjp_of_integers(w, ws, x):
    forward = lambda w, n, x: (w @ x * n, (w, n, x))  # noqa: E731
    backward = lambda saved, ct: (jnp.outer(ct, saved[2]), None, ct @ saved[0])  # noqa: E731
    return with_backward(forward, backward)(w, jnp.int32(3), x)


@program(modes="reverse")
def custom_vjp_nondiff_argnums(w, ws, x):
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def call(activation, w, x):
        return activation(w @ x)

    call.defvjp(
        lambda activation, w, x: (activation(w @ x), (w, x)),
        lambda activation, saved, ct: (jnp.outer(activation(ct), saved[1]), ct @ saved[0]),
    )
    return call(jnp.sin, w, x)


@program("custom_vjp_call", modes="reverse")
def custom_vjp_result(w, ws, x):
    return with_backward(lambda w: (w, None), lambda _, ct: (2 * ct,))(w) @ x


@program(modes="reverse")
def scan_custom_vjp(w, ws, x):
    return lax.scan(lambda x, w: (custom_vjp_weight_as_residual(w, ws, x), None), x, ws)[0]


@program("custom_jvp_call", modes="reverse", constant=True)  # which marks `w` as constant
def filter_custom_vjp(w, ws, x):
    call = eqx.filter_custom_vjp(lambda x, w: layer(w, x))
    call.def_fwd(lambda perturbed, x, w: (layer(w, x), None))
    call.def_bwd(lambda saved, ct, perturbed, x, w: ct @ w)
    return call(x, lax.stop_gradient(w))


@program(modes="reverse")
def checkpointed_while(w, ws, x):
    """Its derivative is a `custom_vjp` over `while` loops."""
    loop = functools.partial(eqx.internal.while_loop, kind="checkpointed", max_steps=4)
    return loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, layer(w, c[1])), (0, x))[1]


@program(modes="forward")
def custom_vmap(w, ws, x):
    call = jax.custom_batching.custom_vmap(layer)

    @call.def_vmap
    def rule(axis_size, in_batched, w, x):
        return jax.vmap(layer, [0 if b else None for b in in_batched])(w, x), True

    return call(w, x) + jax.vmap(call)(ws, jnp.stack([x] * LAYERS))[0]


@program()
def ste(w, ws, x):
    return w @ eqq.ste(eqq.Array8B.quantize)(jnp.stack([x, x]).T)


@program(constant=True)
def stop_gradient(w, ws, x):
    return lax.stop_gradient(w) @ x


@program()
def linearize(w, ws, x):
    y, forward = jax.linearize(lambda x: layer(w, x), x)
    return y + forward(x)


# -------------------------------------------------------------------------------------- shard_map

MESH = jax.make_mesh((SIZE,), ("d",), (AxisType.Auto,), devices=jax.devices()[:SIZE])


def shard(f: Callable[..., Any], in_specs: Any, out_specs: Any, **options: Any) -> Any:
    return jax.shard_map(f, mesh=MESH, in_specs=in_specs, out_specs=out_specs, **options)


@program()
def shard_map_replicated(w, ws, x):
    each = shard(lambda w, xs: xs @ w.T, (P(), P("d")), P("d"))
    return each(w, jnp.outer(x, x))


@program()
def shard_map_rows(w, ws, x):
    return shard(layer, (P("d"), P()), P("d"), check_vma=False)(w, x)


@program()
def shard_map_columns(w, ws, x):
    return shard(lambda w, x: lax.psum(w @ x, "d"), (P(None, "d"), P("d")), P())(w, x)


@program()
def shard_map_closed_over(w, ws, x):
    return shard(lambda x: x + (w @ lax.all_gather(x, "d", tiled=True)).sum(), P("d"), P("d"))(x)


@program()
def shard_map_scan_checkpoint(w, ws, x):
    def local(ws, xs):
        return lax.scan(lambda x, w: (jax.checkpoint(layer)(w, x), None), xs[0], ws)[0][None]

    return shard(local, (P(), P("d")), P("d"))(ws, jnp.outer(x, x))


@program()
def scan_shard_map(w, ws, x):
    step = shard(lambda w, x: jnp.tanh(w @ x), (P("d"), P()), P("d"))
    return lax.scan(lambda x, w: (step(w, x), None), x, ws)[0]


@program()
def shard_map_result(w, ws, x):
    turned = shard(lambda w: (w.T, -w), (P("d"),), (P(None, "d"), P("d")))(w)
    return turned[0] @ x + turned[1] @ x


# ------------------------------------------------------------------------------------------ tests


def _values(key: int, *shape: int) -> jax.Array:
    """Row sums of matrices are below 1, so that no program makes anything larger than `x`."""
    return jr.uniform(jr.key(key), shape, minval=-1) / (SIZE if len(shape) > 1 else 1)


def quantize(how: str = "rows") -> Any:
    options = {
        "rows": ({}, {}),
        "blocks": ({"block_size": 2}, {"block_size": 2}),
        "one scale for the stack": ({"axis": 0}, {"axis": (0, 2)}),
    }[how]
    shapes = (SIZE, SIZE), (LAYERS, SIZE, SIZE)
    return tuple(
        eqq.Array8B.quantize(_values(i, *shape), **kwargs)
        for i, (shape, kwargs) in enumerate(zip(shapes, options, strict=True))
    )


X = _values(2, SIZE)
X3 = jnp.outer(jnp.arange(3) - 1, X)


def assert_agree(found: Any, expected: Any, largest: int = 1) -> None:
    """Equal up to the rounding of at most `2 * LAYERS` products of `SIZE` terms, whose factors
    are at most `largest`: a code, in a derivative with respect to a scale."""

    def agree(x: Any, y: Any) -> None:
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)
        magnitude = largest * max(1, float(jnp.abs(y).max()))
        eps = float(jnp.finfo(x.dtype).eps) if eqx.is_inexact_array(x) else 0
        atol = eps * 2 * LAYERS * SIZE * magnitude
        np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=0, atol=atol)

    jtu.tree_map(agree, found, expected)


def loss(y: Any) -> jax.Array:
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jtu.tree_leaves(y))


def derived(run: Callable[..., Any], modes: str) -> dict[str, Callable[..., Any]]:
    """`run(w, ws, x)`, transformed with respect to `x` in all ways that it allows."""

    def scalar(w: Any, ws: Any, x: jax.Array) -> jax.Array:
        return loss(run(w, ws, x))

    def jvp(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda w, ws, x: jax.jvp(lambda x: f(w, ws, x), (x,), (jnp.cos(x),))

    found = {"value": run, "batched": lambda w, ws, x: jax.vmap(run, (None, None, 0))(w, ws, X3)}
    if "forward" in modes:
        found["jvp"] = jvp(run)
    if "reverse" in modes:
        found["gradient"] = jax.grad(scalar, 2)
    if modes == "forward reverse":
        found["Hessian product"] = jvp(jax.grad(scalar, 2))
    return found


def of_weights(run: Callable[..., Any], modes: str) -> dict[str, Callable[..., Any]]:
    """The derivatives of `run(w, ws, x)` with respect to all that is inexact in `w` and `ws`:
    the scales, if they are quantized."""

    def split(w: Any, ws: Any, x: jax.Array) -> Any:
        inexact, others = eqx.partition((w, ws), eqx.is_inexact_array)
        return inexact, lambda inexact: run(*eqx.combine(inexact, others), x)

    def jvp(*args: Any) -> Any:
        inexact, run = split(*args)
        return jax.jvp(run, (inexact,), (jtu.tree_map(jnp.ones_like, inexact),))

    def gradient(*args: Any) -> Any:
        inexact, run = split(*args)
        return jax.grad(lambda inexact: loss(run(inexact)))(inexact)

    found = {"forward": jvp, "reverse": gradient}
    return {f"{mode} of weights": f for mode, f in found.items() if mode in modes}


def check(program: Program, *weights: Any) -> None:
    """Transformed outside of `implicit`, inside, and on the materialized weights."""

    def dense(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda w, ws, x: f(*eqq.materialize((w, ws)), x)

    def tolerant(f: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with eqq.on_materialize("ignore"):
                return f(*args)

        return run

    run, modes = program.run, program.modes
    of_x, of_w = derived(run, modes), of_weights(run, modes)
    inside = {name: eqq.implicit(f) for name, f in of_x.items()}
    if program.dense_batched:
        inside["batched"] = tolerant(inside["batched"])
    programs = {
        "inside": inside,
        "outside": derived(eqq.implicit(run), modes),
        "dense": {name: dense(f) for name, f in of_x.items()},
        "inside, of weights": {name: eqq.implicit(f) for name, f in of_w.items()},
        "dense, of weights": {name: dense(f) for name, f in of_w.items()},
        "outside, of scales": of_weights(eqq.implicit(run), modes),
        "dense, of scales": of_weights(dense(run), modes),
    }
    compare = jax.jit(
        lambda *args: {key: {k: f(*args) for k, f in fs.items()} for key, fs in programs.items()}
    )
    with eqq.on_materialize("ignore") if program.dense else eqq.strict():
        found = compare(*weights, X)
    assert_agree(found["inside"], found["dense"])
    assert_agree(found["outside"], found["dense"])
    assert_agree(found["inside, of weights"], found["dense, of weights"])
    assert_agree(found["outside, of scales"], found["dense, of scales"], largest=127)
    moves = jtu.tree_map(jnp.any, found["outside, of scales"])
    assert program.constant or all(any(jtu.tree_leaves(each)) for each in moves.values())


def audited(program: Program, *weights: Any) -> tuple[str, ...]:
    audit = eqq.audit(program.run, *weights, X)
    assert audit.rows
    return tuple(row.primitive for row in audit.densified)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name):
    check(PROGRAMS[name], *quantize())
    assert audited(PROGRAMS[name], *quantize()) == PROGRAMS[name].dense


@pytest.mark.parametrize("how", ["blocks", "one scale for the stack"])
@pytest.mark.parametrize(
    "name",
    ["scan_xs", "scan_ys", "scan_checkpoint", "vmap_scan", "lax_map", "while_for_each_of_a_batch"],
)
def test_program_with_other_scales(name, how):
    check(PROGRAMS[name], *quantize(how))
    assert audited(PROGRAMS[name], *quantize(how)) == PROGRAMS[name].dense


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_without_jit(name):
    program, weights = PROGRAMS[name], quantize()
    with eqq.on_materialize("ignore") if program.dense else eqq.strict():
        found = eqq.implicit(program.run)(*weights, X)
    assert_agree(found, program.run(*eqq.materialize(weights), X))


def test_residuals_are_packed():
    """What the forward pass keeps for the backward pass holds no dense weight."""
    w, ws = quantize()
    for name in ("scan_xs", "scan_checkpoint", "custom_vjp_weight_as_residual", "switch"):
        run = eqq.implicit(PROGRAMS[name].run)
        _, pull_back = jax.vjp(lambda x: run(w, ws, x), X)  # noqa: B023
        residuals = jtu.tree_leaves(pull_back)
        assert any(leaf.dtype == jnp.int8 for leaf in residuals)
        assert not any(
            leaf.shape in (w.shape, ws.shape) and leaf.dtype == w.dtype for leaf in residuals
        )


def test_the_name_of_an_inner_jit_is_kept():
    assert "name=layer" in str(jax.make_jaxpr(eqq.implicit(jit_argument))(*quantize(), X))


def test_only_the_branch_of_this_platform_is_lowered():
    only_on_tpu = jax.extend.core.Primitive("only_on_tpu")
    only_on_tpu.def_abstract_eval(lambda x: x)

    def run(w: Any, x: jax.Array) -> jax.Array:
        return lax.platform_dependent(w, x, tpu=lambda w, x: only_on_tpu.bind(w @ x), default=layer)

    w, _ = quantize()
    with eqq.strict():
        found = jax.jit(eqq.implicit(run))(w, X)
    assert_agree(found, layer(w.materialize(), X))


@pytest.mark.parametrize("kind", [jax.custom_jvp, jax.custom_vjp])
def test_weights_closed_over_by_custom_derivatives(kind):
    """Such functions have no derivative with respect to what they close over: an error, no zero."""

    def run(w: Any, x: jax.Array) -> jax.Array:
        call = kind(lambda x: w @ x)
        if kind is jax.custom_jvp:
            call.defjvp(lambda primals, tangents: (w @ primals[0], 2 * (w @ tangents[0])))
        else:
            call.defvjp(lambda x: (w @ x, None), lambda saved, ct: (2 * (ct @ w),))
        return call(x).sum()

    w, _ = quantize()
    assert_agree(eqq.implicit(run)(w, X), run(w.materialize(), X))
    inside = eqq.implicit(jax.grad(run, 1))
    assert_agree(inside(w, X), 2 * w.materialize().sum(0))
    with pytest.raises(jax.errors.UnexpectedTracerError):
        eqx.filter_grad(eqq.implicit(run))(w, X)


# --------------------------------------------------------------------------------------- implicit


@pytest.mark.parametrize("transform", [lambda f: f, eqx.filter_jit], ids=["eager", "filter_jit"])
def test_results_of_implicit(transform):
    w, _ = quantize()

    def run(w: Any, *, name: str, times: int) -> dict[str, Any]:
        assert type(times) is int
        dense = {"product": w @ X * times, "constant": jnp.arange(3), "weak": jnp.asarray(2.0)}
        return dense | {
            "packed": [w.T, -w],
            "None": None,
            "name": name,
            "times": times,
            "sum": jnp.sum,
        }

    found = transform(eqq.implicit(run))(w, name="w", times=3)
    expected = run(w.materialize(), name="w", times=3)
    assert [type(x) for x in found["packed"]] == [eqq.Array8B, eqq.Array8B]
    for name in ("None", "name", "times", "sum"):
        assert found.pop(name) is expected.pop(name)
    assert all(isinstance(found[name], jax.Array) for name in ("product", "constant", "weak"))
    assert_agree(eqq.materialize(found), expected)


NUMPY = np.float32(2), np.float64(2), np.arange(SIZE), np.ones(SIZE, bool), np.ones(SIZE)
JAX = jnp.asarray(2), jnp.asarray(2.5), jnp.float16(2), jnp.arange(SIZE), jnp.ones(SIZE, bool)


@pytest.mark.parametrize("value", [2, 2.5, True, *NUMPY, *JAX], ids=repr)
def test_inputs_of_implicit(value):
    """NumPy, integers, Python numbers and weak types promote as they do under `filter_jit`."""
    w, _ = quantize()

    def run(w: Any, value: Any) -> Any:
        return w @ X * value, value * w.astype(jnp.bfloat16).T @ X.astype(jnp.bfloat16), value * 2

    with eqq.on_materialize("ignore"):  # by an array, the second product is elementwise
        found = eqq.implicit(run)(w, value)
    expected = eqx.filter_jit(run)(w.materialize(), value)
    assert type(found[2]) is type(expected[2]) or isinstance(found[2], jax.Array)
    assert_agree(jtu.tree_map(jnp.asarray, found), jtu.tree_map(jnp.asarray, expected))


def test_implicit_over_tracers_of_others():
    """Closed over in every order: `implicit` in `jit` in `vmap` in `grad`, and nested."""
    w, ws = quantize()

    def run(w: Any, ws: Any, x: jax.Array, wrap: Any) -> jax.Array:
        def each(w_: Any, factor: jax.Array) -> jax.Array:
            inner = jax.jit(lambda x: wrap(lambda y: w @ (w_ @ y) * factor)(x + wrap(layer)(w, x)))
            return inner(x)

        return jax.vmap(each)(ws, jnp.arange(1.0, LAYERS + 1)).sum()

    with eqq.strict():
        found = eqx.filter_value_and_grad(lambda weights: run(*weights, X, eqq.implicit))((w, ws))
    expected = eqx.filter_value_and_grad(
        lambda weights: run(*eqq.materialize(weights), X, lambda f: f)
    )((w, ws))
    assert_agree(found, expected, largest=127)
