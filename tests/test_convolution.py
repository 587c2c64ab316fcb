"""Convolution with a quantized kernel, against the same convolution with the dense kernel."""

from typing import Any, NamedTuple

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import examples, ON_CPU, STRATEGIES
from jax import lax

import eqquant as eqq
from eqquant.kernels import convolution, convolve
from eqquant.testing import DTYPES, generator, QUANTIZERS


PLATFORMS = [("cpu",), ("cuda",), ("tpu",), ("cpu", "cuda", "tpu")]

each_format = pytest.mark.parametrize("format", STRATEGIES)


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    """Tiny kernels go the way of large ones: in pieces."""
    monkeypatch.setattr(convolution, "SMALL_BYTES", 0)


def with_scale(w: eqq.Array8B, scale: Any) -> eqq.Array8B:
    return eqx.tree_at(lambda w: w.scale, w, scale)


def close(got: Any, want: Any, terms: int, magnitude: Any) -> bool:
    """Within terms x epsilon x the largest magnitude of a sum."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return bool(np.abs(got - want).max() <= terms * np.finfo(np.float32).eps * float(magnitude))


class Convolution(NamedTuple):
    x: jax.Array
    w: Any
    options: dict[str, Any]

    def dense(self, x: Any, w: Any) -> Any:
        w = w.materialize() if eqq.is_implicit(w) else w
        return lax.conv_general_dilated(x, w.astype(x.dtype), **self.options)

    def quantized(self, x: Any, w: Any) -> Any:
        with eqq.strict():
            return eqq.implicit(lambda w, x: lax.conv_general_dilated(x, w, **self.options))(w, x)

    def check(self, got: Any, want: Any, magnitude: Any) -> None:
        terms = self.w.size + self.x.size
        eps = max(float(jnp.finfo(d).eps) for d in (got.dtype, jnp.float32))
        dtype_max = float(jnp.finfo(got.dtype).max)
        got, want, magnitude = (np.asarray(a, np.float64) for a in (got, want, magnitude))
        assert got.shape == want.shape
        bound = (terms * np.finfo(np.float32).eps + 2 * eps) * np.abs(magnitude) + 1e-30
        fits = np.abs(magnitude) < dtype_max  # nothing overflows on the way
        assert (np.abs(got - want) <= bound)[fits].all()


ORDERS = {
    1: [("NCH", "OIH", "NCH"), ("NHC", "HIO", "NHC"), ("CHN", "IHO", "HNC")],
    2: [("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC"), ("HCWN", "IWOH", "CNWH")],
}


@st.composite
def convolutions(
    draw: Any, format: str, grouped: bool = False, dtypes: Any = (jnp.float32,)
) -> Convolution:
    spatial = draw(st.sampled_from([1, 2]))
    order = draw(st.sampled_from(ORDERS[spatial]))
    groups, batch_groups = draw(st.sampled_from([(2, 1), (1, 2)])) if grouped else (1, 1)
    n, i, o = 2, 3, draw(st.sampled_from([4, 6]) if grouped else st.sampled_from([1, 5]))

    def shape(letters: str, **lengths: int) -> tuple[int, ...]:
        return tuple(lengths[letter] for letter in letters)

    size = {"H": draw(st.sampled_from([4, 5])), "W": 4}
    window = {"H": draw(st.sampled_from([1, 3])), "W": 2}

    def each(values: Any) -> tuple[Any, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(spatial))

    dtype = draw(st.sampled_from(dtypes))
    x = jnp.asarray(generator(draw).normal(size=shape(order[0], N=n, C=i * groups, **size)), dtype)
    w = draw(STRATEGIES[format](shape(order[1], O=o, I=i, **window), dtype))
    options = {
        "window_strides": each([1, 2]),
        "padding": each([(0, 0), (1, 2), (2, 1)]),
        "lhs_dilation": each([1, 2]),
        "rhs_dilation": each([1, 2]),
        "dimension_numbers": order,
        "feature_group_count": groups,
        "batch_group_count": batch_groups,
    }
    return Convolution(x, w, options)


@each_format
@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])
def test_convolution(format, grouped):
    @hypothesis.given(st.data())
    @examples(0.7 if not grouped else 0.4)
    def holds(data: st.DataObject) -> None:
        c = data.draw(convolutions(format, grouped, dtypes=tuple(DTYPES)))
        x64 = c.x.astype(jnp.float32)
        y, pull_back = jax.vjp(lambda x: c.quantized(x, c.w), c.x)
        want = c.dense(x64, c.w)
        magnitude = c.dense(abs(x64), abs(c.w.materialize()))
        assert y.dtype == c.dense(c.x, c.w).dtype
        c.check(y, want, magnitude * (1 if c.w.dtype == jnp.float32 else 2))
        ct = jnp.ones_like(want)
        (gradient,) = pull_back(ct.astype(y.dtype))
        (want,) = jax.vjp(lambda x: c.dense(x, c.w), x64)[1](ct)
        (magnitude,) = jax.vjp(lambda x: c.dense(x, abs(c.w.materialize())), x64)[1](ct)
        assert gradient.dtype == c.x.dtype
        c.check(gradient, want, magnitude * (1 if c.w.dtype == jnp.float32 else 2))

    holds()


@pytest.mark.parametrize("pieces", [2, 3, 100])
@pytest.mark.parametrize("axis", [(1, 2), (0, 2), (0, 1, 2), ()])
def test_convolution_in_pieces(monkeypatch, pieces, axis):
    monkeypatch.setattr(convolution, "PIECES", pieces)
    rng = np.random.default_rng(5)
    w = eqq.Array8B.quantize(jnp.asarray(rng.normal(size=(7, 3, 2)), jnp.float32), axis=axis)
    c = Convolution(
        jnp.asarray(rng.normal(size=(2, 3, 6)), jnp.float32),
        w,
        {"window_strides": (2,), "padding": [(1, 0)]},
    )
    lowered = jax.jit(lambda x, w: c.quantized(x, w)).lower(c.x, w)
    assert "stablehlo.while" in lowered.as_text()
    c.check(c.quantized(c.x, w), c.dense(c.x, w), c.dense(abs(c.x), abs(w.materialize())))


def test_derivatives_of_a_convolution():
    rng = np.random.default_rng(6)
    w = eqq.Array8B.quantize(jnp.asarray(rng.normal(size=(4, 3, 2)), jnp.float32), axis=(1, 2))
    c = Convolution(
        jnp.asarray(rng.normal(size=(2, 3, 6)), jnp.float32),
        w,
        {"window_strides": (1,), "padding": "SAME"},
    )
    at = (c.x, w.scale)
    towards = tuple(jnp.asarray(rng.normal(size=a.shape), jnp.float32) for a in at)
    quantized, dense = (lambda x, s, f=f: f(x, with_scale(w, s)) for f in (c.quantized, c.dense))
    (y, y_dot), (want, want_dot) = jax.jvp(quantized, at, towards), jax.jvp(dense, at, towards)
    assert close(y, want, 12, np.abs(want).max() * 4)
    assert close(y_dot, want_dot, 12, np.abs(want_dot).max() * 10)
    for mode in (jax.jacrev, jax.jacfwd):
        for argnum in (0, 1):
            found, expected = (mode(f, argnum)(*at) for f in (quantized, dense))
            assert close(found, expected, 12, np.abs(expected).max() * 10)
    hessians = [
        jax.hessian(lambda x, f=f: jnp.sum(jnp.sin(f(x, w.scale))))(c.x) for f in (quantized, dense)
    ]
    assert close(*hessians, 40, np.abs(hessians[1]).max() * 4)


@pytest.mark.parametrize("order", ORDERS[1], ids="-".join)
@pytest.mark.parametrize("axes", [(0, None), (2, None), (None, 0), (0, 0)], ids=str)
def test_vmap_of_a_convolution(axes, order):
    rng = np.random.default_rng(7)
    lengths = {"N": 2, "C": 3, "H": 5, "O": 4, "I": 3}
    x_shape = tuple(lengths[k] for k in order[0])
    w_shape = tuple({**lengths, "H": 2}[k] for k in order[1])
    x_axis, w_axis = axes
    if x_axis is not None:
        x_shape = (*x_shape[:x_axis], 3, *x_shape[x_axis:])
    w = jnp.asarray(rng.normal(size=w_shape if w_axis is None else (3, *w_shape)), jnp.float32)
    w = eqq.Array8B.quantize(w)
    x = jnp.asarray(rng.normal(size=x_shape), jnp.float32)
    c = Convolution(x, w, {"window_strides": (1,), "padding": "SAME", "dimension_numbers": order})
    found = jax.vmap(c.quantized, axes)(x, w)
    want = jax.vmap(c.dense, axes)(x, w.materialize())
    magnitude = jax.vmap(c.dense, axes)(abs(x), abs(w.materialize()))
    c.check(found, want, magnitude)


@pytest.mark.parametrize("platforms", PLATFORMS, ids="-".join)
def test_export_of_a_convolution(platforms):
    rng = np.random.default_rng(8)
    w = eqq.Array8B.quantize(jnp.asarray(rng.normal(size=(4, 3, 2)), jnp.float32), axis=(1, 2))
    c = Convolution(
        jnp.asarray(rng.normal(size=(2, 3, 6)), jnp.float32),
        w,
        {"window_strides": (1,), "padding": "SAME"},
    )
    leaves, treedef = jtu.tree_flatten(w)
    exported = jax.export.export(
        jax.jit(lambda x, *leaves: c.quantized(x, jtu.tree_unflatten(treedef, leaves))),
        platforms=platforms,
    )(c.x, *leaves)
    assert ("stablehlo.while" in exported.mlir_module()) == ("cpu" in platforms)
    if "cpu" in platforms:
        c.check(
            exported.call(c.x, *leaves), c.dense(c.x, w), c.dense(abs(c.x), abs(w.materialize()))
        )


def test_convolve_without_implicit():
    w = eqq.Array8B.quantize(jnp.ones((4, 3, 2)))
    numbers = lax.conv_dimension_numbers((2, 3, 6), (4, 3, 2), None)
    y = convolve(
        jnp.ones((2, 3, 6)), w, window_strides=(1,), padding=((0, 0),), lhs_dilation=(1,), rhs_dilation=(1,),
        dimension_numbers=numbers, feature_group_count=1, batch_group_count=1, precision=None,
    )  # fmt: skip
    np.testing.assert_allclose(y, 6.0, rtol=1e-5)


def test_tiles_longer_than_the_axis_that_is_cut():
    """The derivative cuts the input channels: 3 of them in one stored number, with two scales."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(4, 3, 2, 2)), jnp.float32)
    q = eqq.Array1B.quantize(w * jnp.asarray([1, 1, 100.0])[:, None, None], axis=1, block_size=2)
    assert q.weight.shape == (4, 1, 2, 2) and q.scale.shape == (4, 2, 2, 2)
    x = jnp.asarray(rng.normal(size=(2, 3, 5, 5)), jnp.float32)

    def loss(x, w):
        return jnp.sum(jnp.sin(lax.conv_general_dilated(x, w, (1, 1), "SAME")))

    got = jax.grad(lambda x: eqq.implicit(loss)(x, q))(x)
    np.testing.assert_allclose(got, jax.grad(loss)(x, q.materialize()), rtol=1e-3, atol=1e-2)


POINTWISE = {name: QUANTIZERS[name].with_blocks(4) for name in ("int8", "nf4", "ternary")}


@pytest.mark.parametrize("order", [order for orders in ORDERS.values() for order in orders])
@pytest.mark.parametrize("format", POINTWISE)
def test_over_a_single_point_it_is_a_product(format, order):
    along = "IO"[(list(POINTWISE).index(format) + len(order[0])) % 2]
    rng = np.random.default_rng(0)
    lengths = dict(N=2, C=20, H=5, W=4)
    x = jnp.asarray(rng.normal(size=[lengths[letter] for letter in order[0]]), jnp.float32)
    kernel = rng.normal(size=[dict(O=12, I=20).get(letter, 1) for letter in order[1]])
    w = POINTWISE[format](jnp.asarray(kernel, jnp.float32), axis=order[1].index(along))
    strides = (2, 1)[: x.ndim - 2]
    c = Convolution(
        x, w, {"window_strides": strides, "padding": "VALID", "dimension_numbers": order}
    )
    y, pull_back = jax.vjp(lambda x: c.quantized(x, w), x)
    want, dense_pull_back = jax.vjp(lambda x: c.dense(x, w), x)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pull_back(y), dense_pull_back(y), rtol=1e-4, atol=1e-4)
    (row,) = eqq.audit(lambda x, w: lax.conv_general_dilated(x, w, **c.options), x, w).rows
    assert row.kernel in (ON_CPU, "tiled")  # small blocks are not decoded by the native kernels


@pytest.mark.parametrize(
    "options", [{"padding": [(1, 0), (0, 0)]}, {"lhs_dilation": (1, 2)}, {"feature_group_count": 2}]
)
def test_what_only_looks_like_a_product(options):
    groups = options.get("feature_group_count", 1)
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 5))
    w = eqq.Array8B.quantize(jax.random.normal(jax.random.key(1), (4, 6 // groups, 1, 1)), axis=1)
    c = Convolution(x, w, {"window_strides": (1, 1), "padding": [(0, 0)] * 2} | options)
    np.testing.assert_allclose(c.quantized(x, w), c.dense(x, w), rtol=1e-4, atol=1e-4)
