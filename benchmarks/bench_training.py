"""A step of training adapters over a frozen base: in 4 bits, next to the dense base in float32.

python benchmarks/bench_training.py [--width 1024] [--layers 12] [--tokens 512] [--runs 7]

Time, and the memory that XLA plans: arguments and temporaries of the compiled step.
"""

import argparse
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from _measure import interleaved, machine, save, seconds
from models import Block, checkpointed_stack

import eqquant as eqq
from eqquant._registry import QUANTIZERS


BASES = {"dense float32": None} | {
    QUANTIZERS[name].title: QUANTIZERS[name] for name in ("nf4 double", "int8")
}
BASELINE = "dense float32"
OPTIMIZER = optax.adam(1e-3)


def compiled_step(dense: Any, how: Any, x: Any) -> tuple[Any, tuple[Any, ...]]:
    """The compiled step, and its arguments."""

    def adapted(block: Any, key: Any) -> Any:
        base = block if how is None else eqq.quantize(block, how)
        return eqq.lora.add(base, rank=8, key=key)

    layers = len(jax.tree.leaves(eqx.filter(dense, eqx.is_array))[0])
    model = eqx.filter_vmap(adapted)(dense, jax.random.split(jax.random.key(1), layers))
    trained, frozen = eqx.partition(model, eqq.lora.adapters(model))
    frozen, static = eqx.partition(frozen, eqx.is_array)

    @jax.jit
    def step(trained: Any, state: Any, frozen: Any, x: Any) -> Any:
        def loss(trained: Any) -> Any:
            model = eqx.combine(trained, frozen, static)
            return jnp.mean((eqq.implicit(checkpointed_stack)(model, x) - x) ** 2)

        gradient = jax.grad(loss)(trained)
        updates, state = OPTIMIZER.update(gradient, state)
        return eqx.apply_updates(trained, updates), state

    arguments = (trained, OPTIMIZER.init(trained), frozen, x)
    return step.lower(*arguments).compile(), arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()

    keys = jax.random.split(jax.random.key(0), args.layers)
    dense = eqx.filter_vmap(lambda key: Block(args.width, key))(keys)
    x = jax.random.normal(jax.random.key(2), (args.tokens, args.width))
    candidates, memory = {}, {}
    for name, how in BASES.items():
        step, arguments = compiled_step(dense, how, x)
        planned = step.memory_analysis()
        memory[name] = planned.argument_size_in_bytes + planned.temp_size_in_bytes
        candidates[name] = partial(seconds, partial(step, *arguments))
        candidates[name]()
    found = interleaved(candidates, args.runs, BASELINE)
    print(machine())
    print(
        f"{args.layers} layers of width {args.width}, checkpointed, {args.tokens} "
        f"tokens, adapters of rank 8 on all weights; {args.runs} interleaved runs"
    )
    print(f"{'base':20}{'seconds':>9}{'time / dense':>24}{'MB':>9}{'memory / dense':>16}")
    for name, t in found.items():
        ratio = f"{t['ratio']:.2f} ({t['low']:.2f}-{t['high']:.2f})"
        share = memory[name] / memory[BASELINE]
        print(f"{name:20}{t['median']:9.3f}{ratio:>24}{memory[name] / 1e6:9.0f}{share:16.2f}")
        found[name]["bytes"] = memory[name]
    shape = {name: getattr(args, name) for name in ("layers", "width", "tokens")}
    save("training", {**shape, "runs": args.runs, "bases": found})


if __name__ == "__main__":
    main()
