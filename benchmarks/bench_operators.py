"""Single operators outside of `jit`: quantized arrays next to the dense one.

python benchmarks/bench_operators.py [--size 512] [--runs 100]

How long a call takes once it is compiled. It measures Python and JAX as much as the arithmetic.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from _measure import interleaved, save, seconds

import eqquant as eqq
from eqquant._registry import QUANTIZERS


FORMATS = ("int8", "int4", "nf4", "nf4 double", "fp8", "nvfp4", "ternary", "binary")
OPERATORS: dict[str, Callable[[Any, jax.Array], Any]] = {
    "q @ x": lambda q, x: q @ x[0],
    "x @ q": lambda q, x: q.__rmatmul__(x[0]) if eqq.is_implicit(q) else x[0] @ q,
    "q * 2": lambda q, x: q * 2,
    "-q": lambda q, x: -q,
    "q + x": lambda q, x: q + x,
    "q.T": lambda q, x: q.T,
    "q[0]": lambda q, x: q[0],
    "q[2:4]": lambda q, x: q[2:4],
    "q.sum()": lambda q, x: q.sum(),
    "q.astype": lambda q, x: q.astype(jnp.bfloat16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--runs", type=int, default=100)
    args = parser.parse_args()
    x = jax.random.normal(jax.random.key(0), (args.size, args.size))
    arrays = {"dense": x} | {name: QUANTIZERS[name](x) for name in FORMATS}
    rows = []
    for operator, run in OPERATORS.items():
        calls = {name: partial(run, q, x) for name, q in arrays.items()}
        with eqq.on_materialize("ignore"):
            for call in calls.values():
                seconds(call)  # compiles
            found = interleaved(
                {name: partial(seconds, call) for name, call in calls.items()}, args.runs, "dense"
            )
        rows += [dict(operator=operator, array=name, **times) for name, times in found.items()]
        ratios = ", ".join(f"{name} {times['ratio']:.1f}" for name, times in found.items())
        print(f"{operator}: dense {found['dense']['median'] * 1e6:.0f} us; {ratios}")
    save("operators", {"size": args.size, "rows": rows})


if __name__ == "__main__":
    main()
