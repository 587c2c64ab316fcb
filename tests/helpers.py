"""What many tests share: inputs, a loop of training, sentences of errors, cases that take turns."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import pytest

from eqquant import _compat, _dispatch, lora, native, testing


NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
"""Whether all cases run. Otherwise the formats take turns, so that each meets many cases and each case some formats."""

# The others take turns: each program takes its time to compile.
STRATEGIES = {"Array8B": testing.FORMATS["Array8B"], "any format": testing.arrays}


ON_CPU = "native" if native.info().loaded else "tiled"
"""What computes a product with a small matrix on CPU, if nothing else is asked for."""


def examples(share: float) -> hypothesis.settings:
    """So many of the examples of the profile."""
    base = hypothesis.settings()
    return hypothesis.settings(base, max_examples=max(4, int(base.max_examples * share)))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


ADAPTED_BASES = {"dense": lambda w: w} | {
    name: testing.QUANTIZERS[name] for name in ("int8", "nf4 double", "ternary")
}


def adapted_array(
    *shape: int, base: str = "nf4 double", rank: int = 3, window_axes: int = 0
) -> lora.AdaptedArray:
    """Random numbers with an adapter that does something."""
    out = len(shape) - 2 - window_axes
    shapes = (shape, (*shape[:out], rank, *shape[out + 1 :]), (*shape[: out + 1], rank))
    w, a, b = (normal(*each, seed=seed) for seed, each in enumerate(shapes))
    return lora.AdaptedArray(ADAPTED_BASES[base](w), a, b, 0.5, 0.0, window_axes=window_axes)


def small_mlp() -> eqx.nn.MLP:
    """From 16 to 4, by two hidden layers of 32."""
    return eqx.nn.MLP(16, 4, 32, 2, key=jax.random.key(0), activation=jnp.tanh)


def assert_raises(make: Callable[[], Any], error: type[Exception], words: Iterable[str]) -> None:
    """That it raises such an error, whose sentence holds these words."""
    with pytest.raises(error) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def train(
    loss: Callable[[Any], Any], trained: Any, optimizer: Any, steps: int
) -> tuple[Any, list[float]]:
    """Gradient descent: what was learned, and the loss before each step."""
    state = optimizer.init(eqx.filter(trained, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(trained: Any, state: Any) -> Any:
        value, gradient = eqx.filter_value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(trained, updates), state, value

    losses = []
    for _ in range(steps):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    return trained, losses


def in_turns(cases: Iterable[Any], others: Sequence[Any], each: int) -> list[tuple[Any, Any]]:
    """Each case with so many of the others, and each of these about equally often: where all pairs would take
    too long. Nightly, all of them."""
    each = len(others) if NIGHTLY else each
    return [
        (case, others[(i * each + j) % len(others)])
        for i, case in enumerate(cases)
        for j in range(min(each, len(others)))
    ]


@contextlib.contextmanager
def own_table() -> Iterator[None]:
    """Rules and laws that are added inside are forgotten after it."""
    resolvers, before = _dispatch._resolvers, dict(_dispatch._resolvers)
    laws = dict(testing.LAWS)
    for primitive, resolver in before.items():
        resolvers[primitive] = _compat.Resolver(primitive.name)
        for method in resolver.methods:
            resolvers[primitive].register(method)
    try:
        yield
    finally:
        resolvers.clear()
        resolvers.update(before)
        _dispatch._resolved.clear()
        _dispatch._table_version += 1
        testing.LAWS.clear()
        testing.LAWS.update(laws)
