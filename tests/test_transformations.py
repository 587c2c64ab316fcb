"""Every program of `programs.py` agrees with itself on the materialized matrices: its value, its
derivatives (with respect to the scales, too), its Hessian, and batched; transformed inside of
`implicit` and outside.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import in_turns
from jax import lax
from programs import jit_argument, layer, LAYERS, Program, PROGRAMS, SIZE

import eqquant as eqq
from eqquant.testing import LAYOUTS


def _values(key: int, *shape: int) -> jax.Array:
    """Row sums of matrices are below 1, so that no program makes anything larger than `x`."""
    return jr.uniform(jr.key(key), shape, minval=-1) / (SIZE if len(shape) > 1 else 1)


DENSE = _values(0, SIZE, SIZE), _values(1, LAYERS, SIZE, SIZE)


def quantize(how: str = "rows") -> Any:
    options = {
        "rows": ({}, {}),
        "blocks": ({"block_size": 2}, {"block_size": 2}),
        "one scale for the stack": ({"axis": 0}, {"axis": (0, 2)}),
    }[how]
    return tuple(
        eqq.Array8B.quantize(dense, **kwargs) for dense, kwargs in zip(DENSE, options, strict=True)
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


OTHER_FORMATS = [name for name, each in LAYOUTS.items() if each.format is not eqq.Array8B]
IN_OTHER_FORMATS = (
    *("while_constant", "cond_operand", "scan_xs", "scan_filter_checkpoint"),
    *("custom_jvp", "custom_vjp_weight_as_residual"),
)


@pytest.mark.parametrize(("name", "format"), in_turns(IN_OTHER_FORMATS, OTHER_FORMATS, each=3))
def test_program_of_other_formats(name, format):
    weights = tuple(map(LAYOUTS[format].with_blocks(2), DENSE))
    check(PROGRAMS[name], *weights)
    assert audited(PROGRAMS[name], *weights) == PROGRAMS[name].dense


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
