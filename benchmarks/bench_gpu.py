"""The kernel for GPUs: first whether it is right, then how long it takes next to dense bfloat16 and to XLA's way.

python benchmarks/bench_gpu.py                # checks, then measures, and writes results/gpu.json
python benchmarks/bench_gpu.py --check        # checks only; with --interpret anywhere, without a GPU
python benchmarks/bench_gpu.py --tune         # tries block sizes, and prints entries for gpu/blocks.py

Options: [--only "8192 square"] [--formats ArrayNF4] [--rows 1 16] [--orientations last first] [--runs 15]
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _measure import interleaved, machine, save, timed
from shapes import LINEAR, ROWS

import eqquant as eqq
from eqquant.kernels.matmul import fused, gpu
from eqquant.kernels.matmul.gpu.blocks import Blocks, Case
from eqquant.kernels.matmul.gpu.product import case_of
from eqquant.kernels.matmul.reference import Axes


FORMATS: dict[str, Callable[[Any], Any]] = {
    "ArrayNF4": eqq.ArrayNF4.quantize,
    "ArrayNF4, double": partial(eqq.ArrayNF4.quantize, double=True),
    "Array8B, blocks of 128": partial(eqq.Array8B.quantize, block_size=128),
    "Array1B, ternary": eqq.Array1B.quantize,
    "Array1B, binary": partial(eqq.Array1B.quantize, levels="binary"),
    "RSROperatorTernary": eqq.RSROperatorTernary.quantize,
}
# Summed over the last axis of the weight, as `eqx.nn.Linear` does, or over its first.
ORIENTATIONS = {"last": 1, "first": 0}
SHAPES = ("1B up", "4096 square", "8192 square")
DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
COLD = 400 << 20
"""Bytes of weights that are read in turn, so that none stays in the cache of the device."""
MAX_WEIGHTS = 48


def product(implementation: Any, axis: int, x: Any, w: Any, **options: Any) -> Any:
    axes = Axes((1,), (axis,), (), ())
    y = implementation(x, w, axes=axes, precision=None, accumulate=jnp.float32, **options)
    return y.astype(x.dtype)


def check(args: argparse.Namespace) -> float:
    """The largest error of any product, in units of what rounding its factors and terms accounts for."""
    rng, worst = np.random.default_rng(0), 0.0
    shapes = [(96, 200), (33, 70), (256, 512)] if args.interpret else [(1000, 2010), (4096, 4096)]
    for shape, format, orientation, rows, (name, dtype) in itertools.product(
        shapes, args.formats, args.orientations, (1, 5, 16, 20), DTYPES.items()
    ):
        axis = ORIENTATIONS[orientation]
        w = FORMATS[format](jnp.asarray(rng.normal(size=shape), dtype))
        x = jnp.asarray(rng.normal(size=(rows, shape[axis])), dtype)
        run = jax.jit(partial(product, gpu, axis, interpret=args.interpret))
        x64, w64 = np.asarray(x, np.float64), np.asarray(w.materialize(), np.float64)
        w64 = w64.T if axis else w64
        eps = float(jnp.finfo(dtype).eps) + (len(w64) + 4) * np.finfo(np.float32).eps
        # Of the result, and of the factors.
        bound = 2 * eps * (np.abs(x64) @ np.abs(w64)) + float(jnp.finfo(dtype).tiny)
        error = float((np.abs(np.asarray(run(x, w), np.float64) - x64 @ w64) / bound).max())
        worst = max(worst, error)
        if not error <= 1:
            print(f"WRONG: {format} {shape} {orientation} {rows} rows {name}: {error:.3g}")
    print(f"checked against float64: the largest error is {worst:.3g} of the bound")
    return worst


def cold(run: Callable[[Any, Any], Any], x: Any, weights: list[Any]) -> Callable[[], float]:
    """Measures one product; each call computes one with every weight."""
    compiled = jax.jit(lambda x, ws: [run(x, w) for w in ws]).lower(x, weights).compile()
    measure = timed([partial(compiled, x, weights)])
    return lambda: measure() / len(weights)


def copies(w: Any) -> list[Any]:
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(w))
    count = min(MAX_WEIGHTS, -(-COLD // nbytes))
    return [w, *(jax.tree.map(jnp.copy, w) for _ in range(count - 1))]


def weights_of(shape: Any, format: str) -> Any:
    dense = jax.random.normal(jax.random.key(0), (shape.outputs, shape.inputs), jnp.bfloat16)
    return dense if format == "dense" else FORMATS[format](dense)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for shape, orientation, rows in cases(args):
        axis = ORIENTATIONS[orientation]
        x = jnp.ones((rows, (shape.outputs, shape.inputs)[axis]), jnp.bfloat16)
        dense = lambda x, w: x @ (w.T if axis else w)  # noqa: B023, E731
        for format in args.formats:
            candidates = {"dense": cold(dense, x, copies(weights_of(shape, "dense")))}
            quantized = copies(weights_of(shape, format))
            for name, implementation in {"gpu": gpu, "xla": fused}.items():
                candidates[name] = cold(partial(product, implementation, axis), x, quantized)
            found = interleaved(candidates, args.runs, "dense")
            row = dict(shape=shape.name, orientation=orientation, rows=rows, format=format)
            results.append(row | found)
            times = "  ".join(
                f"{name} {found[name]['median'] * 1e6:8.1f} µs x{1 / found[name]['ratio']:.2f}"
                for name in candidates
            )
            print(f"{shape.name:14} {orientation:5} {rows:4} {format:24} {times}", flush=True)
    return results


def cases(args: argparse.Namespace) -> Iterator[tuple[Any, str, int]]:
    shapes = [shape for shape in LINEAR if shape.name in args.only]
    yield from itertools.product(shapes, args.orientations, args.rows)


def tune(args: argparse.Namespace) -> None:
    """Tries block sizes for the largest shape given, and prints the best for each case."""
    best: dict[Case, tuple[float, Blocks]] = {}
    shape = max((shape for shape, _, _ in cases(args)), key=lambda shape: shape.elements)
    for orientation, rows, format in itertools.product(args.orientations, args.rows, args.formats):
        axis = ORIENTATIONS[orientation]
        x = jnp.ones((rows, (shape.outputs, shape.inputs)[axis]), jnp.bfloat16)
        weights = copies(weights_of(shape, format))
        case = case_of(rows, weights[0], axis, jnp.dtype(jnp.bfloat16))
        for outputs, inputs, warps, stages in itertools.product(
            (16, 32, 64, 128, 256), (16, 32, 64, 128), (2, 4, 8), (2, 3, 4)
        ):
            blocks = Blocks(case.rows, outputs, inputs, warps, stages)
            run = partial(product, gpu, axis, blocks=blocks)
            try:
                measured = cold(run, x, weights)
                time = min(measured() for _ in range(3))
            except Exception as error:  # too much shared memory, say
                print(f"{case} {blocks}: {str(error)[:80]}")
                continue
            if time < best.get(case, (np.inf,))[0]:
                best[case] = (time, blocks)
                print(f"{case} {blocks}: {time * 1e6:.1f} µs", flush=True)
    print(f'    "{jax.devices()[0].device_kind}": {{')
    for case, (_, blocks) in best.items():
        print(f"        {case}: {blocks},")
    print("    },")


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--only", nargs="*", default=SHAPES)
    parser.add_argument("--formats", nargs="*", default=[*FORMATS], choices=FORMATS)
    parser.add_argument("--orientations", nargs="*", default=[*ORIENTATIONS], choices=ORIENTATIONS)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()

    print(machine())
    if not args.interpret and jax.default_backend() != "gpu":
        sys.exit("no GPU is here; --check --interpret runs anywhere")
    if check(args) > 1:
        sys.exit("the kernel is wrong here: nothing is measured")
    if args.tune:
        tune(args)
    elif not (args.check or args.interpret):
        save("gpu", {"device": jax.devices()[0].device_kind, "rows": measure(args)})


if __name__ == "__main__":
    main()
