"""The kernel for GPUs through the real compilers, where the extra `gpu-check` is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sass


RECORDED = json.loads(sass.RESULTS.read_text(encoding="utf-8"))["cases"]


def test_every_case_is_recorded_and_spills_nothing() -> None:
    assert list(RECORDED) == [str(case) for case in sass.CASES]
    for counted in RECORDED.values():
        assert counted["spilled_bytes"] == 0
        # Partial sums, but not a twentieth of the dense weight.
        assert counted["temporary_bytes"] < 2 * sass.SIZE**2 / 20


@pytest.mark.skipif(bool(sass.missing()), reason=f"not installed: {', '.join(sass.missing())}")
@pytest.mark.parametrize("name", ["nf4, last axis, 1 rows", "binary, first axis, 1 rows"])
def test_instructions(name: str) -> None:
    done = subprocess.run(
        [sys.executable, sass.__file__, "--only", name],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines
    for line in lines:
        case, _, counted = line.partition("{")
        found, recorded = json.loads("{" + counted), RECORDED[case.strip()]
        assert found["spilled_bytes"] == 0
        # Compilers differ a little.
        assert found["per_weight"] <= 1.25 * recorded["per_weight"], (case, found, recorded)
