"""Programs with a quantized array in every role that an array can play: calls, loops, branches,
custom derivatives, sharded maps. Each is a function of a matrix `w`, a stack of matrices `ws` and a
vector `x`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
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
