"""Values, scale and an offset: what is added to the scaled values is added to every product."""

from functools import partial
from typing import Any, ClassVar

import device_kernels
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, UInt8

import eqquant as eqq
from eqquant.coding import Coding
from eqquant.kernels import convolution, quantized_dot_general
from eqquant.kernels.matmul import xla
from eqquant.kernels.matmul.axes import Axes
from eqquant.kernels.matmul.cpu import tiled
from eqquant.kernels.matmul.gpu import product as gpu
from eqquant.kernels.matmul.product import Product, Target
from eqquant.kernels.matmul.tpu import product as tpu
from eqquant.tiles import Packing, Tile


LEVELS = tuple(float(np.sin(i)) for i in range(16))


class Affine(eqq.AbstractScaledArray):
    """$x = s q + m$, with integers $q$ from 0 to 15, two in a byte."""

    codes: UInt8[Array, "..."]
    scale: Float[Array, "..."]
    offset: Float[Array, "..."]
    packing: Packing | None = eqx.field(static=True)
    block_size: int | None = eqx.field(static=True, default=None)
    dtype: np.dtype = eqx.field(static=True, default=np.dtype("float32"))
    casts: tuple[np.dtype, ...] = eqx.field(static=True, default=())

    payload: ClassVar[str] = "codes"
    summands: ClassVar[tuple[str, ...]] = ("offset",)
    coding: ClassVar[Coding] = Coding(bits=4, first="high")


class OfLevels(Affine):
    """With sixteen levels for $q$."""

    coding: ClassVar[Coding] = Coding(bits=4, levels=LEVELS, first="high")


class LowFirst(Affine):
    """The first of two in a byte is in its low half."""

    coding: ClassVar[Coding] = Coding(bits=4, levels=LEVELS)


def affine(
    kind: Any, shape: Any, axis: int = -1, scale: int | None = None, offset: int | None = None
) -> Any:
    """Packed along `axis`, with one scale and one offset for so many elements of it, or for all."""
    rng, axis = np.random.default_rng(sum(shape)), axis % len(shape)
    packing = Packing(axis - len(shape), shape[axis], Tile(16, 8))
    stored = (*shape[:axis], packing.stored, *shape[axis + 1 :])

    def along(size: int | None) -> Any:
        count = 1 if size is None else -(-shape[axis] // size)
        return rng.uniform(0.5, 2, (*shape[:axis], count, *shape[axis + 1 :])).astype(np.float32)

    codes = jnp.asarray(rng.integers(0, 256, stored), jnp.uint8)
    scales, offsets = jnp.asarray(along(scale)), jnp.asarray(along(offset) - 3)
    return kind(codes, scales, offsets, packing, scale or offset)


def normal(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def assert_close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(np.abs(want).max()))


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels for GPUs and TPUs run here."""
    monkeypatch.setattr(tiled, "SMALL_BYTES", 0)
    for name, kernel in (("gpu", gpu), ("tpu", tpu)):
        interpreted = device_kernels.interpreted(monkeypatch, name, kernel.compute)
        next(interpreted)
    yield
    jax.clear_caches()


# The axis that is packed and summed over, and how many of its elements share a scale, and an offset.
LAST_ALONE, LAST, FIRST_ALONE, FIRST = (1, None, 16), (1, 16, 16), (0, None, None), (0, 32, 32)
CASES = [
    *((name, Affine, how) for name in ("reference", "xla", "tiled") for how in (LAST, FIRST_ALONE)),
    ("int8_digits", Affine, LAST_ALONE),
    ("int8_digits", Affine, (1, None, None)),
    ("tables", Affine, FIRST_ALONE),
    ("tables", OfLevels, FIRST),
    ("gpu", Affine, LAST_ALONE),
    ("gpu", OfLevels, FIRST),
    ("tpu", OfLevels, (1, None, 16)),
    *((name, LowFirst, LAST) for name in ("xla", "gpu", "tpu")),
]


@pytest.mark.parametrize(("name", "kind", "how"), CASES)
def test_every_implementation(interpreted, name, kind, how):
    axis, scale, offset = how
    w = affine(kind, ((72, 6), (6, 72))[axis], axis, scale, offset)
    x, contract = normal(3, 72), (((1,), (axis,)), ((), ()))
    y = jax.jit(partial(quantized_dot_general, implementation=name), static_argnums=2)(
        x, w, contract
    )
    dense = np.asarray(w.materialize(), np.float64)
    assert_close(y, np.asarray(x, np.float64) @ (dense.T if axis else dense))


def test_in_the_form_for_tpus():
    for kind in (OfLevels, LowFirst):
        x, w = normal(3, 72), affine(kind, (6, 72), 1, 16, 16)
        product = Product(x, w.replace(offset=jnp.zeros_like(w.offset)), Axes((1,), (1,), (), ()))
        assert_close(xla.compute(product, Target("tpu")), x @ product.w.materialize().T)


PROGRAMS = {
    "x @ w": ((5, 72), lambda x, w: x @ w.mT),
    "w @ x": ((72, 5), lambda x, w: w @ x),
    "along the other axis": ((5, 6), lambda x, w: x @ w),
    "along both": ((6, 72), lambda x, w: jnp.einsum("ok,ok->", x, w)),
    "outer": ((3,), lambda x, w: jnp.einsum("a,ok->aok", x, w)),
    "rows alone": ((6, 5), lambda x, w: jnp.einsum("oa,ok->oak", x, w)),
}


@pytest.mark.parametrize("how", [(None, 16), (16, 16), (None, None)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_products_and_derivatives(name, how):
    shape, f = PROGRAMS[name]
    x, w = normal(*shape), affine(Affine, (6, 72), 1, *how)

    def of_leaves(x: Any, scale: Any, offset: Any, packed: bool) -> Any:
        array = w.replace(scale=scale, offset=offset)
        y = eqq.implicit(f)(x, array if packed else array.materialize())
        return jnp.sum(jnp.sin(y)), y

    with eqq.strict():
        found, want = (
            jax.jit(jax.grad(partial(of_leaves, packed=packed), (0, 1, 2), has_aux=True))(
                x, w.scale, w.offset
            )
            for packed in (True, False)
        )
    jax.tree.map(assert_close, found, want)


def test_batches():
    ws = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[affine(Affine, (6, 72), 1, 16, 16)] * 3)
    xs, dense = normal(3, 4, 72), ws.materialize()
    want = xs @ dense.mT
    with eqq.strict():
        assert_close(eqq.implicit(lambda x, w: x @ w.mT)(xs, ws), want)
        assert_close(eqq.implicit(jax.vmap(lambda x, w: x @ w.T))(xs, ws), want)
        assert_close(jax.vmap(lambda x, w: eqq.implicit(jnp.matmul)(w, x.T))(xs, ws), want.mT)
        shared = eqq.implicit(jax.vmap(lambda x, w: x @ w.T, (None, 0)))(xs[0], ws)
    assert_close(shared, xs[0] @ dense.mT)


def test_activations_are_rounded_before_they_are_summed_up():
    x, w = normal(3, 72), affine(Affine, (6, 72), 1)
    unit = np.abs(np.asarray(x)).max(1, keepdims=True) / 127
    want = np.round(np.asarray(x) / unit) * unit @ np.asarray(w.materialize()).T
    got = eqq.implicit(lambda x, w: x @ w.T, activations="int8")(x, w)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("points", [3, 1])
def test_convolution(monkeypatch, small, points):
    if not small:
        monkeypatch.setattr(convolution, "SMALL_BYTES", 0)
    x, w = normal(2, 16, 5, 5), affine(Affine, (24, 16, points, points), 1)

    def f(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(x, w, (1, 1), "SAME")

    def both(w: Any) -> Any:
        y, pull_back = jax.vjp(lambda x: eqq.implicit(f)(x, w), x)
        return y, pull_back(jnp.cos(y))

    with eqq.strict():
        found = jax.jit(both)(w)
        mapped = jax.vmap(lambda w: eqq.implicit(f)(x, w))(jax.tree.map(lambda a: a[None], w))
    jax.tree.map(assert_close, found, both(w.materialize()))
    assert_close(mapped[0], found[0])


def test_explicit_mesh_axes():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    x, w = normal(4, 72), affine(Affine, (6, 72), 1, 16, 16)
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, NamedSharding(mesh, P("d", None)))
        whole = jax.device_put(w, NamedSharding(mesh, P()))
        y = jax.jit(eqq.implicit(lambda x, w: x @ w.T))(rows, whole)
    assert_close(np.asarray(y), x @ w.materialize().T)
