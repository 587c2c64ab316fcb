"""int8 activations: asked for by name, rounded row by row, exact after that."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from jax import lax

import eqquant as eqq
from eqquant.kernels.activations import rounded_rows
from eqquant.testing import LAYOUTS


W8A8 = partial(eqq.Array8B.quantize, activations="int8")
FORMATS = {
    name: each.with_blocks(16) for name, each in LAYOUTS.items() if each.takes("activations")
} | {
    "int8, one scale for a column": partial(LAYOUTS["int8"], axis=0),
    "ternary, one scale for a column": partial(LAYOUTS["ternary"], axis=0),
    "binary in blocks": partial(LAYOUTS["binary"], block_size=16),
}


def rounded(x, axis=-1):
    """By NumPy, in float64."""
    x = np.asarray(x, np.float64)
    unit = np.abs(x).max(axis, keepdims=True) / 127
    return np.round(x / unit) * unit


PRODUCTS = {
    "x @ w.T": (lambda x, w: x @ w.T, (3, 40), -1),
    "w @ x": (lambda x, w: w @ x, (40,), 0),
    "w @ x, columns": (lambda x, w: w @ x, (40, 3), 0),
    "x @ w": (lambda x, w: x @ w, (3, 24), -1),
    "stack": (lambda x, w: x @ w.T, (2, 3, 40), -1),
    "vmap": (lambda x, w: jax.vmap(lambda row: w @ row)(x), (3, 40), -1),
    "scan": (lambda x, w: lax.map(lambda row: w @ row, x), (3, 40), -1),
}


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_rounded_activations(name, how):
    run, shape, axis = PRODUCTS[name]
    x, dense = normal(*shape), normal(24, 40, seed=1)
    w = FORMATS[how](dense, activations="int8")
    with eqq.strict():
        got = jax.jit(eqq.implicit(run))(x, w)
    want = (
        run(rounded(x, axis), np.asarray(w.materialize(), np.float64))
        if name[0] in "xw"
        else (rounded(x) @ np.asarray(w.materialize(), np.float64).T)
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    # Rounding does something.
    plain = eqq.implicit(run)(x, FORMATS[how](dense))
    error = np.abs(np.asarray(got - plain)).max() / np.abs(np.asarray(plain)).max()
    assert 1e-4 < error < 2e-2


@pytest.mark.parametrize("how", FORMATS)
def test_it_is_never_silent(how):
    assert FORMATS[how](normal(4, 4)).activations == "float"
    assert FORMATS[how](normal(4, 4), activations="int8").activations == "int8"


def test_column_by_column_it_is_the_same():
    x, w = normal(1, 40), eqq.Array1B.quantize(normal(3000, 40, seed=1), activations="int8")
    product = jax.jit(eqq.implicit(lambda x, w: x @ w.T, implementation="tables"))
    columns = eqq.column_major(w)
    assert "_tables" in product.lower(x, columns).as_text(debug_info=True)
    np.testing.assert_allclose(product(x, columns), product(x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["int8", "ternary"])
def test_structural_rules_keep_it(how):
    w = FORMATS[how](normal(6, 4, 10), activations="int8")
    for moved in (
        w[0],
        w.T,
        w.reshape(24, 10),
        -w,
        w.astype(jnp.bfloat16),
        jax.vmap(lambda w: w)(w),
    ):
        assert moved.activations == "int8"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rounded_rows_are_integers_times_a_number(dtype):
    x = normal(50, 64).astype(dtype)
    rounded = rounded_rows(x, (1,))
    assert rounded.dtype == dtype
    x, rounded = (np.asarray(v, np.float64) for v in (x, rounded))
    codes = rounded * 127 / np.abs(rounded).max(1, keepdims=True)
    # The dtype moves them, but not to where another integer is nearest.
    moved = 127 * float(jnp.finfo(dtype).eps)
    assert moved < 0.5 or dtype == jnp.bfloat16
    assert np.abs(codes - np.round(codes)).max() < max(moved, 1e-4) / 2
    assert np.abs(np.round(codes) - x * 127 / np.abs(x).max(1, keepdims=True)).max() <= 0.501


def test_derivatives_are_those_without_rounding():
    x, w, ct = normal(3, 40), W8A8(normal(24, 40, seed=1)), normal(3, 24, seed=2)
    run = eqq.implicit(lambda x, w: x @ w.T)
    y, pull_back = jax.vjp(lambda x: run(x, w), x)
    np.testing.assert_allclose(pull_back(ct)[0], ct @ w.materialize(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(y, run(x, w))
    tangent = jax.jvp(lambda x: run(x, w), (x,), (x,))[1]
    np.testing.assert_allclose(tangent, x @ w.materialize().T, rtol=1e-4, atol=1e-4)
    by_scale = jax.grad(
        lambda scale: jnp.vdot(run(x, eqx.tree_at(lambda w: w.scale, w, scale)), ct)
    )(w.scale)
    want = (ct * (rounded(x) @ np.asarray(w.weight, np.float64).T)).sum(0)[:, None]
    np.testing.assert_allclose(by_scale, want, rtol=1e-3, atol=1e-2)


def test_a_model():
    model, x = eqx.nn.MLP(64, 8, 128, 2, key=jax.random.key(0)), normal(5, 64)
    small = eqq.quantize(model, W8A8)
    run = eqx.filter_jit(eqq.implicit(lambda model, x: jax.vmap(model)(x)))
    y, want = run(small, x), jax.vmap(model)(x)
    assert np.abs(np.asarray(y - want)).max() < 0.05 * np.abs(np.asarray(want)).max()


def test_what_is_not_finite_stays_so():
    w = W8A8(jnp.asarray([[1.0, -2.0]]))
    x = jnp.asarray([[1, jnp.inf], [jnp.nan, 1], [0, 0], [1, 2]])
    got = eqq.implicit(lambda x, w: x @ w.T)(x, w)
    np.testing.assert_array_equal(got[:3, 0], [-jnp.inf, jnp.nan, 0])
    np.testing.assert_allclose(got[3, 0], -3, rtol=1e-2)


def test_export_for_every_platform():
    w, x = W8A8(normal(6, 8)), normal(2, 8)

    def run(scale, weight, x):
        w = eqq.Array8B(scale, weight, activations="int8")
        return eqq.implicit(lambda x, w: x @ w.T)(x, w)

    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(run), platforms=platforms)(w.scale, w.weight, x)
    assert "xi8>" in exported.mlir_module()
    np.testing.assert_allclose(exported.call(w.scale, w.weight, x), run(w.scale, w.weight, x))


@pytest.mark.parametrize("how", ["int8", "ternary"])
@pytest.mark.parametrize("rows", [1, 16])
def test_memory(how, rows):
    how = partial(FORMATS[how], activations="int8")
    w = jax.eval_shape(how, jax.ShapeDtypeStruct((1024, 1024), jnp.float32))
    x = jax.ShapeDtypeStruct((rows, 1024), jnp.float32)
    compiled = jax.jit(eqq.implicit(lambda x, w: x @ w.T)).lower(x, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024 * 1024 * 4 / 10
