"""Operators outside of any transformation: traced and compiled once for each function and kind of operands.

`jax.jit` keeps what it compiled by the tree structures, shapes and dtypes of the operands. What tracing depends on besides,
the static facts of the call and the state of the library, is the key of `_program`. What an operation makes dense is
reported in each call, though it is traced in the first one only: the reports are a part of the result.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np

from . import _compat
from ._daylight import collecting, is_recording, MadeDense, report
from ._dispatch import tracing_state
from ._implicit import implicit
from ._implicit_array import ImplicitArray


@jtu.register_static
class _Reports(tuple[MadeDense, ...]):
    """What was made dense: no array, so that it is a part of the structure of a result."""


def call(
    function: Callable[..., Any], operands: tuple[Any, ...], facts: tuple[Any, ...] = ()
) -> Any:
    """`function(*operands, *facts)` by the rules. Inside a transformation it is traced there.

    **Arguments:**

    - `function`: of a module, since what is compiled for it is kept.
    - `operands`: arrays, quantized arrays and numbers. Numbers become arrays.
    - `facts`: what has to be known when it is traced.
    """
    if not _compat.is_eager() or is_recording() or not all(map(_is_argument, operands)):
        return implicit(function)(*operands, *facts)
    try:
        program = _program(function, facts, tuple(map(type, facts)), tracing_state())
        result, reports = program(*operands)
    except TypeError:
        if _is_hashable((facts, jtu.tree_structure(operands))):
            raise
        return implicit(function)(*operands, *facts)
    for each in reports:
        report(each)
    return result


def _is_argument(x: Any) -> bool:
    return isinstance(
        x, (bool, int, float, complex, jax.Array, np.ndarray, np.generic, ImplicitArray)
    )


def _is_hashable(x: Any) -> bool:
    try:
        hash(x)
    except (TypeError, ValueError):
        return False
    return True


@functools.lru_cache(maxsize=1024)
def _program(function: Any, facts: tuple[Any, ...], types: Any, state: Any) -> Callable[..., Any]:
    """The compiled function. Facts of other types are other facts: 1 is not True."""

    def run(*operands: Any) -> Any:
        with collecting() as made_dense:
            result = implicit(function)(*operands, *facts)
        return result, _Reports(made_dense)

    run.__name__ = getattr(function, "__name__", "operator")
    return jax.jit(run)
