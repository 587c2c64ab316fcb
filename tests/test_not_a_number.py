"""NaN and infinity are never taken for numbers, at any size: XLA for CPU drops NaN from large maxima."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import eqquant as eqq
from eqquant.kernels import Int8Blocks
from eqquant.rounding import absmax, largest_magnitude, with_nan_of
from eqquant.testing import QUANTIZERS


# Both sides of 4096 elements, where the compiler changes its way.
SHAPES = [(1, 1), (3, 16), (63, 64), (64, 64), (65, 64), (1024, 1024)]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
ROUNDED = {name: each for name, each in QUANTIZERS.items() if each.like in ("", "nf4", "int4")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_maximum_keeps_nan(shape, dtype):
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    place = (shape[0] // 2, shape[1] - 1)
    for axes, size in (((0, 1), None), ((1,), None), ((0,), None), ((1,), 16), ((0, 1), (2, 16))):
        find = jax.jit(lambda x: absmax(x, axes, size))  # noqa: B023
        clean, dirty = find(x), find(x.at[place].set(jnp.nan))
        assert bool(jnp.isfinite(clean).all())
        assert int(jnp.isnan(dirty).sum()) == 1
        np.testing.assert_array_equal(jnp.where(jnp.isnan(dirty), clean, dirty), clean)


def test_sums_that_overflow_are_no_nan():
    x = jnp.full((64, 64), 3e38, jnp.float32)
    ends = x.min(keepdims=True), x.max(keepdims=True)
    assert with_nan_of(x, (0, 1), ends) == ends
    kept = with_nan_of(x.at[3, 5].set(jnp.nan), (0, 1), ends)
    assert np.isnan(np.asarray(kept)).all()
    assert float(largest_magnitude(x.at[3, 5].set(-jnp.inf), (0, 1))[0, 0]) == np.inf
    mapped = jax.vmap(lambda x: largest_magnitude(x, (0, 1)))(
        jnp.stack([x, x.at[1, 1].set(jnp.nan)])
    )
    assert np.isnan(np.asarray(mapped).ravel()).tolist() == [False, True]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ROUNDED)
def test_quantize_names_the_first(name, value):
    for shape in SHAPES[1:]:
        x = jax.random.normal(jax.random.key(0), shape).at[shape[0] - 1, 3].set(value)
        with pytest.raises(
            ValueError, match=rf"array\[{shape[0] - 1}, 3\] is {str(value).replace('-', '-')}"
        ):
            ROUNDED[name](x)


@pytest.mark.parametrize("name", ["int8", "nf4", "int4 affine", "fp8"])
def test_quantize_names_it_on_eight_devices(name):
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("x",))
    x = jax.random.normal(jax.random.key(0), (64, 512)).at[5, 3].set(jnp.nan)
    x = jax.device_put(x, NamedSharding(mesh, P("x", None)))
    with pytest.raises(ValueError, match=r"array\[5, 3\] is nan"):
        QUANTIZERS[name](x)
    traced = jax.jit(QUANTIZERS[name])(x)
    rows = np.isnan(np.asarray(traced.materialize())).any(-1)
    assert rows[5] and rows.sum() == 1


@pytest.mark.parametrize("rows", [1, 4, 65])
@pytest.mark.parametrize("activations", ["float", "int8", Int8Blocks(32)])
def test_a_row_with_nan_gives_nan(rows, activations):
    w = eqq.Array8B.quantize(jax.random.normal(jax.random.key(0), (1024, 4096)))
    x = jax.random.normal(jax.random.key(1), (rows, 4096)).at[0, 77].set(jnp.nan)
    y = eqq.implicit(lambda x, w: x @ w.T, activations=activations)(x, w)
    assert bool(jnp.isnan(y[0]).all()) and bool(jnp.isfinite(y[1:]).all())


def test_scales_that_overflow_when_they_are_quantized_are_refused():
    x = jnp.full((4, 256), 3.4e38, jnp.float32).at[0, 0].set(-3.4e38)
    with pytest.raises(ValueError, match=r"double=True.*3\.4e\+38"):
        eqq.ArrayNF4.quantize(x, double=True)


@pytest.mark.parametrize("quantizer", ["nf4 search", "int4 search"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_a_searched_scale_stays_within_the_dtype(quantizer, dtype):
    top = float(jnp.finfo(dtype).max)
    x = jnp.asarray(np.random.default_rng(0).choice([-top, top, top / 3, 0], (8, 64)), dtype)
    q = QUANTIZERS[quantizer](x)
    assert bool(jnp.isfinite(q.materialize()).all())
