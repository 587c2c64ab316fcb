"""How the kernel cuts a product into blocks: sizes as data, and what to do where there are none.

No device has been tuned yet, so `TUNED` is empty. `benchmarks/bench_gpu.py --tune` measures one, and prints
the entries to put here.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple


class Case(NamedTuple):
    """What the best block sizes depend on, beside the device."""

    rows: int
    """How many rows of the input a block has to hold: a power of 2."""
    bits: int
    """Of the numbers that are multiplied: 16 or 32."""
    elements: int
    """How many elements lie in one stored number."""
    packed: Literal["inputs", "outputs", "no"]
    """The axis along which they lie: the one that is summed over, or the other."""
    inputs_last: bool
    """Whether the summed axis of the weight is the last one."""


class Blocks(NamedTuple):
    """What one program computes, and how. All are powers of 2, and those of a block at least 16."""

    rows: int
    outputs: int
    """Stored numbers along the axis of the outputs."""
    inputs: int
    """Stored numbers along the summed axis, for each step of the loop."""
    warps: int = 4
    stages: int = 3
    """How many steps of the loop are being loaded at once."""


TUNED: Mapping[str, Mapping[Case, Blocks]] = {}
"""By `device_kind`."""

MAX_ROWS = 64
# Registers: 128 threads hold the sums, in float32, at most half of what each of them has.
MAX_SUMS = 1 << 14
# So that a device of some 130 multiprocessors has several programs on each of them.
PROGRAMS = 528


def blocks_for(case: Case, device: str | None = None) -> Blocks:
    """The measured block sizes for this device, or else a guess.

    The guess is what took the fewest instructions for each weight when compiled for an H200, among those
    that were tried (tests/data/sass.json); it was not timed.
    """
    if (tuned := TUNED.get(device or "", {}).get(case)) is not None:
        return tuned
    if case.packed == "inputs":
        return Blocks(case.rows, 128 if case.bits == 16 else 64, 32)
    if case.packed == "outputs":
        outputs = max(16, min(32, MAX_SUMS // (case.elements * case.rows)))
        return Blocks(case.rows, outputs, 64 if case.bits == 16 else 32)
    return Blocks(case.rows, 64, 128 if case.inputs_last and case.bits == 16 else 64)


def splits_for(programs: int, steps: int, nbytes: int, stored: int) -> int:
    """Into how many partial sums, of `nbytes` each, the loop of `steps` is cut, where there are so many programs
    without: all of them take at most an eighth of what is stored."""
    return max(1, min(-(-PROGRAMS // programs), steps // 4, stored // (8 * nbytes)))
