"""How long a linear layer takes with eqquant, and with eformer and qwix, next to dense weights.

python benchmarks/bench_peers.py [--size 4096] [--rows 1 16 512] [--runs 11] [--name peers]

Needs the environment of requirements-peers.txt. The weight is (outputs, inputs), as `eqx.nn.Linear` has it. The
peers are tried in several ways: as the weight lies, and, as their documentation shows it, stored as (inputs,
outputs). All are in the file; what is printed, and shown in the documentation, is the fastest of each. Rows that
the file has from an earlier run with the same settings stay in it.

The weights of a candidate are as many copies as exceed the last cache, used in turn. `error` is that of the first
row, next to the product in float64 of the candidate's own dequantized weight and the float32 activations,
relative to its largest element. What raises is recorded as what it raised.

With glibc, temporaries of 64 MiB are fresh memory in each call, whatever MALLOC_MMAP_THRESHOLD_ says. To see what
is left of the differences where they are kept, set

    MALLOC_MMAP_MAX_=0 MALLOC_ARENA_MAX=1 MALLOC_TOP_PAD_=67108864 MALLOC_TRIM_THRESHOLD_=4000000000
"""

import argparse
import importlib.metadata
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import eformer.ops.quantization as eformer
import jax
import jax.numpy as jnp
import numpy as np
import qwix
from _measure import interleaved, machine, save, timed, with_earlier
from bench_matmul import BASELINE, formats, ORIENTATIONS
from eformer.jaximus import implicit
from show import fastest

import eqquant as eqq


CACHE = 1 << 26  # bytes; twice the last cache of the machine that results/ is from
BUDGET = 3.0  # seconds of measuring, after which a candidate sits out
DTYPES = (jnp.float32, jnp.bfloat16)
ROW_BY_ROW, AT = ORIENTATIONS["w @ x"], ORIENTATIONS["x @ w"]


class Way(NamedTuple):
    """One way to have a product: from a dense weight (outputs, inputs) and a dtype to what is stored; from that
    to its values, (outputs, inputs); and from that and activations (rows, inputs) to (rows, outputs)."""

    library: str
    format: str
    name: str
    make: Callable[[Any, Any], Any]
    values: Callable[[Any], Any]
    product: Callable[[Any, Any], Any]


def turned(x: Any) -> Any:
    """(inputs, outputs) from (outputs, inputs), or the other way round, and stored like that."""
    return jnp.array(x.T)


def dense_ways() -> Iterator[Way]:
    yield Way("dense", "", "w @ x", lambda w, dtype: w.astype(dtype), lambda w: w, ROW_BY_ROW)


def eqquant_ways() -> Iterator[Way]:
    for name, of in formats(-1).items():
        if "blocks" in name:
            continue  # no peer has them

        def make(w: Any, dtype: Any, of: Any = of) -> Any:
            return eqq.implicit(lambda w: w.astype(dtype))(of(w))

        yield Way("eqquant", name, "w @ x", make, eqq.materialize, eqq.implicit(ROW_BY_ROW))


def eformer_ways() -> Iterator[Way]:
    formats: dict[str, Callable[..., Any]] = {
        "Array8B": lambda w, dtype, axis: eformer.Array8B.quantize(w, dtype=dtype, axis=axis),
        "ArrayNF4": lambda w, dtype, **_: eformer.ArrayNF4.quantize(w.astype(dtype)),
        # It takes -1, 0, 1 alone: those of eqquant's ternary weights.
        "Array1B": lambda w, dtype, **_: eformer.Array1B.quantize(ternary(w), dtype=dtype),
    }
    for name, of in formats.items():
        way = partial(Way, "eformer", name)
        last, first = partial(of, axis=-1), partial(of, axis=0)
        yield way("w @ x", last, lambda q: q.materialize(), implicit(ROW_BY_ROW))
        yield way(
            "x @ w, stored (inputs, outputs)",
            lambda w, dtype, first=first: first(turned(w), dtype=dtype),
            lambda q: q.materialize().T,
            implicit(AT),
        )
    # Of RSR, the product is `dot`, of one vector with a weight (inputs, outputs). k = 2 is faster than 4 and than
    # 8, the default, whose maps take 2 GB; for 1 and for 16 rows.
    operators = {
        "RSROperatorBinary": lambda w: (w > 0).astype(jnp.int8),
        "RSROperatorTernary": ternary,
    }
    for name, codes in operators.items():

        def make(w: Any, _: Any, name: Any = name, codes: Any = codes) -> Any:
            return getattr(eformer, name).from_matrix(turned(codes(w)), k=2)

        way, stored = partial(Way, "eformer", name), "k=2, stored (inputs, outputs)"
        turned_back = lambda q: q.materialize().T  # noqa: E731
        yield way(f"dot, {stored}", make, turned_back, lambda w, x: jax.vmap(w.dot)(x))
        yield way(f"x @ w, {stored}", make, turned_back, implicit(AT))


def qwix_ways() -> Iterator[Way]:
    @partial(jax.jit, static_argnums=(1, 2))
    def int8(w: Any, dtype: Any, outputs: int = 0) -> Any:
        return qwix.quantize(w, jnp.int8, channelwise_axes=[outputs], scale_dtype=dtype)

    @partial(jax.jit, static_argnums=(1, 2))
    def nf4(w: Any, dtype: Any, outputs: int = 0) -> Any:
        blocks = {1 - outputs: 64}
        return qwix.quantize(
            w, "nf4", channelwise_axes=[outputs], tiled_axes=blocks, scale_dtype=dtype
        )

    def int8_stored(w: Any, dtype: Any) -> Any:
        return int8(turned(w), dtype, 1)

    def nf4_stored(w: Any, dtype: Any) -> Any:
        return nf4(turned(w), dtype, 1)

    def as_it_is(x: Any) -> Any:
        return x

    def rounded(x: Any) -> Any:
        return qwix.quantize(x, jnp.int8, channelwise_axes=[0])

    last = (((1,), (1,)), ((), ()))
    for name, of, stored, of_x in (
        ("int8", int8, int8_stored, as_it_is),
        ("int8, int8 activations", int8, int8_stored, rounded),
        ("nf4", nf4, nf4_stored, as_it_is),
    ):

        def rows_first(w: Any, x: Any, of_x: Any = of_x) -> Any:
            return qwix.dot_general(of_x(x), w, last)

        def weight_first(w: Any, x: Any, of_x: Any = of_x) -> Any:
            return qwix.dot_general(w, of_x(x), last).T

        def dot(w: Any, x: Any, of_x: Any = of_x) -> Any:
            return qwix.dot(of_x(x), w)

        way, turned_back = partial(Way, "qwix", name), lambda q: qwix.dequantize(q).T
        yield way("dot_general(x, w)", of, qwix.dequantize, rows_first)
        yield way("dot_general(w, x).T", of, qwix.dequantize, weight_first)
        yield way("dot(x, w), stored (inputs, outputs)", stored, turned_back, dot)


def ternary(w: Any) -> Any:
    """The numbers -1, 0, 1 of eqquant's ternary weight."""
    return jnp.sign(eqq.Array1B.quantize(w).materialize()).astype(jnp.int8)


class Weight(NamedTuple):
    """The copies of a weight, their bytes, and what they mean for the first row, in float64."""

    copies: list[Any]
    nbytes: int
    exact: Any


def weight(way: Way, dense: Any, dtype: Any, x: Any) -> Weight:
    made = way.make(dense, dtype)
    exact = np.asarray(way.values(made), np.float64) @ np.asarray(x[0], np.float64)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
    copies = [made]
    while len(copies) * size < CACHE:
        copies.append(jax.tree.map(jnp.copy, made))
    return Weight(copies, size, exact)


def prepared(way: Way, w: Weight, x: Any) -> tuple[Callable[[], float], dict[str, Any]]:
    """What measures a call, and what is known without measuring."""
    compiled: Any = jax.jit(way.product).lower(w.copies[0], x).compile()
    y = np.asarray(compiled(w.copies[0], x)[0], np.float64)
    known = {
        "error": float(np.abs(y - w.exact).max() / np.abs(w.exact).max()),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "weight_bytes": w.nbytes,
    }
    return timed([partial(compiled, copy, x) for copy in w.copies]), known


def label(way: Way, dtype: Any) -> str:
    dtype = jnp.dtype(dtype).name
    return f"dense {dtype}" if way.library == "dense" else " | ".join((*way[:3], dtype))


def attempt(what: Callable[[], Any]) -> Any:
    """What it returns, or as text what it raised."""
    try:
        return what()
    except Exception as error:  # of whatever kind: it is a result
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def measured(ways: dict[str, tuple[Way, Any, Any]], x: Any, runs: int) -> dict[str, dict[str, Any]]:
    """By label: the ways with their dtype and weight, multiplied with the same activations."""
    table: dict[str, dict[str, Any]] = {}
    candidates: dict[str, Callable[[], float]] = {}
    for name, (way, dtype, w) in ways.items():
        table[name] = {**dict(zip(("library", "format", "way"), way[:3], strict=True))}
        table[name]["dtype"] = jnp.dtype(dtype).name
        ready = w if isinstance(w, str) else attempt(partial(prepared, way, w, x.astype(dtype)))
        if isinstance(ready, str):
            table[name]["raised"] = ready
        else:
            candidates[name], known = ready
            table[name] |= known
    for name, found in interleaved(candidates, runs, BASELINE, BUDGET).items():
        table[name] |= found
    return table


def print_table(best: dict[str, dict[str, Any]], title: str) -> None:
    head = "       ms  f32/time (quartiles)     temp MB    error  way"
    print(f"\n{title:40}{head}")
    for name, row in best.items():
        if "raised" in row:
            print(f"  {name:38}{row['raised']}")
            continue
        speed, low, high = (1 / row[key] for key in ("ratio", "high", "low"))
        print(
            f"  {name:38}{row['median'] * 1e3:9.2f}  {speed:6.2f} ({low:.2f}-{high:.2f})"
            f"{row['temp_bytes'] / 1e6:12.1f} {row['error']:10.1e}  {row['way']}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096, help="of the square weight")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 512])
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--name", default="peers", help="of the file with the results")
    args = parser.parse_args()

    versions = {name: importlib.metadata.version(name) for name in ("eformer", "qwix")}
    print(machine(), versions)
    dense = jax.random.normal(jax.random.key(0), (args.size, args.size), jnp.float32)
    x = jax.random.normal(jax.random.key(1), (max(args.rows), args.size), jnp.float32)
    made: dict[Any, Any] = {}  # by what makes them: several ways share a weight
    ways: dict[str, tuple[Way, Any, Any]] = {}
    for way in (*dense_ways(), *eqquant_ways(), *eformer_ways(), *qwix_ways()):
        # RSR knows no dtype: it rounds its activations to integers.
        for dtype in DTYPES[:1] if "k=2" in way.name else DTYPES:
            key = (way.make, dtype)
            if key not in made:
                made[key] = attempt(partial(weight, way, dense, dtype, x))
            ways[label(way, dtype)] = (way, dtype, made[key])
    results = []
    for rows in args.rows:
        table = measured(ways, x[:rows], args.runs)
        results.append({"size": args.size, "rows": rows, "candidates": table})
        for dtype in DTYPES:
            print_table(fastest(table, jnp.dtype(dtype).name), f"{rows} row(s), {dtype.__name__}")
    found = {"runs": args.runs, "versions": versions, "rows": results}
    save(args.name, with_earlier(args.name, found, ("size", "rows")))


if __name__ == "__main__":
    main()
