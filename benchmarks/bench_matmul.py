"""How long a linear layer takes with a quantized weight, next to the dense weight in float32.

python benchmarks/bench_matmul.py [--only "4096 square"] [--rows 1 16] [--runs 15]
    [--orientations "w @ x" "x @ w"] [--dtypes float32 bfloat16 float16] [--name matmul]
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from _measure import interleaved, machine, save, timed, with_earlier
from shapes import LINEAR, ROWS

import eqquant as eqq
from eqquant._registry import LAYOUTS


COLUMN_MAJOR = ("nf4", "ternary", "binary")


def formats(axis: int) -> dict[str, Callable[[Any], Any]]:
    """Every format, with scales along the axis that a product sums over."""
    found: dict[str, Callable[[Any], Any]] = {}
    for name, each in LAYOUTS.items():
        found[each.title] = partial(each, axis=axis)
        if name == "int8":
            found[f"{each.title}, int8 activations"] = partial(each, axis=axis, activations="int8")
        if name in COLUMN_MAJOR and axis == -1:
            found[f"{each.title}, column-major"] = each.column_major
    return found


BASELINE = "dense float32"

# As `jax.vmap(eqx.nn.Linear(...))` has it, weight (outputs, inputs); and as `x @ w` has it, weight (inputs,
# outputs). (Dense `x @ w.T` is no fair baseline: with one row, XLA for CPU first copies the transposed weight,
# and takes 20 times as long.)
ORIENTATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "w @ x": lambda w, x: jax.vmap(lambda row: w @ row)(x),
    "x @ w": lambda w, x: x @ w,
}


def candidate(product: Callable[[Any, Any], Any], w: Any, x: Any) -> Callable[[], float]:
    """Measures one call of the compiled product."""
    compiled = jax.jit(eqq.implicit(product)).lower(w, x).compile()
    return timed([partial(compiled, w, x)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[shape.name for shape in LINEAR])
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--orientations", nargs="*", default=["w @ x"], choices=ORIENTATIONS)
    parser.add_argument("--dtypes", nargs="*", default=["float32"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--name", default="matmul", help="of the file with the results")
    args = parser.parse_args()

    print(machine())
    print(f"{args.runs} interleaved runs; time of dense float32 over time: median (quartiles)")
    table = []
    for shape in (shape for shape in LINEAR if shape.name in args.only):
        for orientation in args.orientations:
            outputs_first = orientation == "w @ x"
            size = (shape.outputs, shape.inputs) if outputs_first else (shape.inputs, shape.outputs)
            dense = jax.random.normal(jax.random.key(0), size, jnp.float32)
            axis = -1 if outputs_first else 0
            weights = {name: how(dense) for name, how in formats(axis).items()}
            for dtype in args.dtypes:
                for rows in args.rows:
                    x = jax.random.normal(jax.random.key(1), (rows, shape.inputs), jnp.float32)
                    product = ORIENTATIONS[orientation]
                    candidates = {BASELINE: candidate(product, dense, x)}
                    if dtype != "float32":
                        low = dense.astype(dtype)
                        candidates[f"dense {dtype}"] = candidate(product, low, x.astype(dtype))
                    for name, w in weights.items():
                        cast = eqq.implicit(lambda w: w.astype(dtype))(w)  # noqa: B023
                        candidates[name] = candidate(product, cast, x.astype(dtype))
                    found = interleaved(candidates, args.runs, BASELINE)
                    where = dict(rows=rows, orientation=orientation, dtype=dtype)
                    table.append({**shape._asdict(), **where, "times": found})
                    print(
                        f"\n{shape.name}: {orientation}, {dtype}, {rows} row(s), dense float32 "
                        f"{found[BASELINE]['median'] * 1e3:.2f} ms"
                    )
                    for name, t in found.items():
                        low, high = 1 / t["high"], 1 / t["low"]
                        print(
                            f"  {name:28}{1 / t['ratio']:6.2f} ({low:.2f}-{high:.2f})", flush=True
                        )
    key = ("name", "orientation", "dtype", "rows")
    save(args.name, with_earlier(args.name, {"runs": args.runs, "rows": table}, key))


if __name__ == "__main__":
    main()
