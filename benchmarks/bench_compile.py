"""How much longer a quantized transformer takes to trace, lower and compile than the dense one.

python benchmarks/bench_compile.py [--width 256] [--layers 12] [--runs 9]
"""

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from _measure import interleaved, machine, save
from models import Transformer

import eqquant as eqq


PHASES = ("trace", "lower", "compile", "total")


def phases(model: Callable[..., Any], x: Any) -> dict[str, float]:
    """Seconds of each phase, all caches of JAX empty."""
    jax.clear_caches()
    arrays, static = eqx.partition(model, eqx.is_array)
    jitted = jax.jit(lambda arrays, x: eqx.combine(arrays, static)(x))
    marks = [time.perf_counter()]
    traced = jitted.trace(arrays, x)
    marks.append(time.perf_counter())
    lowered = traced.lower()
    marks.append(time.perf_counter())
    lowered.compile()
    marks.append(time.perf_counter())
    steps = [b - a for a, b in itertools.pairwise(marks)]
    return dict(zip(PHASES, [*steps, marks[-1] - marks[0]], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()

    dense = Transformer(args.layers, args.width, jax.random.key(0))
    quantized = eqq.implicit(eqq.quantize(dense, eqq.Array8B.quantize))
    x = jnp.ones((32, args.width))
    samples: dict[str, list[dict[str, float]]] = {"dense": [], "Array8B": []}

    def measure(name: str, model: Any) -> float:
        samples[name].append(phases(model, x))
        return samples[name][-1]["total"]

    for warm_up in (dense, quantized):
        phases(warm_up, x)
    found = interleaved(
        {
            "dense": lambda: measure("dense", dense),
            "Array8B": lambda: measure("Array8B", quantized),
        },
        args.runs,
        "dense",
    )
    print(machine())
    print(
        f"{args.layers} layers of width {args.width}, {args.runs} interleaved runs, medians in seconds"
    )
    print(f"{'':10}" + "".join(f"{phase:>10}" for phase in PHASES) + f"{'ratio':>10}")
    for name, times in samples.items():
        medians = [sorted(t[phase] for t in times)[len(times) // 2] for phase in PHASES]
        print(
            f"{name:10}" + "".join(f"{m:10.3f}" for m in medians) + f"{found[name]['ratio']:10.2f}"
        )
        found[name] |= dict(zip(PHASES, medians, strict=True))
    save("compile", {"layers": args.layers, "width": args.width, "runs": args.runs, **found})


if __name__ == "__main__":
    main()
