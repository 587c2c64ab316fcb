"""JAX's own uses of its primitives, each with a quantized operand: the answer is that of the materialized one.

JAX ships them for tests of its back ends: programs with their arguments, some of each primitive. A few of each are run,
always the same; with the profile `nightly` every one of them, with every operand that holds floats, in every format.
"""

import functools
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import eqquant as eqq
from eqquant.testing import QUANTIZERS


NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def harnesses_by_group() -> dict[str, list[Any]]:
    """What this JAX ships for CPU, by primitive; nothing where it ships none. It needs absl, too."""
    try:
        from jax._src.internal_test_util import test_harnesses
    except ImportError:
        return {}
    groups: dict[str, list[Any]] = {}
    for harness in test_harnesses.all_harnesses:
        if harness.filter("cpu"):  # no more than JAX has itself
            groups.setdefault(harness.group_name, []).append(harness)
    return {name: found for name, group in groups.items() if (found := with_floats(group))}


def with_floats(group: list[Any]) -> list[Any]:
    """Those that have an operand to quantize."""
    return [harness for harness in group if float_operands(arguments(harness))]


def arguments(harness: Any) -> list[Any]:
    """The same ones each time, as JAX takes them (without float64)."""
    made = harness.dyn_args_maker(np.random.RandomState(0))
    return [jnp.asarray(a) if isinstance(a, (np.ndarray, np.generic)) else a for a in made]


def float_operands(args: list[Any]) -> list[int]:
    return [
        i
        for i, arg in enumerate(args)
        if hasattr(arg, "dtype") and jnp.issubdtype(arg.dtype, jnp.floating)
    ]


GROUPS = harnesses_by_group()
if not GROUPS:
    pytest.skip("this JAX ships no harnesses, or absl is missing", allow_module_level=True)


# Why `quantize` refuses an operand: all else that it raises is a fault.
REFUSED = {"takes finite numbers": "not finite", "takes a matrix": "no matrix"}


@functools.cache
def _quantized(format: str, dtype: Any, shape: tuple[int, ...], numbers: bytes) -> Any:
    """The array and what it stands for; or why there is none. Many programs have the same operand."""
    x = jnp.asarray(np.frombuffer(numbers, dtype).reshape(shape))
    try:
        w = QUANTIZERS[format](x)
    except ValueError as error:
        for words, reason in REFUSED.items():
            if words in str(error):
                return reason
        raise
    return w, w.materialize()


def quantized(format: str, x: Any) -> Any:
    return _quantized(format, np.dtype(x.dtype), x.shape, np.asarray(x).tobytes())


def in_turn(choices: list[Any], harness: Any) -> list[Any]:
    """All of them; the first is another one from program to program."""
    start = zlib.crc32(harness.fullname.encode()) % len(choices)
    return choices[start:] + choices[:start]


def sample(group: list[Any]) -> list[Any]:
    """One of 120, at least one, spread evenly."""
    count = len(group) if NIGHTLY else -(-len(group) // 120)
    return [group[i * len(group) // count] for i in range(count)]


def cases(group: list[Any], refused: Counter) -> Iterator[tuple[Any, list[Any], int, str]]:
    """Programs with their arguments, the operand to quantize, and the format; counts what is refused."""
    for harness in sample(group):
        args = arguments(harness)
        operands = float_operands(args)
        for operand in operands if NIGHTLY else in_turn(operands, harness)[:1]:
            for format in in_turn(list(QUANTIZERS), harness):
                found = quantized(format, args[operand])
                if isinstance(found, str):
                    refused[found] += 1
                    continue
                yield harness, args, operand, format
                if not NIGHTLY:
                    break


def assert_close(got: Any, want: Any, eps: float) -> None:
    """Equal in type; in value to some roundings of the largest number, and bit for bit where there are no floats."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    g, w = np.asarray(got), np.asarray(want)
    if not jnp.issubdtype(want.dtype, jnp.inexact):
        np.testing.assert_array_equal(g, w)
        return
    wide = np.complex128 if jnp.issubdtype(want.dtype, jnp.complexfloating) else np.float64
    g, w = g.astype(wide), w.astype(wide)
    largest = np.max(np.abs(w), where=np.isfinite(w), initial=0)
    np.testing.assert_allclose(g, w, rtol=0, atol=ROUNDINGS * eps * largest)


ROUNDINGS = 8


def check(harness: Any, args: list[Any], operand: int, format: str) -> None:
    w, dense = quantized(format, args[operand])

    def run(x: Any) -> Any:
        return harness.dyn_fun(*args[:operand], x, *args[operand + 1 :])

    want = jtu.tree_map(jnp.asarray, run(dense))
    with eqq.on_materialize("ignore"):
        got = eqq.materialize(eqq.implicit(run)(w))
    assert jtu.tree_structure(got) == jtu.tree_structure(want)
    for g, v in zip(jtu.tree_leaves(got), jtu.tree_leaves(want), strict=True):
        floats = [d for d in (dense.dtype, v.dtype) if jnp.issubdtype(d, jnp.inexact)]
        assert_close(g, v, max(float(jnp.finfo(d).eps) for d in floats))


@pytest.mark.parametrize("group", GROUPS)
def test_harnesses_of(group: str) -> None:
    refused, checked, failures = Counter(), 0, []
    for harness, args, operand, format in cases(GROUPS[group], refused):
        checked += 1
        try:
            check(harness, args, operand, format)
        except Exception as error:
            failures.append(f"{harness.fullname}, operand {operand}, {format}: {error!r}")
        if checked % 200 == 0:
            jax.clear_caches()
    if NIGHTLY:  # thousands of compiled programs would fill the memory
        jax.clear_caches()
    print(f"{group}: {checked} checked, refused: {dict(refused)}")
    assert not failures, f"{len(failures)} of {checked} differ:\n" + "\n".join(failures)
    assert checked > refused.total() // 4, f"{checked} checked, refused: {dict(refused)}"
