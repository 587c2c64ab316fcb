"""Programs that are exported for any batch: choices by size have an answer where the size is a symbol."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import eqquant as eqq
from eqquant.testing import LAYOUTS


PROGRAMS = {
    "x @ w.T": lambda x, w: x @ w.T,
    "x @ w": lambda x, w: x[:, :16] @ w,
    "vmap": lambda x, w: jax.vmap(lambda row: w @ row)(x),
    "einsum": lambda x, w: jnp.einsum("bk,ok->ob", x, w),
    "gradient": lambda x, w: jax.grad(lambda x: jnp.sum(jnp.sin(x @ w.T)))(x),
}


def batches(*shape: int, platforms: tuple[str, ...] = ("cpu",)):
    """Exports a function of an array whose first axis may have any length."""
    (b,) = export.symbolic_shape("b")
    struct = jax.ShapeDtypeStruct((b, *shape), jnp.float32)
    return lambda f: export.export(jax.jit(f), platforms=platforms)(struct)


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_number_of_rows(name):
    w = LAYOUTS[name](jax.random.normal(jax.random.key(0), (16, 64)))
    program = list(PROGRAMS)[[*LAYOUTS].index(name) % len(PROGRAMS)]  # they take turns
    for each in {"x @ w.T", program}:
        run = eqq.implicit(PROGRAMS[each])
        exported = batches(64)(lambda x: run(x, w))  # noqa: B023
        for rows in (1, 5):
            x = jax.random.normal(jax.random.key(rows), (rows, 64))
            want = PROGRAMS[each](x, w.materialize())
            np.testing.assert_allclose(exported.call(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int8", "nf4", "ternary", "int4 affine"])
def test_large_weights(name):
    w = LAYOUTS[name](jax.random.normal(jax.random.key(0), (1024, 1024)))
    exported = batches(1024)(lambda x: eqq.implicit(lambda x, w: x @ w.T)(x, w))
    x = jax.random.normal(jax.random.key(1), (3, 1024))
    np.testing.assert_allclose(exported.call(x), x @ w.materialize().T, rtol=1e-3, atol=1e-3)


def test_every_platform():
    w = eqq.ArrayNF4.quantize(jax.random.normal(jax.random.key(0), (64, 128)))
    exported = batches(128, platforms=("cpu", "cuda", "tpu"))(
        lambda x: eqq.implicit(lambda x, w: x @ w.T)(x, w)
    )
    x = jnp.ones((2, 128))
    np.testing.assert_allclose(exported.call(x), x @ w.materialize().T, rtol=1e-4, atol=1e-4)


def test_convolution_and_experts():
    kernel = eqq.Array8B.quantize(jax.random.normal(jax.random.key(0), (64, 128, 3, 3)))
    exported = batches(128, 8, 8)(
        lambda x: eqq.implicit(lambda x, w: lax.conv(x, w, (1, 1), "SAME"))(x, kernel)
    )
    x = jax.random.normal(jax.random.key(1), (2, 128, 8, 8))
    want = lax.conv(x, kernel.materialize(), (1, 1), "SAME")
    np.testing.assert_allclose(exported.call(x), want, rtol=1e-3, atol=1e-2)
    experts = eqq.Array8B.quantize(jax.random.normal(jax.random.key(0), (2, 16, 8)), axis=1)
    sizes = jnp.asarray([3, 2])
    exported = batches(16)(
        lambda x: eqq.implicit(lambda x, w: lax.ragged_dot(x, w, sizes))(x, experts)
    )
    x = jax.random.normal(jax.random.key(2), (5, 16))
    want = lax.ragged_dot(x, experts.materialize(), sizes)
    np.testing.assert_allclose(exported.call(x), want, rtol=1e-4, atol=1e-4)
