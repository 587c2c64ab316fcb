"""Training: what is trained, derivatives through every format, and quantization-aware training."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.test_util
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import normal, small_mlp, train

import eqquant as eqq
from eqquant.testing import QUANTIZERS


# With blocks as small as these weights. The search compiles for seconds.
FORMATS = {name: QUANTIZERS[name].with_blocks(8) for name in QUANTIZERS if name != "nf4 search"}
each_format = pytest.mark.parametrize("name", FORMATS)


# --------------------------------------------------------------------------------- derivatives


@each_format
def test_derivatives_of_a_model_of_each_format(name):
    """Reverse and forward mode, and a Hessian-vector product, inside and outside of `implicit`."""
    model, x = eqq.quantize(small_mlp(), FORMATS[name]), normal(16)

    def loss(x, model):
        return jnp.sum(jnp.sin(model(x)) ** 2)

    def everything(loss, x, model):
        gradient = jax.grad(loss)
        along = jnp.cos(x)
        return (
            gradient(x, model),
            jax.jvp(lambda x: loss(x, model), (x,), (along,))[1],
            jax.jvp(lambda x: gradient(x, model), (x,), (along,))[1],
        )

    want = eqx.filter_jit(partial(everything, loss))(x, eqq.materialize(model))
    with eqq.strict():
        outside = eqx.filter_jit(partial(everything, eqq.implicit(loss)))(x, model)
        inside = eqx.filter_jit(eqq.implicit(partial(everything, loss)))(x, model)
    for got in (outside, inside):
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-4)


@each_format
def test_finite_differences(name):
    w, x = FORMATS[name](normal(8, 16)), normal(3, 16, seed=1)
    for program in (lambda x, w: x @ w.T, lambda x, w: x[:, :8] @ w, lambda x, w: (x @ w.T) @ w):
        function = partial(lambda program, x: eqq.implicit(program)(x, w), program)
        jax.test_util.check_grads(function, (x,), order=2, rtol=2e-2, atol=2e-2, eps=1e-2)


@each_format
def test_scales_are_differentiated_when_asked_for(name):
    w, x = FORMATS[name](normal(8, 16)), normal(3, 16, seed=1)
    trained, frozen = eqx.partition(w, eqq.trainable(w, scales=True))
    assert jtu.tree_leaves(trained)

    def loss(trained, evaluate):
        return jnp.sum(jnp.sin(evaluate(lambda w: x @ w.T, eqx.combine(trained, frozen))))

    got = jax.grad(partial(loss, evaluate=lambda f, w: eqq.implicit(f)(w)))(trained)
    want = jax.grad(partial(loss, evaluate=lambda f, w: f(w.materialize())))(trained)
    for g, w in zip(jtu.tree_leaves(got), jtu.tree_leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


# A stack of 8 layers of 256 x 256: with every dequantized weight saved, these would take 2.3 MiB.
@each_format
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_backward_pass_of_a_scanned_stack_holds_no_dense_weights(name, checkpoint):
    stack = jax.eval_shape(
        jax.vmap(QUANTIZERS[name]), jax.ShapeDtypeStruct((8, 256, 256), jnp.float32)
    )

    def loss(x, stack):
        def layer(x, w):
            return jnp.tanh(w @ x), None

        x, _ = jax.lax.scan(jax.checkpoint(layer) if checkpoint else layer, x, stack)
        return jnp.sum(x**2)

    compiled = (
        jax.jit(eqq.implicit(jax.grad(loss)))
        .lower(jax.ShapeDtypeStruct((256,), jnp.float32), stack)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 0.4 * 2**20


# ------------------------------------------------------------------------------------ trainable


@each_format
def test_scales_are_frozen_by_default_and_optax_works_on_the_rest(name):
    model = eqq.quantize(small_mlp(), FORMATS[name])
    trained, frozen = eqx.partition(model, eqq.trainable(model))
    assert [leaf.shape for leaf in jtu.tree_leaves(trained)] == [(32,), (32,), (4,)]
    x = normal(10, 16)

    def loss(trained):
        return jnp.mean((eqq.implicit(jax.vmap(eqx.combine(trained, frozen)))(x) - 1) ** 2)

    trained, losses = train(loss, trained, optax.adam(0.05), steps=20)
    assert losses[-1] < losses[0]
    after = eqx.combine(trained, frozen)
    for old, new in zip(model.layers, after.layers, strict=True):
        np.testing.assert_array_equal(old.weight.materialize(), new.weight.materialize())


# ------------------------------------------------------------------ quantization-aware training


@each_format
@pytest.mark.parametrize("transform", ["eager", "jit", "vmap", "scan", "checkpoint"])
def test_fake_quantize_has_the_values_of_the_format_and_the_derivative_of_the_identity(
    name, transform
):
    fake, x, ct = eqq.fake_quantize(FORMATS[name]), normal(2, 4, 16), normal(2, 4, 16, seed=1)

    def pulled_back(x, ct):
        y, pull_back = jax.vjp(fake, x)
        return y, pull_back(ct)[0]

    run = {
        "eager": lambda: [pulled_back(*each) for each in zip(x, ct, strict=True)],
        "jit": lambda: [jax.jit(pulled_back)(*each) for each in zip(x, ct, strict=True)],
        "vmap": lambda: list(zip(*jax.vmap(pulled_back)(x, ct), strict=True)),
        "scan": lambda: list(
            zip(*jax.lax.scan(lambda c, each: (c, pulled_back(*each)), 0, (x, ct))[1], strict=True)
        ),
        "checkpoint": lambda: [jax.checkpoint(pulled_back)(*e) for e in zip(x, ct, strict=True)],
    }[transform]
    for i, (y, cotangent) in enumerate(run()):
        np.testing.assert_array_equal(y, FORMATS[name](x[i]).materialize())
        np.testing.assert_array_equal(cotangent, ct[i])


def test_the_clipped_gradient_stops_beyond_the_largest_value():
    x = jnp.asarray([[0.1, -0.2, 3.0, -4.0]])  # mean magnitude 1.825
    gradient = jax.grad(lambda x: eqq.fake_quantize(eqq.Array1B.quantize, "clipped")(x).sum())(x)
    np.testing.assert_array_equal(gradient, [[1, 1, 0, 0]])
    curvature = jax.hessian(
        lambda x: (eqq.fake_quantize(eqq.Array1B.quantize, "clipped")(x) ** 2).sum()
    )
    np.testing.assert_array_equal(curvature(x[0]), 2 * jnp.diag(jnp.asarray([1.0, 1, 0, 0])))
    for how in (eqq.Array8B.quantize, eqq.ArrayNF4.quantize):  # nothing is beyond their scale
        gradient = jax.grad(lambda x: eqq.fake_quantize(how, "clipped")(x).sum())(x)  # noqa: B023
        np.testing.assert_array_equal(gradient, jnp.ones_like(x))


@each_format
def test_a_model_converts_to_exactly_the_weights_it_was_trained_with(name):
    model, x = small_mlp(), normal(16)
    fake = eqq.fake_quantize(FORMATS[name])

    def loss(model):
        return jnp.sum(eqq.quantize(model, fake)(x) ** 2)

    model, _ = train(loss, model, optax.sgd(0.01), steps=3)
    trained_with, converted = eqq.quantize(model, fake), eqq.quantize(model, FORMATS[name])
    for a, b in zip(trained_with.layers, converted.layers, strict=True):
        np.testing.assert_array_equal(a.weight, b.weight.materialize())


def test_learned_step():
    """Against the formulas of the paper."""
    x = jnp.asarray([[0.3, -0.74, 40.0, -50.0]])
    learned = eqq.LearnedStep(jnp.asarray([[0.25]]))
    y, pull_back = jax.vjp(lambda learned, x: learned(x), learned, x)
    np.testing.assert_array_equal(y, [[0.25, -0.75, 31.75, -31.75]])
    np.testing.assert_array_equal(learned.quantize(x).materialize(), y)
    by_step, by_x = pull_back(jnp.ones_like(x))
    np.testing.assert_array_equal(by_x, [[1, 1, 0, 0]])
    slope = (1 - 1.2) + (-3 + 2.96) + 127 - 127
    np.testing.assert_allclose(by_step.step, [[slope / np.sqrt(127 * 4)]], rtol=1e-4)


def test_a_learned_step_learns_and_converts_exactly():
    x = normal(8, 64)
    learned = eqq.LearnedStep.of(x)
    learned, losses = train(
        lambda learned: jnp.mean((learned(x) - x) ** 2), learned, optax.adam(3e-3), steps=100
    )
    assert losses[-1] < losses[0] / 2
    converted = eqq.quantize({"w": x}, {"w": learned.quantize})["w"]
    np.testing.assert_array_equal(converted.materialize(), learned(x))


def test_bad_input_is_named_shown_and_answered():
    with pytest.raises(
        ValueError, match=r"how must keep the shape; it turned \(2, 3\) into \(3, 2\)"
    ):
        eqq.fake_quantize(lambda x: x.T)(jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="needs a format with scales"):
        jax.grad(lambda x: eqq.fake_quantize(jnp.round, "clipped")(x).sum())(jnp.ones(3))
    with pytest.raises(TypeError, match=r"LearnedStep\.of takes a floating-point array"):
        eqq.LearnedStep.of(jnp.arange(3))
