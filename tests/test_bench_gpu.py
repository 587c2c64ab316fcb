"""The script that checks, measures and tunes the kernel for GPUs stands ready: here it runs by interpretation."""

import importlib
import math
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from eqquant.kernels.matmul.gpu.blocks import Blocks, Case


SMALL = ["--interpret", "--formats", "ArrayNF4", "--rows", "2", "--runs", "2"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    bench = importlib.import_module("bench_gpu")
    # One copy, one call: what they take means nothing here.
    monkeypatch.setattr(bench, "COLD", 1)
    monkeypatch.setattr(bench, "QUEUED", 0.0)
    monkeypatch.setattr(bench, "DTYPES", {"bfloat16": jnp.bfloat16})
    yield bench
    for name in ("bench_gpu", "shapes", "_measure"):
        sys.modules.pop(name, None)


def test_it_checks_and_measures(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "save", lambda *args: pytest.fail("these are no results"))
    bench.main(SMALL)
    printed = capsys.readouterr().out
    assert "WRONG" not in printed
    for line in ("checked against float64", "tiny, last axis summed, 2 rows", "ArrayNF4: gpu"):
        assert line in printed


def test_nothing_is_measured_where_the_kernel_is_wrong(bench, monkeypatch, capsys):
    right = bench.gpu.compute
    wrong = lambda *args, **options: 1.5 * right(*args, **options)  # noqa: E731
    monkeypatch.setattr(bench.gpu, "compute", wrong)
    with pytest.raises(SystemExit, match="the kernel is wrong here"):
        bench.main([*SMALL, "--orientations", "last"])
    assert "WRONG: ArrayNF4" in capsys.readouterr().out


def test_it_tunes(bench, monkeypatch, capsys):
    def few(blocks: Blocks):
        yield blocks._replace(outputs=blocks.outputs // 2)

    monkeypatch.setattr(bench, "neighbours", few)
    bench.main([*SMALL, "--tune"])
    entries = capsys.readouterr().out.split("µs with ")[-1].split("\n", 1)[1]
    ((device, by_case),) = eval("{" + entries + "}", {"Case": Case, "Blocks": Blocks}).items()
    assert device == "cpu"
    cases = [(case.rows, case.packed, case.inputs_last) for case in by_case]
    assert cases == [(16, "inputs", True), (16, "outputs", False)]


def test_block_sizes_are_changed_for_as_long_as_that_helps(bench):
    best = Blocks(16, outputs=64, inputs=128, warps=8, stages=2)

    def seconds(blocks: Blocks) -> float:
        if blocks.inputs == 256:
            return math.inf  # does not run
        return 1 + sum(abs(math.log2(a / b)) for a, b in zip(blocks, best, strict=True))

    assert bench.descend(seconds, Blocks(16, 16, 16)) == best
    assert len(list(bench.neighbours(Blocks(16, 16, 256, warps=8, stages=5)))) == 4
