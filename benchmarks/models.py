"""The models that benchmarks measure."""

from typing import Any

import equinox as eqx
import jax


class Block(eqx.Module):
    """Attention, then a two-layer perceptron, each after a norm and added to its input."""

    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]

    def __init__(self, width: int, key: Any):
        keys = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(8, width, key=keys[0])
        self.mlp = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=keys[1])
        self.norms = (eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width))

    def __call__(self, x: Any) -> Any:
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


class Transformer(eqx.Module):
    """Blocks of one width, on a sequence of vectors."""

    blocks: list[Block]

    def __init__(self, layers: int, width: int, key: Any):
        self.blocks = [Block(width, k) for k in jax.random.split(key, layers)]

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


def checkpointed_stack(blocks: Any, x: Any) -> Any:
    """Stacked blocks, one after the other; what happens in them is computed again for the backward pass."""
    arrays, static = eqx.partition(blocks, eqx.is_array)

    @jax.checkpoint
    def step(x: Any, arrays: Any) -> tuple[Any, None]:
        return eqx.combine(arrays, static)(x), None

    return jax.lax.scan(step, x, arrays)[0]
