"""The models that benchmarks measure."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp


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


def decode_step(model: Transformer, x: Any, caches: Any) -> tuple[Any, Any]:
    """One token after the `caches`: for each block, the keys and values (tokens, heads, size) so far, of which
    the first are dropped."""
    new = []
    for block, (keys, values) in zip(model.blocks, caches, strict=True):
        attention, h = block.attention, block.norms[0](x)
        heads = (attention.num_heads, -1)
        query, key, value = (
            project(h).reshape(heads)
            for project in (attention.query_proj, attention.key_proj, attention.value_proj)
        )
        keys, values = (
            jnp.concatenate([cache[1:], now[None]]) for cache, now in ((keys, key), (values, value))
        )
        scores = jnp.einsum("hd,thd->ht", query, keys) / query.shape[-1] ** 0.5
        mixed = jnp.einsum("ht,thd->hd", jax.nn.softmax(scores), values)
        x = x + attention.output_proj(mixed.reshape(-1))
        x = x + block.mlp(block.norms[1](x))
        new.append((keys, values))
    return x, new


def checkpointed_stack(blocks: Any, x: Any) -> Any:
    """Stacked blocks, one after the other; what happens in them is computed again for the backward pass."""
    arrays, static = eqx.partition(blocks, eqx.is_array)

    @jax.checkpoint
    def step(x: Any, arrays: Any) -> tuple[Any, None]:
        return eqx.combine(arrays, static)(x), None

    return jax.lax.scan(step, x, arrays)[0]
