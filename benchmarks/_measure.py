"""Interleaved measurements: the candidates take turns, so that a busy moment hits all alike."""

import itertools
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

import eqquant as eqq


RESULTS = pathlib.Path(__file__).parent / "results"
SHORT = 2e-3  # seconds; shorter calls are repeated until they add up to this


def machine() -> dict[str, Any]:
    """Where a number was measured."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "backend": jax.default_backend(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "eqquant": eqq.__version__,
        "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
    }


def seconds(function: Callable[[], Any]) -> float:
    """The wall time of one call, its results computed."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def timed(calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
    """Measures one of the calls, which do the same on different data and take turns."""
    turns = itertools.cycle(calls)
    seconds(next(turns))
    repeats = max(1, math.ceil(SHORT / seconds(next(turns))))
    return lambda: sum(seconds(next(turns)) for _ in range(repeats)) / repeats


def interleaved(
    candidates: dict[str, Callable[[], float]],
    runs: int,
    baseline: str,
    budget: float = math.inf,
) -> dict[str, dict[str, float]]:
    """Each candidate measures itself once in each of `runs` rounds; one that has taken more than `budget`
    seconds in all sits out the rounds after its third, unless it is the baseline.

    Returns for each: the median in seconds, and the median, lower and upper quartile of its
    ratio to the baseline of the same round (below 1: faster than the baseline).
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(runs):
        for name, measure in candidates.items():
            if name == baseline or len(samples[name]) < 3 or sum(samples[name]) < budget:
                samples[name].append(measure())
    out = {}
    for name, times in samples.items():
        ratios = [a / b for a, b in zip(times, samples[baseline], strict=False)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        out[name] = dict(median=statistics.median(times), ratio=middle, low=low, high=high)
    return out


def with_earlier(name: str, results: dict[str, Any], key: Sequence[str]) -> dict[str, Any]:
    """The results, and those rows of `results/<name>.json` that differ in a field of `key` and were measured
    on the same machine and in the same way."""
    path = RESULTS / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    alike = stored.get("machine") == machine() and all(
        stored["results"][field] == value for field, value in results.items() if field != "rows"
    )
    rows = {tuple(row[field] for field in key): row for row in results["rows"]}
    earlier = (
        {tuple(row[field] for field in key): row for row in stored["results"]["rows"]}
        if alike
        else {}
    )
    return {**results, "rows": [row for _, row in sorted({**earlier, **rows}.items())]}


def save(name: str, results: Any) -> None:
    """Writes `results/<name>.json`, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    print(
        f"wrote {path.relative_to(pathlib.Path.cwd())}"
        if path.is_relative_to(pathlib.Path.cwd())
        else f"wrote {path}"
    )
