"""How long a transformer takes with quantized weights: one decoding step, and reading a prompt.

python benchmarks/bench_model.py [--width 1024] [--layers 12] [--tokens 128] [--runs 9]
"""

import argparse
from functools import partial
from typing import Any

import equinox as eqx
import jax
from _measure import interleaved, machine, save, seconds
from bench_matmul import formats
from models import decode_step, Transformer

import eqquant as eqq


FORMATS = {"dense float32": None} | formats(-1)
BASELINE = "dense float32"


def compiled(f: Any, model: Any, *args: Any) -> Any:
    """A call of the compiled program, weights passed as arguments."""
    arrays, static = eqx.partition(model, eqx.is_array)
    run = eqq.implicit(lambda model, *args: f(model, *args))
    program = jax.jit(lambda arrays, *args: run(eqx.combine(arrays, static), *args))
    return partial(program.lower(arrays, *args).compile(), arrays, *args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128, help="of the prompt, and in the cache")
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()

    dense = Transformer(args.layers, args.width, jax.random.key(0))
    token = jax.random.normal(jax.random.key(1), (args.width,))
    prompt = jax.random.normal(jax.random.key(2), (args.tokens, args.width))
    cache = jax.random.normal(jax.random.key(3), (args.tokens, 8, args.width // 8))
    caches = [(cache, cache)] * args.layers
    print(machine())
    print(
        f"{args.layers} layers of width {args.width}, {args.tokens} tokens, {args.runs} interleaved runs"
    )
    results = {}
    models = {
        name: dense if how is None else eqq.quantize(dense, how) for name, how in FORMATS.items()
    }
    nbytes = {
        name: sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
        for name, model in models.items()
    }
    for what, f, inputs in (
        ("decoding step", decode_step, (token, caches)),
        ("prompt", lambda model, x: model(x), (prompt,)),
    ):
        candidates = {}
        for name, model in models.items():
            candidates[name] = partial(seconds, compiled(f, model, *inputs))
            candidates[name]()
        found = results[what] = interleaved(candidates, args.runs, BASELINE)
        print(f"\n{what:28}{'ms':>9}{'dense time / time':>24}{'MB of weights':>15}")
        for name, t in found.items():
            ratio = f"{1 / t['ratio']:.2f} ({1 / t['high']:.2f}-{1 / t['low']:.2f})"
            print(f"{name:28}{t['median'] * 1e3:9.2f}{ratio:>24}{nbytes[name] / 1e6:15.1f}")
    shape = {name: getattr(args, name) for name in ("layers", "width", "tokens")}
    save("model", {**shape, "runs": args.runs, "bytes": nbytes, **results})


if __name__ == "__main__":
    main()
