"""How fast weights are quantized and made dense again, jitted, in elements a second.

python benchmarks/bench_quantize.py [--rows 4096] [--columns 4096] [--runs 15]

The baseline reads the array once and writes a quarter of its bytes: rounding to int8 without a scale.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
from _measure import interleaved, machine, save, seconds

from eqquant._registry import QUANTIZERS


FORMATS = {each.title: each for each in QUANTIZERS.values()}
BASELINE = "one pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()

    x = jax.random.normal(jax.random.key(0), (args.rows, args.columns), jnp.float32)
    functions = {BASELINE: lambda x: (x * 32).astype(jnp.int8), **FORMATS}
    quantizers = {name: jax.jit(f).lower(x).compile() for name, f in functions.items()}
    arrays = {name: f(x) for name, f in quantizers.items()}
    dense = {
        name: jax.jit(lambda q: q.astype(jnp.float32) if name == BASELINE else q.materialize())  # noqa: B023
        .lower(q)
        .compile()
        for name, q in arrays.items()
    }
    both = {
        "quantize": {name: partial(seconds, partial(f, x)) for name, f in quantizers.items()},
        "materialize": {
            name: partial(seconds, partial(f, arrays[name])) for name, f in dense.items()
        },
    }
    print(machine())
    print(f"float32[{args.rows},{args.columns}], {args.runs} interleaved runs")
    results = {}
    for direction, candidates in both.items():
        found = results[direction] = interleaved(candidates, args.runs, BASELINE)
        print(f"{direction:24}{'Gelements/s':>12}{'time / one pass':>18}")
        for name, times in found.items():
            print(f"{name:24}{x.size / times['median'] / 1e9:12.2f}{times['ratio']:18.2f}")
    save("quantize", {"shape": [args.rows, args.columns], "runs": args.runs, **results})


if __name__ == "__main__":
    main()
