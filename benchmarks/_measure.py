"""Interleaved measurements: the candidates take turns, so that a busy moment hits all alike."""

import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

import eqquant as eqq


RESULTS = pathlib.Path(__file__).parent / "results"


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


def interleaved(
    candidates: dict[str, Callable[[], float]], runs: int, baseline: str
) -> dict[str, dict[str, float]]:
    """Each candidate measures itself once in each of `runs` rounds.

    Returns for each: the median in seconds, and the median, lower and upper quartile of its
    ratio to the baseline of the same round (below 1: faster than the baseline).
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(runs):
        for name, measure in candidates.items():
            samples[name].append(measure())
    out = {}
    for name, times in samples.items():
        ratios = [a / b for a, b in zip(times, samples[baseline], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        out[name] = dict(median=statistics.median(times), ratio=middle, low=low, high=high)
    return out


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
