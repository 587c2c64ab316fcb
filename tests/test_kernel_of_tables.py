"""Products by tables of partial sums: no decoding, and as accurate as a sum in floating point."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import eqquant as eqq
from eqquant.kernels.matmul.axes import Axes
from eqquant.kernels.matmul.cpu import tables
from eqquant.kernels.matmul.product import Product, Target
from eqquant.testing import QUANTIZERS


pytestmark = pytest.mark.usefixtures("fully_optimized", "without_native")


PACKED = {
    name: partial(QUANTIZERS[name].with_blocks(16), axis=0)
    for name in ("ternary", "binary", "nf4", "nf4 double")
}
PACKED["binary, blocks"] = partial(QUANTIZERS["binary"], axis=0, block_size=16)
each_format = pytest.mark.parametrize("name", PACKED)
FIRST = Axes((1,), (0,), (), ())


def supports(x: Any, w: Any, axes: Axes = FIRST) -> bool:
    return tables.supports(Product(x, w, axes))


def by_tables(x: jax.Array, w: Any) -> Any:
    axes = Axes((x.ndim - 1,), (0,), (), ())
    assert supports(x, w, axes)
    return jax.jit(lambda x, w: tables.compute(Product(x, w, axes), Target()))(x, w)


def integers(*shape: int) -> jax.Array:
    return jnp.where(jnp.arange(np.prod(shape)).reshape(shape) % 3 == 0, 1, -1)


@each_format
@pytest.mark.parametrize(
    ("x_shape", "w_shape"),
    [
        ((7,), (7, 5)),
        ((1, 40), (40, 3)),
        ((2, 3, 40), (40, 4, 5)),
        ((2, 1), (1, 3)),
        ((2, 32), (32, 0)),
    ],
    ids=str,
)
def test_products_of_tables(name, x_shape, w_shape):
    rng = np.random.default_rng(len(name))
    w = PACKED[name](jnp.asarray(rng.normal(size=w_shape), jnp.float32))
    x = jnp.asarray(rng.normal(size=x_shape), jnp.float32)
    y = by_tables(x, w)
    wide, dense = np.asarray(x, np.float64), np.asarray(w.materialize(), np.float64)
    want = np.tensordot(wide, dense, (-1, 0))
    assert y.shape == want.shape
    magnitude = np.tensordot(abs(wide), abs(dense), (-1, 0))
    assert (np.abs(y - want) <= (len(dense) + 4) * np.finfo(np.float32).eps * magnitude).all()


@pytest.mark.parametrize("levels", ["ternary", "binary"])
def test_products_of_integers_are_exact(levels):
    w = eqq.Array1B.quantize(integers(37, 6), axis=0, levels=levels)
    x = jnp.arange(37.0)[None] - 20
    assert (w.scale == 1).all()
    assert (by_tables(x, w) == x @ w.materialize()).all()


@each_format
def test_tables_of_what_is_not_finite(name):
    """As in floating point: one infinity gives infinities, or NaN where it meets a zero."""
    w = PACKED[name](jnp.asarray([[1.0, -2.0, 0.0], [-3.0, 1.0, 1.0], [1.0, 2.0, 3.0]]))
    rows = [[1, np.inf, 2], [-np.inf, 0, 1], [np.nan, 1, 2], [np.inf, np.inf, 1], [1, 2, 3]]
    x = jnp.asarray(rows, jnp.float32)
    np.testing.assert_allclose(by_tables(x, w), x @ w.materialize(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_tables_of_half_precision_are_summed_in_float32(dtype):
    w = eqq.Array1B.quantize(jnp.ones((4096, 2)), axis=0, levels="binary")
    x = jnp.full((1, 4096), 1.001953125, dtype)
    np.testing.assert_allclose(by_tables(x, w), 4096 * float(x[0, 0]), rtol=1e-6)


def test_where_tables_serve():
    ones, x = jnp.ones((16, 4)), jnp.ones((2, 16))
    binary = partial(eqq.Array1B.quantize, levels="binary")
    for w in (binary(ones, axis=0), eqq.ArrayNF4.quantize(ones, axis=0, block_size=8)):
        assert supports(x, w)
    assert supports(x, eqq.RSROperatorBinary.quantize(ones.T).T)
    for w in (
        binary(ones),  # packed along the outputs
        eqq.Array8B.quantize(ones, axis=0),  # not packed
        eqq.Array1B.quantize(ones, axis=0, block_size=8),  # five in a byte, across blocks
        eqq.RSROperatorBinary.quantize(ones.T, k=11).T,  # codes of two bytes
        eqq.RSROperatorTernary.quantize(ones.T).T,  # two payloads
    ):
        assert not supports(x, w)
    assert not supports(jnp.ones((2, 4)), binary(ones.T).T, Axes((1,), (1,), (), ()))
    assert not supports(jnp.ones((0, 16)), binary(ones, axis=0))


def program(rows: int, outputs: int, how: Any) -> str:
    w = jax.eval_shape(partial(how, axis=0), jax.ShapeDtypeStruct((64, outputs), jnp.float32))
    x = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    return jax.jit(eqq.implicit(lambda x, w: x @ w)).lower(x, w).as_text()


@pytest.mark.parametrize(
    ("rows", "outputs", "how", "serve"),
    [
        (1, 512, eqq.Array1B.quantize, True),
        (2, 512, eqq.Array1B.quantize, True),
        (3, 512, eqq.Array1B.quantize, False),  # look-ups for each row: decoding takes less
        (1, 511, eqq.Array1B.quantize, False),  # tables larger than a tenth of the weight
        (1, 1280, eqq.ArrayNF4.quantize, True),
        (2, 1280, eqq.ArrayNF4.quantize, False),
        (1, 1279, eqq.ArrayNF4.quantize, False),
    ],
)
def test_tables_are_chosen_for_few_rows_and_many_outputs(rows, outputs, how, serve):
    assert ("x256xf32>" in program(rows, outputs, how)) == serve


def test_derivatives_of_products_by_tables():
    w = eqq.Array1B.quantize(jax.random.normal(jax.random.key(0), (64, 512)), axis=0)
    x, ct = jnp.linspace(-1, 1, 64), jnp.linspace(-1, 2, 512)

    def f(x: Any, scale: Any) -> Any:
        return eqq.implicit(lambda x, w: x @ w)(x, w.replace(scale=scale))

    y, pull_back = jax.vjp(f, x, w.scale)
    x_bar, scale_bar = pull_back(ct)
    dense = w.materialize()
    np.testing.assert_allclose(y, x @ dense, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x_bar, dense @ ct, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scale_bar, ct * (x @ dense) / w.scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", [eqq.Array1B.quantize, eqq.ArrayNF4.quantize])
@pytest.mark.parametrize("split", ["inputs", "outputs"])
def test_tables_inside_shard_map(how, split):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    w = how(jax.random.normal(jax.random.key(0), (1280, 2560)), axis=0)
    x = jax.random.normal(jax.random.key(1), (1, 1280))
    cut = split == "inputs"
    specs = (P(None, "d"), P("d", None)) if cut else (P(), P(None, "d"))

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P() if cut else P(None, "d"))
    def product(x: Any, w: Any) -> Any:
        return jax.lax.psum(x @ w, "d") if cut else x @ w

    lowered = jax.jit(eqq.implicit(product)).lower(x, w)
    assert "x256xf32>" in lowered.as_text()
    np.testing.assert_allclose(lowered.compile()(x, w), x @ w.materialize(), rtol=1e-3, atol=1e-3)
