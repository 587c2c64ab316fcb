"""How long a linear layer takes with a quantized weight, next to the dense weight in float32.

python benchmarks/bench_matmul.py [--only "4096 square"] [--rows 1 16] [--runs 15]
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from _measure import interleaved, machine, save, seconds
from shapes import LINEAR, ROWS

import eqquant as eqq


FORMATS: dict[str, Callable[[Any], Any]] = {
    "dense float32": lambda w: w,
    "Array8B": eqq.Array8B.quantize,
    "Array8B, blocks of 64": partial(eqq.Array8B.quantize, block_size=64),
    "ArrayNF4": eqq.ArrayNF4.quantize,
    "Array1B, ternary": eqq.Array1B.quantize,
    "Array1B, binary": partial(eqq.Array1B.quantize, levels="binary"),
    "RSROperatorBinary": eqq.RSROperatorBinary.quantize,
    "RSROperatorTernary": eqq.RSROperatorTernary.quantize,
}
BASELINE = "dense float32"
SHORT = 2e-3  # seconds; shorter calls are repeated until they add up to this


def product(w: Any, x: Any) -> Any:
    """As `jax.vmap(eqx.nn.Linear(...))` does. (Dense `x @ w.T` is no fair baseline: with one row, XLA
    for CPU first copies the transposed weight, and takes 20 times as long.)"""
    return jax.vmap(lambda row: w @ row)(x)


def candidate(w: Any, x: Any) -> Callable[[], float]:
    """Measures one call of the compiled product."""
    compiled = jax.jit(eqq.implicit(product)).lower(w, x).compile()
    run = partial(compiled, w, x)
    seconds(run)
    calls = max(1, math.ceil(SHORT / seconds(run)))

    def measure() -> float:
        return sum(seconds(run) for _ in range(calls)) / calls

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[shape.name for shape in LINEAR])
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()

    print(machine())
    print(f"{args.runs} interleaved runs; ratio to the dense product: median (quartiles)")
    print(f"{'':18}{'outputs':>8}{'inputs':>7}{'rows':>5}{'dense':>10}", end="")
    print("".join(f"{name:>26}" for name in FORMATS if name != BASELINE))
    table = []
    for shape in LINEAR:
        if shape.name not in args.only:
            continue
        dense = jax.random.normal(jax.random.key(0), (shape.outputs, shape.inputs), jnp.float32)
        weights = {name: quantize(dense) for name, quantize in FORMATS.items()}
        for rows in args.rows:
            x = jax.random.normal(jax.random.key(1), (rows, shape.inputs), jnp.float32)
            candidates = {name: candidate(w, x) for name, w in weights.items()}
            found = interleaved(candidates, args.runs, BASELINE)
            table.append({**shape._asdict(), "rows": rows, "times": found})
            print(
                f"{shape.name:18}{shape.outputs:8}{shape.inputs:7}{rows:5}"
                f"{found[BASELINE]['median'] * 1e3:7.2f} ms"
                + "".join(
                    f"{t['ratio']:14.2f} ({t['low']:.2f}-{t['high']:.2f})"
                    for name, t in found.items()
                    if name != BASELINE
                ),
                flush=True,
            )
    save("matmul", {"runs": args.runs, "rows": table})


if __name__ == "__main__":
    main()
