"""The kernel for GPUs: first whether it is right, then how long it takes next to dense bfloat16 and to XLA's way.

python benchmarks/bench_gpu.py                # checks, then measures, and writes results/gpu.json
python benchmarks/bench_gpu.py --check        # checks only
python benchmarks/bench_gpu.py --tune         # tries block sizes, and prints entries for gpu/blocks.py

Options: [--only "8192 square"] [--formats ArrayNF4] [--rows 1 16] [--orientations last first] [--runs 15]
With --interpret all of it runs anywhere, without a GPU, on one small shape; its times mean nothing.

Each candidate has as many copies of its weight as exceed the cache of the device, used in turn, and several such turns
are queued before it is waited for. *share* is the part of the time that the device needs at least: to read what is
stored, at the rate of a copy, or to compute, at the rate of a dense product, both measured first. If `bitsandbytes` is
installed, its NF4 takes part.
"""

import argparse
import functools
import importlib.util
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _measure import interleaved, machine, save
from shapes import LINEAR, Linear

from eqquant._registry import QUANTIZERS
from eqquant.kernels.matmul import xla
from eqquant.kernels.matmul.axes import Axes
from eqquant.kernels.matmul.choice import choose
from eqquant.kernels.matmul.gpu import product as gpu
from eqquant.kernels.matmul.gpu.blocks import Blocks, blocks_for, Case
from eqquant.kernels.matmul.product import Product, Target


NAMES = ("int8", "nf4", "nf4 double", "ternary", "binary", "rsr ternary")
FORMATS: dict[str, Callable[[Any], Any]] = {
    **{QUANTIZERS[name].title: QUANTIZERS[name] for name in NAMES},
    "Array8B, blocks of 128": partial(QUANTIZERS["int8"], block_size=128),
}
# Summed over the last axis of the weight, as `eqx.nn.Linear` does, or over its first.
ORIENTATIONS = {"last": 1, "first": 0}
SHAPES = ("8B down", "8192 square")
ROWS = (1, 16, 64, 256, 2048)
TINY = Linear("tiny", 48, 64)
DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
COLD = 400 << 20
"""Bytes of weights that are read in turn, so that none stays in the cache of the device."""
MAX_WEIGHTS = 48
QUEUED = 10e-3
"""Seconds of work that are queued before it is waited for."""


def as_product(axis: int, x: Any, w: Any) -> Product:
    return Product(x, w, Axes((1,), (axis,), (), ()))


def product(compute: Any, axis: int, x: Any, w: Any, **options: Any) -> Any:
    target = Target("cuda", device=jax.devices()[0].device_kind)
    return compute(as_product(axis, x, w), target, **options).astype(x.dtype)


# -------------------------------------------------------------------------------------- right?


def check(args: argparse.Namespace) -> float:
    """The largest error of any product, in units of what rounding its factors and terms accounts for."""
    rng, worst = np.random.default_rng(0), 0.0
    shapes = [(TINY.outputs, 70)] if args.interpret else [(1000, 2010), (4096, 4096)]
    for shape, format, orientation, rows, (name, dtype) in itertools.product(
        shapes, args.formats, args.orientations, (1, 5, 16, 20), DTYPES.items()
    ):
        axis = ORIENTATIONS[orientation]
        w = FORMATS[format](jnp.asarray(rng.normal(size=shape), dtype))
        x = jnp.asarray(rng.normal(size=(rows, shape[axis])), dtype)
        run = jax.jit(partial(product, gpu.compute, axis, interpret=args.interpret))
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


# --------------------------------------------------------------------------------------- fast?


def queued(call: Callable[[], Any], wait: Callable[[Any], Any]) -> Callable[[], float]:
    """Measures a call in seconds, among several that the device is given at once."""

    def seconds(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            out = call()
        wait(out)
        return (time.perf_counter() - start) / repeats

    seconds(1)  # compiles
    repeats = max(1, round(QUEUED / seconds(1)))
    return partial(seconds, repeats)


def cold(run: Callable[[Any, Any], Any], x: Any, weights: Sequence[Any]) -> Callable[[], float]:
    """Measures one product; each call computes one with every weight."""
    once = jax.jit(run)  # lowered once
    compiled = jax.jit(lambda x, ws: [once(x, w) for w in ws]).lower(x, weights).compile()
    measure = queued(partial(compiled, x, weights), jax.block_until_ready)
    return lambda: measure() / len(weights)


def stored(w: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(w))


def copies(nbytes: int) -> int:
    """How many weights of this size exceed the cache."""
    return min(MAX_WEIGHTS, -(-COLD // nbytes))


def copied(w: Any) -> list[Any]:
    return [w, *(jax.tree.map(jnp.copy, w) for _ in range(copies(stored(w)) - 1))]


def weights_of(shape: Linear, format: str) -> Any:
    dense = jax.random.normal(jax.random.key(0), (shape.outputs, shape.inputs), jnp.bfloat16)
    return dense if format == "dense" else FORMATS[format](dense)


def limits(args: argparse.Namespace) -> dict[str, float]:
    """Bytes a second that a copy reads and writes, and operations a second of a dense product."""
    count, size = (1 << 12, 64) if args.interpret else (1 << 28, 8192)
    x, a = jnp.zeros(count, jnp.float32), jnp.ones((size, size), jnp.bfloat16)
    copy = queued(partial(jax.jit(lambda x: x + 1), x), jax.block_until_ready)
    dot = queued(partial(jax.jit(jnp.matmul), a, a), jax.block_until_ready)
    return {
        "bytes a second": 2 * x.nbytes / min(copy() for _ in range(args.runs)),
        "operations a second": 2 * size**3 / min(dot() for _ in range(args.runs)),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    most = limits(args)
    print("  ".join(f"{name}: {value:.3g}" for name, value in most.items()))
    rows_of_results = []
    for shape, orientation, rows in cases(args):
        axis = ORIENTATIONS[orientation]
        x = jnp.ones((rows, (shape.outputs, shape.inputs)[axis]), jnp.bfloat16)
        dense = weights_of(shape, "dense")
        nbytes = {"dense": stored(dense)}
        candidates = {"dense": cold(lambda x, w: x @ (w.T if axis else w), x, copied(dense))}  # noqa: B023
        for format in args.formats:
            weights = copied(weights_of(shape, format))
            names = ["xla"]
            if args.interpret or chosen(x, weights[0], axis) == "gpu":
                names.append("gpu")
            for name in names:
                run = kernel(args) if name == "gpu" else xla.compute
                candidates[f"{format}: {name}"] = cold(partial(product, run, axis), x, weights)
                nbytes[f"{format}: {name}"] = stored(weights[0])
        if orientation == "last" and importlib.util.find_spec("bitsandbytes") is not None:
            candidates["bitsandbytes NF4"], nbytes["bitsandbytes NF4"] = bitsandbytes(shape, rows)
        found = interleaved(candidates, args.runs, "dense")
        print(f"\n{shape.name}, {orientation} axis summed, {rows} rows")
        for name, times in found.items():
            least = max(
                nbytes[name] / most["bytes a second"],
                2 * rows * shape.elements / most["operations a second"],
            )
            times |= {
                "bytes a second": nbytes[name] / times["median"],
                "operations a second": 2 * rows * shape.elements / times["median"],
                "share": least / times["median"],
            }
            print(
                f"  {name:32} {times['median'] * 1e6:9.1f} µs  {1 / times['ratio']:6.2f} of dense  "
                f"{times['bytes a second'] / 1e9:7.0f} GB/s  {times['share']:.2f} of the limit",
                flush=True,
            )
        for format in args.formats:
            ours, usual = found.get(f"{format}: gpu"), found[f"{format}: xla"]
            if ours is not None and ours["median"] > usual["median"]:
                print(f"  {format}: chosen, but slower than what XLA makes")
        rows_of_results.append(
            dict(shape=shape.name, orientation=orientation, rows=rows, times=found)
        )
    return {"device": jax.devices()[0].device_kind, "limits": most, "rows": rows_of_results}


def chosen(x: Any, w: Any, axis: int) -> str:
    """What a program for a GPU runs, if it prefers the kernel."""
    return choose(as_product(axis, x, w), Target("cuda"), "gpu")


def kernel(args: argparse.Namespace, blocks: Blocks | None = None) -> Any:
    return partial(gpu.compute, blocks=blocks, interpret=args.interpret)


def cases(args: argparse.Namespace) -> Iterator[tuple[Linear, str, int]]:
    shapes = [shape for shape in (*LINEAR, TINY) if shape.name in args.only]
    yield from itertools.product(shapes, args.orientations, args.rows)


def bitsandbytes(shape: Linear, rows: int) -> tuple[Callable[[], float], int]:
    """Measures its product, as `cold` does, and says how many bytes it stores."""
    import bitsandbytes as bnb  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    new = dict(dtype=torch.bfloat16, device=device)
    w, x = torch.randn(shape.outputs, shape.inputs, **new), torch.ones(rows, shape.inputs, **new)
    quantize = partial(bnb.functional.quantize_4bit, blocksize=64, quant_type="nf4")
    packed, state = quantize(w)
    nbytes = packed.nbytes + state.absmax.nbytes
    weights = [quantize(w) for _ in range(copies(nbytes))]

    def all_products() -> list[Any]:
        return [bnb.matmul_4bit(x, packed.t(), quant_state=state) for packed, state in weights]

    with torch.inference_mode():
        want = x.float() @ bnb.functional.dequantize_4bit(packed, state).float().t()
        error = (all_products()[0].float() - want).abs().max() / want.abs().max()
    if not error < 0.02:
        raise AssertionError(f"bitsandbytes is used wrongly here: {error}")
    call, wait = torch.inference_mode()(all_products), lambda out: None
    if device == "cuda":
        # As XLA's programs: given to the device as a whole.
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.inference_mode(), torch.cuda.graph(graph):
            all_products()
        call, wait = graph.replay, lambda out: torch.cuda.synchronize()
    measure = queued(call, wait)
    return lambda: measure() / len(weights), nbytes


# ------------------------------------------------------------------------------------- tuning


def tune(args: argparse.Namespace) -> dict[Case, Blocks]:
    """The best block sizes found for each case, with the largest shape given; prints the entries."""
    best: dict[Case, Blocks] = {}
    device = jax.devices()[0].device_kind
    shape = max((shape for shape, _, _ in cases(args)), key=lambda shape: shape.elements)
    for orientation, rows, format in itertools.product(args.orientations, args.rows, args.formats):
        axis = ORIENTATIONS[orientation]
        x = jnp.ones((rows, (shape.outputs, shape.inputs)[axis]), jnp.bfloat16)
        w = weights_of(shape, format)
        case = gpu.case_of(rows, w, axis, jnp.dtype(jnp.bfloat16))
        if case not in best and (args.interpret or chosen(x, w, axis) == "gpu"):
            seconds = functools.cache(partial(seconds_with, args, axis, x, copied(w)))
            start = blocks_for(case, device)
            best[case] = descend(seconds, start)
            times = [f"{seconds(blocks) * 1e6:.1f} µs" for blocks in (start, best[case])]
            print(f"{case}: {times[0]}, {times[1]} with {best[case]}", flush=True)
    print(f'    "{device}": {{')
    for case, blocks in best.items():
        print(f"        {case}: {blocks},")
    print("    },")
    return best


def seconds_with(
    args: argparse.Namespace, axis: int, x: Any, weights: Sequence[Any], blocks: Blocks
) -> float:
    try:
        measured = cold(partial(product, kernel(args, blocks), axis), x, weights)
        return min(measured() for _ in range(3))
    except Exception as error:  # too much shared memory, say
        print(f"{blocks}: {str(error)[:80]}")
        return math.inf


def descend(seconds: Callable[[Blocks], float], blocks: Blocks) -> Blocks:
    """From these on, one size is changed at a time, for as long as that helps."""
    while (better := min([blocks, *neighbours(blocks)], key=seconds)) != blocks:
        blocks = better
    return blocks


def neighbours(blocks: Blocks) -> Iterator[Blocks]:
    """Those that differ in one size, by one step."""
    for field, least, most in (("outputs", 16, 256), ("inputs", 16, 256), ("warps", 1, 8)):
        value = getattr(blocks, field)
        for other in (value // 2, 2 * value):
            if least <= other <= most:
                yield blocks._replace(**{field: other})
    for stages in (blocks.stages - 1, blocks.stages + 1):
        if 1 <= stages <= 5:
            yield blocks._replace(stages=stages)


def main(argv: Sequence[str] | None = None) -> None:
    # bitsandbytes wants memory, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
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
    args = parser.parse_args(argv)
    if args.interpret:
        args.only = [TINY.name]

    print(machine())
    if not args.interpret and jax.default_backend() != "gpu":
        sys.exit("no GPU is here; --interpret runs anywhere")
    if check(args) > 1:
        sys.exit("the kernel is wrong here: nothing is measured")
    if args.check:
        return
    if args.tune:
        tune(args)
        return
    results = measure(args)
    if not args.interpret:
        save("gpu", results)


if __name__ == "__main__":
    main()
