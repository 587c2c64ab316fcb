"""One hypothesis strategy for each format: it draws the stored leaves, not the output of `quantize`.

Rules have to hold for every legal array, so scales are of any sign and layout, and codes take
every value they may take.
"""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

import eqquant as eqq


# Few shapes: each new one is a compilation. Lengths that blocks of 2 and 3 divide or do not.
SHAPES = {1: [(6,)], 2: [(4, 6), (1, 5)], 3: [(2, 4, 6)]}
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]

FORMATS: dict[str, Callable[..., st.SearchStrategy]] = {}


def strategy_for(format: type) -> Callable[[Callable[..., Any]], Any]:
    """Registers the strategy of a format: `(shape, dtype) -> strategy of arrays`."""

    def register(function: Callable[..., Any]) -> Any:
        FORMATS[format.__name__] = st.composite(function)
        return FORMATS[format.__name__]

    return register


def generator(draw: Any) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**16)))


def scales(draw: Any, shape: tuple[int, ...], block_size: int | None = 2) -> Any:
    """A scale for `shape`: along each axis one for all, one each, or one for each block."""
    rng = generator(draw)
    stored = [
        draw(st.sampled_from([1, n] + ([-(-n // block_size)] if block_size else []))) for n in shape
    ]
    sign = rng.choice([-1.0, 1.0], stored)
    return jnp.asarray(sign * np.exp(rng.uniform(-3, 3, stored)), jnp.float32)


@strategy_for(eqq.Array8B)
def array8b(draw: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> eqq.Array8B:
    block_size = draw(st.sampled_from([None, 2, 3]))
    codes = generator(draw).integers(-127, 128, shape)
    return eqq.Array8B(
        scales(draw, shape, block_size), jnp.asarray(codes, jnp.int8), dtype=dtype,
        block_size=block_size,
    )  # fmt: skip
