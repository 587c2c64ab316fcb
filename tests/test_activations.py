"""Rounding activations is a property of the call: for every format of integers, by row or in blocks."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import eqquant as eqq
from eqquant.kernels import Int8Blocks, quantized_dot_general, quantized_ragged_dot


FORMATS = {
    "int8": eqq.Array8B.quantize,
    "int8 in blocks": partial(eqq.Array8B.quantize, block_size=32),
    "ternary": eqq.Array1B.quantize,
    "rsr": eqq.RSROperatorBinary.quantize,
}
each_format = pytest.mark.parametrize("format", FORMATS)
each_rounding = pytest.mark.parametrize("activations", ["int8", Int8Blocks(32)], ids=str)
LAST = (((1,), (1,)), ((), ()))


def normal(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def rounded(x: Any, activations: Any) -> np.ndarray:
    """The rows of `x`, by NumPy."""
    x = np.asarray(x, np.float64)
    size = x.shape[-1] if activations == "int8" else activations.size
    out = []
    for start in range(0, x.shape[-1], size):
        block = x[..., start : start + size]
        unit = np.abs(block).max(-1, keepdims=True) / 127
        out.append(np.round(block / unit) * unit)
    return np.concatenate(out, -1)


def dense(w: Any) -> np.ndarray:
    return np.asarray(w.materialize(), np.float64)


@each_format
@each_rounding
@pytest.mark.parametrize("length", [64, 70])
def test_products_are_those_of_rounded_activations(format, activations, length):
    x, w = normal(3, length), FORMATS[format](normal(24, length))
    want = rounded(x, activations) @ dense(w).T
    got = quantized_dot_general(x, w, LAST, activations=activations)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(x, np.float64) @ dense(w).T - want).max() > 1e-3
    with eqq.strict():
        for f, x_, axes in (
            (lambda x, w: x @ w.T, x, (0, 1)),
            (lambda x, w: w @ x, x.T, (1, 0)),
            (lambda x, w: jax.vmap(lambda row: w @ row)(x), x, (0, 1)),
            (lambda x, w: lax.map(lambda row: w @ row, x), x, (0, 1)),
        ):
            got = jax.jit(eqq.implicit(f, activations=activations))(x_, w)
            np.testing.assert_allclose(got, want.transpose(axes), rtol=1e-4, atol=1e-4)


@each_rounding
@pytest.mark.parametrize("implementation", ["reference", "xla", "tiled", "int8_digits"])
def test_by_any_implementation(activations, implementation):
    x, w = normal(3, 70), eqq.Array8B.quantize(normal(24, 70))
    how = dict(activations=activations, implementation=implementation)
    got = quantized_dot_general(x, w, LAST, **how)
    np.testing.assert_allclose(got, rounded(x, activations) @ dense(w).T, rtol=1e-4, atol=1e-4)


@each_format
@each_rounding
def test_derivatives_are_those_without_rounding(format, activations):
    x, w = normal(3, 70), FORMATS[format](normal(24, 70))
    y, pull_back = jax.vjp(
        lambda x: eqq.implicit(lambda x, w: x @ w.T, activations=activations)(x, w), x
    )
    ct = normal(*y.shape)
    np.testing.assert_allclose(pull_back(ct)[0], ct @ w.materialize(), rtol=1e-4, atol=1e-4)


@each_rounding
def test_only_products_with_integers_are_rounded(activations):
    x, w = normal(3, 64), eqq.ArrayNF4.quantize(normal(24, 64))
    f = lambda x, w: x @ w.T  # noqa: E731
    np.testing.assert_array_equal(
        eqq.implicit(f, activations=activations)(x, w), eqq.implicit(f)(x, w)
    )


def test_what_is_asked_for_comes_before_what_the_weight_says():
    x, dense = normal(3, 64), normal(24, 64)
    plain, w8a8 = (eqq.Array8B.quantize(dense, activations=a) for a in ("float", "int8"))
    run = partial(quantized_dot_general, x, dimension_numbers=LAST)
    exact, by_row = run(w=plain), run(w=w8a8)
    assert (exact != by_row).any()
    np.testing.assert_array_equal(run(w=plain, activations="int8"), by_row)
    np.testing.assert_array_equal(run(w=w8a8, activations="float"), exact)
    product = lambda x, w: x @ w.T  # noqa: E731
    np.testing.assert_array_equal(eqq.implicit(product, activations="float")(x, w8a8), exact)
    # The innermost counts; None changes nothing.
    inner = eqq.implicit(product, activations="float")
    outer = eqq.implicit(lambda x, w: product(x, w), activations="int8")
    np.testing.assert_array_equal(outer(x, plain), by_row)
    np.testing.assert_array_equal(inner(x, w8a8), exact)


def test_compiled_functions_and_loops_see_it():
    x, w = normal(3, 64), eqq.Array8B.quantize(normal(64, 64))

    def loop(x: Any, w: Any) -> Any:
        return lax.fori_loop(0, 1, lambda i, x: jax.jit(jnp.matmul)(x, w.T), x)

    apply = eqx.filter_jit(lambda f, x, w: f(x, w))
    exact, by_row, in_blocks = (
        apply(eqq.implicit(loop, activations=a), x, w) for a in (None, "int8", Int8Blocks(32))
    )
    for got, activations in ((by_row, "int8"), (in_blocks, Int8Blocks(32))):
        want = rounded(x, activations) @ dense(w).T
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(exact, x @ w.materialize().T, rtol=1e-4, atol=1e-4)
    again = apply(eqq.implicit(loop, activations="int8"), x, w)
    np.testing.assert_array_equal(again, by_row)


def test_models_and_other_contractions():
    model, x = eqx.nn.MLP(64, 8, 64, 1, key=jax.random.key(0)), normal(64)
    packed = eqq.quantize(model, eqq.Array8B.quantize)
    rounds = eqq.implicit(packed, activations=Int8Blocks(16))
    assert 0 < np.abs(np.asarray(rounds(x) - eqq.implicit(packed)(x))).max() < 0.05
    image, kernel = normal(1, 16, 4, 4), eqq.Array8B.quantize(normal(8, 16, 1, 1), axis=(1, 2, 3))
    convolve = partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
    np.testing.assert_array_equal(
        eqq.implicit(convolve, activations="int8")(image, kernel),
        eqq.implicit(convolve)(image, kernel),
    )
    experts, sizes = eqq.Array8B.quantize(normal(2, 64, 3), axis=1), jnp.asarray([2, 3])
    rows = normal(5, 64)
    got = eqq.implicit(lax.ragged_dot, activations="int8")(rows, experts, sizes)
    want = np.einsum("ri,rio->ro", rounded(rows, "int8"), dense(experts)[[0, 0, 1, 1, 1]])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    exact = lax.ragged_dot(rows, experts.materialize(), sizes)
    got = quantized_ragged_dot(rows, experts, sizes)
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-4)


def test_what_is_refused():
    x, w = normal(3, 4), eqq.Array8B.quantize(normal(3, 4))
    run = partial(quantized_dot_general, x, w, LAST)
    with pytest.raises(
        ValueError, match=r"'float', 'int8' or Int8Blocks\(size\) of a positive size; it is 'int4'"
    ):
        run(activations="int4")
    with pytest.raises(ValueError, match="it is 'fp8'"):
        eqq.implicit(lambda x, w: x @ w.T, activations="fp8")(x, w)
    with pytest.raises(ValueError, match=r"a positive size; it is Int8Blocks\(size=0\)"):
        run(activations=Int8Blocks(0))
    both = (((0, 1), (0, 1)), ((), ()))
    with pytest.raises(ValueError, match=r"Int8Blocks\(size=2\) takes sums along a single axis"):
        quantized_dot_general(x, w, both, activations=Int8Blocks(2))
