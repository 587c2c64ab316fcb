"""What the tests of the kernels for GPUs and for TPUs share: they run here by interpretation, or are lowered only."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqquant as eqq
from eqquant.kernels.matmul import choice
from eqquant.kernels.matmul.axes import Axes
from eqquant.kernels.matmul.product import Product, Target


LAST, FIRST = Axes((1,), (1,), (), ()), Axes((1,), (0,), (), ())
PLATFORMS = ("cpu", "cuda", "tpu")
VECTOR = jax.ShapeDtypeStruct((1024,), jnp.bfloat16)


def check(y: Any, x: Any, w: Any, axes: Axes) -> None:
    """Each factor may be rounded to its dtype, and each term of the sum to float32."""
    x64, w64 = np.asarray(x, np.float64), np.asarray(w.materialize(), np.float64)
    w64 = w64.T if axes == LAST else w64
    eps = (w64.shape[0] + 4) * np.finfo(np.float32).eps
    if x.dtype != jnp.float32:
        eps += float(jnp.finfo(x.dtype).eps)
    assert (
        np.abs(np.asarray(y, np.float64) - x64 @ w64) <= eps * (np.abs(x64) @ np.abs(w64))
    ).all()


def interpreted(
    monkeypatch: pytest.MonkeyPatch, name: str, kernel: Callable[..., Any]
) -> Iterator[list[Any]]:
    """On CPU, the implementation of this name runs by interpretation; its calls are listed."""
    calls = []

    def run(product: Product, target: Target) -> Any:
        calls.append((product.x.shape, product.axes.w_contract))
        return kernel(product, target, interpret=True)

    here = choice.IMPLEMENTATIONS[name]._replace(run=run, platforms=("cpu",))
    monkeypatch.setitem(choice.IMPLEMENTATIONS, name, here)
    yield calls
    jax.clear_caches()


def structs(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def lower(f: Any, *args: Any, platforms: Any) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=platforms).as_text()


def dot(x: Any, w: Any, implementation: str | None = None) -> Any:
    return eqq.implicit(lambda x, w: x @ w.T, implementation=implementation)(x, w)


def model(how: Any, implementation: str | None = None) -> tuple[Any, Callable[..., Any]]:
    """A quantized model of three layers, of shapes alone: its arrays, and a function of these and of a `VECTOR`."""
    mlp = eqx.filter_eval_shape(
        lambda: eqq.quantize(
            eqx.nn.MLP(1024, 1024, 1024, 2, dtype=jnp.bfloat16, key=jax.random.key(0)), how
        )
    )
    leaves, static = eqx.partition(mlp, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def applied(leaves: Any, x: Any) -> Any:
        return eqq.implicit(eqx.combine(leaves, static), implementation=implementation)(x)

    return leaves, applied


def check_stack(by_kernel: Callable[..., Any], how: Any, axis: int = 1) -> None:
    """A product of several inputs with as many matrices, and its derivative."""
    rng = np.random.default_rng(0)
    w = jax.vmap(partial(how, axis=axis))(jnp.asarray(rng.normal(size=(3, 64, 128)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(3, 2, (64, 128)[axis])), jnp.float32)
    y, pull_back = jax.vjp(lambda x: jax.vmap(by_kernel)(x, w), x)
    (x_ct,) = pull_back(y)
    there, back = (LAST, FIRST) if axis else (FIRST, LAST)
    for i in range(3):
        matrix = jax.tree.map(lambda leaf, i=i: leaf[i], w)
        check(y[i], x[i], matrix, there)
        check(x_ct[i], y[i], matrix, back)


def stacked(w: Any) -> Any:
    """Of shapes alone: eight of them."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((8, *leaf.shape), leaf.dtype), w)
