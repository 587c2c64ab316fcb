"""`Array1B`: exact integers, the scales of its two levels, its edges and its complaints."""

import pathlib

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_raises

import eqquant as eqq


GOLDEN = np.load(pathlib.Path(__file__).parent / "data" / "gguf_ternary.npz")
SHAPES = [(), (1,), (4,), (5,), (8,), (13,), (3, 7), (2, 3, 11), (0,), (0, 4), (4, 0)]


@hypothesis.given(
    x=hnp.arrays(np.int8, st.sampled_from(SHAPES), elements=st.integers(-1, 1)), data=st.data()
)
def test_ternary_integers_are_exact(x, data):
    axis = data.draw(st.sampled_from([None, *range(-x.ndim, x.ndim)]))
    q = eqq.Array1B.quantize(x, axis=axis)
    assert q.scale.dtype == jnp.int8 and (q.shape, q.dtype) == (x.shape, jnp.int8)
    np.testing.assert_array_equal(q.materialize(), x)
    assert q.materialize().dtype == jnp.int8
    np.testing.assert_array_equal(eqq.Array1B.quantize(x, jnp.float32).materialize(), x)


@hypothesis.given(
    x=hnp.arrays(np.int32, st.sampled_from(SHAPES), elements=st.sampled_from([-1, 1]))
)
def test_binary_integers_are_exact(x):
    q = eqq.Array1B.quantize(x, levels="binary")
    assert q.scale.dtype == jnp.int8 and (q.scale == 1).all()
    np.testing.assert_array_equal(q.materialize(), x)


def test_every_byte_holds_five_digits():
    digits = np.stack(np.meshgrid(*[[-1, 0, 1]] * 5, indexing="ij"), -1).reshape(-1, 5)
    q = eqq.Array1B.quantize(digits.astype(np.int8))
    assert q.weight.shape == (243, 1) and len(np.unique(q.weight)) == 243
    np.testing.assert_array_equal(q.materialize(), digits)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("name", ["normal", "ternary"])
def test_ternary_arrays_of_llama_cpp_round_trip(name, kind):
    """Blocks of 256 elements are -d, 0 or d: the least squared error is none."""
    x = GOLDEN[f"{name}/{kind}/dequant"]
    q = eqq.Array1B.quantize(x, block_size=256, scale="least_squares")
    np.testing.assert_array_equal(q.materialize(), x)
    blocks = x.reshape(8, 2, 256)
    np.testing.assert_array_equal(q.scale, np.abs(blocks).max(-1))
    ternary = np.sign(x).astype(np.int8)
    np.testing.assert_array_equal(eqq.Array1B.quantize(ternary).materialize(), ternary)


def test_the_bytes_are_those_of_tq1_0_where_these_hold_five_digits():
    """A block of TQ1_0 begins with 32 bytes: byte j holds the elements j, j + 32, ... of 160."""
    x = np.sign(GOLDEN["normal/TQ1_0/dequant"]).astype(np.int8)[:, :160]
    theirs = GOLDEN["normal/TQ1_0/bytes"][:, :32]
    ours = eqq.Array1B.quantize(x.reshape(8, 5, 32).swapaxes(1, 2).reshape(8, 160)).weight
    np.testing.assert_array_equal(ours, theirs)


def test_absmean_is_the_rounding_of_bitnet():
    x = np.asarray(jax.random.normal(jax.random.key(0), (16, 33)))
    q = eqq.Array1B.quantize(x)
    scale = np.abs(x).mean(1, keepdims=True)
    np.testing.assert_allclose(q.scale, scale, rtol=1e-6)
    pattern = np.clip(np.round(x / np.asarray(q.scale)), -1, 1)
    np.testing.assert_array_equal(q.materialize(), pattern * np.asarray(q.scale))


def test_one_scale_for_the_whole_matrix():
    x = jax.random.normal(jax.random.key(0), (16, 33))
    q = eqq.Array1B.quantize(x, axis=(0, 1))
    assert q.scale.shape == (1, 1)
    np.testing.assert_allclose(q.scale[0, 0], jnp.abs(x).mean(), rtol=1e-6)


def test_least_squares_is_the_best_of_all_patterns():
    """The best pattern takes the k largest magnitudes, for some k."""
    x = np.asarray(jax.random.normal(jax.random.key(1), (16, 256)), np.float64)
    q = eqq.Array1B.quantize(jnp.asarray(x, jnp.float32), scale="least_squares")
    got = ((np.asarray(q.materialize(), np.float64) - x) ** 2).sum(1)
    largest = np.sort(np.abs(x), 1)[:, ::-1]
    best = (x**2).sum(1) - (np.cumsum(largest, 1) ** 2 / np.arange(1, 257)).max(1)
    # Alternating finds a local minimum: not far from the best, and mostly the best.
    assert (got <= 1.002 * best).all() and np.isclose(got, best, rtol=1e-5).mean() >= 0.5


def test_binary_is_the_mean_magnitude_with_the_sign():
    x = jnp.asarray([[0.5, -1.5, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    q = eqq.Array1B.quantize(x, levels="binary")
    np.testing.assert_array_equal(q.materialize(), [[1, -1, 1, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize("options", [{}, {"scale": "least_squares"}, {"levels": "binary"}])
@pytest.mark.parametrize("std", [0.02, 1e-4, 1e4])
def test_small_and_large_weights_keep_their_size(options, std):
    x = std * jax.random.normal(jax.random.key(0), (8, 640))
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        y = eqq.Array1B.quantize(x.astype(dtype), **options).materialize()
        assert y.dtype == dtype
        assert 0.5 < float(jnp.std(y.astype(jnp.float32))) / std < 1.2


@pytest.mark.parametrize("levels", ["ternary", "binary"])
def test_blocks_need_not_divide_the_axis(levels):
    x = jax.random.normal(jax.random.key(2), (3, 10))
    q = eqq.Array1B.quantize(x, block_size=4, levels=levels)
    assert q.shape == (3, 10) and q.scale.shape == (3, 3)
    for start in (0, 4, 8):
        part = eqq.Array1B.quantize(x[:, start : start + 4], levels=levels)
        np.testing.assert_array_equal(q.materialize()[:, start : start + 4], part.materialize())


def test_integers_meet_floats_as_integers_do():
    t = jnp.asarray([[1, 0, -1], [-1, 1, 1]], jnp.int8)
    q, x = eqq.Array1B.quantize(t), jnp.asarray([[0.5, 1.5, 2.0]])
    got = eqq.implicit(lambda x, q: x @ q.T)(x, q)
    assert got.dtype == (x @ t.T).dtype
    np.testing.assert_array_equal(got, x @ t.T)
    with eqq.on_materialize("ignore"):
        twice = q * 2
    np.testing.assert_array_equal(twice, t * 2)
    assert twice.dtype == jnp.int8


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: eqq.Array1B.quantize(jnp.asarray([1, 2, 0])), ValueError, ["-1, 0, 1", "array[1] is 2"]),
        (
            lambda: eqq.Array1B.quantize(jnp.asarray([[1, 1], [0, 1]]), levels="binary"),
            ValueError,
            ["among -1, 1", "array[1, 0] is 0"],
        ),
        (lambda: eqq.Array1B.quantize(jnp.ones(3, bool)), TypeError, ["floating-point", "bool"]),
        (lambda: eqq.Array1B.quantize(jnp.ones((2, 3)), axis=2), ValueError, ["axis 2"]),
        (lambda: eqq.Array1B.quantize(jnp.ones((2, 3)), block_size=0), ValueError, ["block_size", "0"]),
        (lambda: eqq.Array1B.quantize(jnp.ones((2, 3)), dtype=jnp.int8), TypeError, ["dtype", "int8"]),
        (
            lambda: eqq.Array1B.quantize(jnp.asarray([1.0, jnp.inf])),
            ValueError,
            ["array[1] is inf"],
        ),
        (
            lambda: eqq.Array1B(jnp.ones((2, 3), jnp.uint8), shape=(2, 16)),
            ValueError,
            ["packed axis -1", "4 stored", "(2, 3)"],
        ),
        (
            lambda: eqq.Array1B(jnp.ones((2, 3), jnp.uint8), jnp.ones((2, 5))),
            ValueError,
            ["scale has 5 entries", "15"],
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named_shown_and_answered(make, error, words):
    assert_raises(make, error, words)


@pytest.mark.parametrize("options", [{}, {"levels": "binary"}])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_numbers_under_jit_stay_in_their_group(options, bad):
    x = jnp.ones((2, 8)).at[0, 3].set(bad)
    y = jax.jit(lambda x: eqq.Array1B.quantize(x, **options).materialize())(x)
    assert bool(jnp.isnan(y[0]).all()) and bool((y[1] == 1).all())
