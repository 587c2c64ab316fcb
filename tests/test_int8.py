"""`Array8B`: its numerics, its edges, its constructors and its complaints."""

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


GOLDEN = np.load(pathlib.Path(__file__).parent / "data" / "bnb_int8.npz")


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in GOLDEN.files}))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_codes_are_those_of_bitsandbytes(name, dtype):
    x, codes, absmax = (GOLDEN[f"{name}/int8_vectorwise/{k}"] for k in ("input", "codes", "absmax"))
    q = eqq.Array8B.quantize(jnp.asarray(x, dtype))
    np.testing.assert_array_equal(q.weight, codes)
    # XLA divides by a constant with its rounded reciprocal: the last bit may differ.
    np.testing.assert_allclose(q.scale[:, 0], absmax / np.float32(127), rtol=1.2e-7)


def test_sqnr_of_a_gaussian_matches_its_closed_form():
    # Uniform rounding of step absmax / 127 has variance step^2 / 12.
    w = np.asarray(jax.random.normal(jax.random.key(0), (512, 4096)), np.float64)
    error = w - np.asarray(
        eqq.Array8B.quantize(jnp.asarray(w, jnp.float32)).materialize(), np.float64
    )
    sqnr = 10 * np.log10((w**2).sum() / (error**2).sum())
    expected = 10 * np.log10((w**2).mean() / ((np.abs(w).max(1) / 127) ** 2 / 12).mean())
    assert abs(sqnr - expected) < 0.03
    assert abs(sqnr - 41.2) < 0.1


FLOATS = st.floats(-(2.0**127), 2.0**127, width=32, allow_nan=False, allow_subnormal=False)


@hypothesis.given(
    x=hnp.arrays(np.float32, st.sampled_from([(4, 6), (5,), (2, 3, 4)]), elements=FLOATS),
    data=st.data(),
)
def test_every_element_is_within_half_a_step(x, data):
    axis = data.draw(st.sampled_from([None, 0, -1, (), tuple(range(x.ndim))]))
    block_size = data.draw(st.sampled_from([None, 1, 2, 3])) if axis in (None, 0, -1) else None
    q = eqq.Array8B.quantize(x, axis=axis, block_size=block_size)
    assert q.shape == x.shape and q.dtype == x.dtype
    assert int(jnp.min(q.weight)) >= -127
    step = np.asarray(
        eqq.Array8B(q.scale, jnp.ones_like(q.weight), block_size=q.block_size).materialize(),
        np.float64,
    )
    error = np.abs(np.asarray(q.materialize(), np.float64) - x)
    # Where a group counts as zero, its values are below 127 times the smallest normal number.
    flushed = np.abs(x) <= 127 * float(jnp.finfo(jnp.float32).tiny)
    assert ((error <= step * 0.5 * (1 + 1e-5)) | flushed).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_magnitudes_at_the_ends_of_the_dtype(dtype):
    info = jnp.finfo(dtype)
    for magnitude in (float(info.max), float(info.max) / 3, 1e-4, float(info.tiny) * 1024):
        x = jnp.asarray([[magnitude, -magnitude, 0, magnitude / 2]], dtype)
        y = np.asarray(eqq.Array8B.quantize(x).materialize(), np.float64)
        assert np.isfinite(y).all()
        if magnitude > 127 * float(jnp.finfo(jnp.float32).tiny):
            np.testing.assert_allclose(
                y, np.asarray(x, np.float64), atol=magnitude * (1 / 254 + float(info.eps))
            )


def test_zero_groups_give_exact_zeros_and_spoil_nothing():
    x = jnp.zeros((3, 4)).at[1].set(1.5)
    q = eqq.Array8B.quantize(x)
    np.testing.assert_array_equal(q.materialize(), x)
    assert bool(jnp.isfinite(q @ jnp.ones(4)).all())


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (1, 1), (2, 0, 3)])
def test_shapes_without_or_with_one_element(shape):
    x = jnp.full(shape, 2.5)
    q = eqq.Array8B.quantize(x)
    assert (q.shape, q.ndim, q.size) == (x.shape, x.ndim, x.size)
    np.testing.assert_allclose(q.materialize(), x, rtol=1e-6)
    np.testing.assert_allclose(q.T.materialize() if shape else q.materialize(), x.T, rtol=1e-6)
    assert f"{list(shape)}".replace(" ", "") in repr(q)


@pytest.mark.parametrize("axis", [0, 1, -1, -2, (0, 1), (-1, 0), ()])
def test_axis_says_which_elements_share_a_scale(axis):
    x = jax.random.normal(jax.random.key(1), (4, 6))
    q = eqq.Array8B.quantize(x, axis=axis)
    axes = {a % 2 for a in ((axis,) if isinstance(axis, int) else axis)}
    assert q.scale.shape == tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    assert {a % 2 for a in q.axis} == axes
    np.testing.assert_allclose(q.materialize(), x, atol=float(jnp.abs(x).max()) / 250)


def test_blocks_need_not_divide_the_axis():
    x = jax.random.normal(jax.random.key(2), (3, 10))
    q = eqq.Array8B.quantize(x, block_size=4)
    assert q.shape == (3, 10) and q.scale.shape == (3, 3) and q.block_size == 4
    for start in (0, 4, 8):
        part = eqq.Array8B.quantize(x[:, start : start + 4])
        np.testing.assert_array_equal(q.weight[:, start : start + 4], part.weight)
        np.testing.assert_array_equal(q.scale[:, start // 4], part.scale[:, 0])


def test_quantize_is_jittable_vmappable_and_differentiable_in_its_scale():
    x = jax.random.normal(jax.random.key(3), (3, 4, 6))
    one_by_one = [eqq.Array8B.quantize(each) for each in x]
    mapped = jax.vmap(eqq.Array8B.quantize)(x)
    jitted = jax.jit(eqq.Array8B.quantize)(x)
    assert mapped.shape == jitted.shape == x.shape
    for i, each in enumerate(one_by_one):
        np.testing.assert_array_equal(mapped.weight[i], each.weight)
        np.testing.assert_array_equal(jitted.scale[i], each.scale)


def test_bits_are_counted_from_the_leaves():
    q = eqq.Array8B.quantize(jnp.ones((4096, 4096)))
    assert q.nbytes == 4096 * 4096 + 4 * 4096
    assert q.bits_per_weight == 8 + 32 / 4096


def test_non_finite_input_under_tracing_becomes_nan_in_its_group_only():
    x = jnp.ones((3, 4)).at[1, 2].set(jnp.inf).at[2, 0].set(jnp.nan)
    y = jax.jit(lambda x: eqq.Array8B.quantize(x).materialize())(x)
    assert np.isnan(y[1:]).all() and np.isfinite(y[0]).all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: eqq.Array8B.quantize(jnp.array([[1.0, jnp.nan]])), ValueError, ["array[0, 1] is nan", "has to stay dense"]),
        (lambda: eqq.Array8B.quantize(jnp.array([jnp.inf, 1.0])), ValueError, ["array[0] is inf"]),
        (lambda: eqq.Array8B.quantize(jnp.arange(4)), TypeError, ["int32[4]", "astype"]),
        (lambda: eqq.Array8B.quantize([1.0, 2.0]), TypeError, ["takes an array", "[1.0, 2.0]"]),
        (lambda: eqq.Array8B.quantize(eqq.Array8B.quantize(jnp.ones(3))), TypeError, ["Materialize"]),
        (lambda: eqq.Array8B.quantize(jnp.ones((2, 3)), axis=2), ValueError, ["axis 2", "2 axes"]),
        (lambda: eqq.Array8B.quantize(jnp.ones((2, 3)), axis=(0, -2)), ValueError, ["twice"]),
        (lambda: eqq.Array8B.quantize(jnp.ones(3), dtype=jnp.int8), TypeError, ["dtype", "int8"]),
        (lambda: eqq.Array8B.quantize(jnp.ones((2, 3)), block_size=0), ValueError, ["positive", "given 0"]),
        (lambda: eqq.Array8B.quantize(jnp.ones((2, 3)), axis=(0, 1), block_size=2), ValueError, ["one axis"]),
        (lambda: eqq.Array8B(jnp.ones(3), jnp.ones((3, 4), jnp.int8)), ValueError, ["rank of the array"]),
        (lambda: eqq.Array8B(jnp.ones((2, 1)), jnp.ones((3, 4), jnp.int8)), ValueError, ["axis 0", "2 entries"]),
        (lambda: eqq.Array8B(jnp.ones((3, 1)), jnp.ones((3, 4), jnp.int8), shape=(4, 3)), ValueError, ["(4, 3)"]),
        (lambda: eqq.Array8B(jnp.ones((3, 1)), jnp.ones((3, 4), jnp.int8), axis=0), ValueError, ["axis=0"]),
    ],
)  # fmt: skip
def test_bad_input_is_named_shown_and_answered(call, error, words):
    assert_raises(call, error, words)


def test_float64_beyond_a_float32_scale_is_an_error_and_below_it_is_precise():
    with jax.enable_x64(True):
        with pytest.raises(ValueError, match="as large as 1e[+]300 overflow a float32 scale"):
            eqq.Array8B.quantize(np.float64([1e300]))
        q = eqq.Array8B.quantize(np.float64([1.0, 0.5]))
        assert q.dtype == jnp.float64 and q.materialize().dtype == jnp.float64
    with pytest.raises(ValueError, match="is inf"):
        eqq.Array8B.quantize(np.float64([1e300]))  # JAX casts to float32 first


def test_the_constructor_of_the_family():
    q = eqq.Array8B(jnp.ones((3, 1)), jnp.ones((3, 4), jnp.int8), axis=(-1,), shape=(3, 4))
    assert q.dtype == jnp.float32 and q.axis == (-1,)
    np.testing.assert_array_equal(q.dequantize(), np.ones((3, 4)))


def test_delete_frees_the_leaves():
    q = eqq.Array8B.quantize(jnp.ones((3, 4)))
    q.delete()
    assert q.weight.is_deleted() and q.scale.is_deleted()
    jax.jit(lambda q: q.delete())(eqq.Array8B.quantize(jnp.ones((3, 4))))  # no-op under tracing
