"""Products in half precision: where nothing is lost, and in layouts that XLA for CPU can multiply."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

import eqquant as eqq
from eqquant.kernels import quantized_dot_general
from eqquant.kernels.matmul import xla
from eqquant.kernels.matmul.axes import Axes
from eqquant.kernels.matmul.choice import IMPLEMENTATIONS
from eqquant.kernels.matmul.cpu import tiled
from eqquant.kernels.matmul.product import Product, Target
from eqquant.testing import LAYOUTS
from eqquant.tiles import broadcastable


pytestmark = pytest.mark.usefixtures("fully_optimized")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    """Tiny operands go the way of large ones: in pieces."""
    monkeypatch.setattr(tiled, "SMALL_BYTES", 0)


@pytest.mark.parametrize(
    ("how", "w_dtype", "x_dtype", "operands"),
    [
        (eqq.Array8B.quantize, jnp.bfloat16, jnp.bfloat16, "bf16"),
        (eqq.Array8B.quantize, jnp.float32, jnp.bfloat16, "bf16"),  # integers, exact in bfloat16
        (eqq.Array1B.quantize, jnp.float16, jnp.float16, "f16"),
        (
            eqq.ArrayNF4.quantize,
            jnp.bfloat16,
            jnp.bfloat16,
            "bf16",
        ),  # no less exact than the weight
        (eqq.ArrayNF4.quantize, jnp.float32, jnp.bfloat16, "f32"),
        (eqq.ArrayNF4.quantize, jnp.bfloat16, jnp.float16, "f32"),
        (partial(eqq.Array8B.quantize, axis=0), jnp.float16, jnp.float16, "f32"),  # x s overflows
        (eqq.Array8B.quantize, jnp.bfloat16, jnp.float32, "f32"),
    ],
)
@pytest.mark.parametrize("implementation", [xla, tiled], ids=["xla", "tiled"])
def test_half_precision_is_multiplied_where_that_loses_nothing(
    implementation, how, w_dtype, x_dtype, operands
):
    rng = np.random.default_rng(6)
    w = how(jnp.asarray(rng.normal(size=(6, 80)), jnp.float32), dtype=w_dtype)
    x = jnp.asarray(rng.normal(size=(4, 80)), x_dtype)
    axes = Axes((1,), (1,), (), ())
    run = jax.jit(lambda x, w: implementation.compute(Product(x, w, axes), Target()))
    lowered = run.lower(x, w)
    dots = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert dots and all(f"x{operands}>, tensor" in line and line.endswith("xf32>") for line in dots)
    y = lowered.compile()(x, w)
    x64, w64 = (
        np.asarray(eqq.materialize(a), np.float64)
        for a in (x, w.replace(dtype=jnp.dtype("float32")))
    )
    # Integers are as exact as sums in float32; other values have as many digits as the weight.
    eps = (80 + 4) * float(jnp.finfo(jnp.float32).eps)
    eps += 0 if w.integers else float(jnp.finfo(w_dtype).eps)
    assert (np.abs(y - x64 @ w64.T) <= eps * (np.abs(x64) @ np.abs(w64).T)).all()


@pytest.mark.parametrize("x_axes", ["mk", "km", "amk", "kma"])
@pytest.mark.parametrize("w_axes", ["nk", "kn", "ank", "nka"])
def test_bfloat16_in_every_layout(x_axes, w_axes):
    """XLA for CPU raises for some layouts of products in bfloat16, and chooses layouts by what is around them."""
    if "a" in x_axes and "a" in w_axes:
        x_axes = x_axes.replace("a", "b")
    lengths = {"a": 2, "b": 4, "m": 3, "n": 8, "k": 6}
    rng = np.random.default_rng(7)
    x, w = (rng.normal(size=[lengths[c] for c in axes]) for axes in (x_axes, w_axes))
    x = jnp.asarray(x, jnp.bfloat16)
    w = eqq.ArrayNF4.quantize(jnp.asarray(w, jnp.float32), block_size=4, dtype=jnp.bfloat16)
    outs = list(itertools.permutations(sorted(set(x_axes + w_axes) - {"k"})))
    for out in outs[:: 1 + len(outs) // 3]:
        equation = f"{x_axes},{w_axes}->{''.join(out)}"
        f = eqq.implicit(lambda x, w: jnp.einsum(equation, jnp.sin(x), w))  # noqa: B023
        want = np.einsum(
            equation, *(np.asarray(eqq.materialize(a), np.float64) for a in (jnp.sin(x), w))
        )
        np.testing.assert_allclose(
            np.asarray(jax.jit(f)(x, w), np.float64), want, rtol=0.05, atol=0.05
        )


def step_of_bfloat16(w, terms):
    """How far a product may be from that with the materialized array, for each |x| |w|: what `formats.md` says, and the
    rounding of the sum."""
    assert w.dtype == jnp.bfloat16
    return float(jnp.finfo(jnp.bfloat16).eps) + (terms + 4) * float(jnp.finfo(jnp.float32).eps)


def magnitude(w):
    """Of the scaled values and of the offset, which may be rounded one by one."""
    offset = w.offset_leaf
    dense = np.abs(np.asarray(w.materialize(), np.float64))
    return dense if offset is None else dense + 2 * np.abs(np.asarray(broadcastable(offset)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_product_in_bfloat16_equals(name):
    w = LAYOUTS[name].with_blocks(16)(normal(24, 48), dtype=jnp.bfloat16)
    dense = np.asarray(w.materialize(), np.float64)
    computed = set()
    for axis, (implementation, each) in itertools.product((0, 1), IMPLEMENTATIONS.items()):
        x = normal(3, w.shape[axis], seed=1).astype(jnp.bfloat16)
        product = Product(x, w, Axes((1,), (axis,), (), ()))
        if each.platforms is not None or not each.supports(product):
            continue
        y = quantized_dot_general(
            x,
            w,
            (((1,), (axis,)), ((), ())),
            preferred_element_type=jnp.float32,
            implementation=implementation,
        )
        y = np.asarray(y, np.float64)
        wide, contracted = np.asarray(x, np.float64), (1, axis)
        bound = np.tensordot(np.abs(wide), magnitude(w), contracted)
        bound *= step_of_bfloat16(w, w.shape[axis])
        assert (np.abs(y - np.tensordot(wide, dense, contracted)) <= bound).all(), implementation
        computed.add(implementation)
    assert computed >= {"reference", "xla", "tiled"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_product_of_two_in_bfloat16_equals(name):
    quantize = LAYOUTS[name].with_blocks(16)
    a = quantize(normal(5, 48), dtype=jnp.bfloat16)
    b = eqq.ArrayNF4.quantize(normal(24, 48, seed=1), 16, dtype=jnp.bfloat16)
    for small, large in ((a, b), (a, quantize(b.materialize(), dtype=jnp.bfloat16))):
        with eqq.on_materialize("ignore"):
            y = eqq.implicit(partial(jnp.einsum, "ik,jk->ij", preferred_element_type=jnp.float32))(
                small, large
            )
        x, w = (np.asarray(each.materialize(), np.float64) for each in (small, large))
        bound = step_of_bfloat16(large, 48) * (np.abs(x) @ magnitude(large).T)
        assert (np.abs(np.asarray(y, np.float64) - x @ w.T) <= bound).all()


HALVES = [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float32]


@pytest.mark.parametrize("x_dtype", HALVES, ids=jnp.dtype)
@pytest.mark.parametrize("w_dtype", [jnp.bfloat16, jnp.float16], ids=jnp.dtype)
def test_the_dtype_of_a_product_is_that_of_jax(x_dtype, w_dtype):
    w = eqq.Array8B.quantize(jax.random.normal(jax.random.key(0), (8, 8)), dtype=w_dtype)
    x = jax.random.normal(jax.random.key(1), (3, 8)).astype(x_dtype)
    programs = [
        lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))),
        lambda x, w: jax.lax.dot_general(w, x, (((1,), (1,)), ((), ()))),
        lambda x, w: jax.lax.dot_general(x, jax.lax.transpose(w, (1, 0)), (((1,), (0,)), ((), ()))),
        lambda x, w: jax.lax.ragged_dot(x, jax.lax.reshape(w, (1, 8, 8)), jnp.asarray([3])),
    ]
    for program in programs:
        got, want = eqq.implicit(program)(x, w), program(x, w.materialize())
        assert got.dtype == want.dtype
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=0.02, atol=0.06)
        gradient = jax.grad(lambda x: jnp.sum(eqq.implicit(program)(x, w).astype(jnp.float32)))  # noqa: B023
        assert gradient(x).dtype == x.dtype
