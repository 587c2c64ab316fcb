"""Daylight: nothing becomes dense unseen. Warnings, errors, and the records that an audit reads."""

import contextlib
import contextvars
import inspect
import itertools
import os
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from . import _compat
from ._implicit_array import ImplicitArray
from ._table import format_bytes


class MaterializeWarning(UserWarning):
    """A quantized array was turned into a dense one because an operation has no packed form."""


class MaterializeError(RuntimeError):
    """As `MaterializeWarning`, in strict mode."""


Mode = Literal["warn", "ignore", "error"]
_MODES = typing.get_args(Mode)
_mode: contextvars.ContextVar[Mode | None] = contextvars.ContextVar("mode", default=None)
_default_mode: list[Mode | None] = [None]
"""What `set_on_materialize` said, in one place for all threads."""
_records: contextvars.ContextVar[list["AuditRow"] | None] = contextvars.ContextVar(
    "records", default=None
)
_recording_numbers = itertools.count(1)
_recording_number: contextvars.ContextVar[int] = contextvars.ContextVar("number", default=0)
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)
_kernels: contextvars.ContextVar[list[str]] = contextvars.ContextVar("kernels")
_seen_lines: dict[Any, Any] = {}


@dataclass(frozen=True)
class AuditRow:
    """One equation that met a quantized operand."""

    primitive: str
    """The JAX primitive."""
    operands: tuple[str, ...]
    """Each operand: its format or `dense`, dtype and shape."""
    rule: str
    """The rule that ran, with file and line; or `densified`."""
    dense_bytes: int
    """Bytes of quantized operands that were turned into dense arrays; 0 if none."""
    source: str
    """The line of user code."""
    kernel: str = ""
    """The implementation of the product, on the platform that was asked about; empty if it is no product."""

    @property
    def densified(self) -> bool:
        """Whether a quantized operand was turned into a dense array."""
        return self.dense_bytes > 0


def materialize_mode() -> Mode:
    """What happens now when an operation materializes a quantized array."""
    mode = _mode.get() or _default_mode[0] or os.environ.get("EQQUANT_ON_MATERIALIZE", "warn")
    if mode not in _MODES:
        raise ValueError(
            f"EQQUANT_ON_MATERIALIZE must be one of {', '.join(_MODES)}; it is {mode!r}."
        )
    return typing.cast(Mode, mode)


@contextlib.contextmanager
def on_materialize(mode: Mode) -> Iterator[None]:
    """Says what happens when an operation has no packed form and materializes its operands.

    It acts while functions are *traced*: enclose the first call of a jitted function. Threads that are started
    inside do not inherit it. The default is what [`set_on_materialize`][eqquant.set_on_materialize] said, else
    the environment variable `EQQUANT_ON_MATERIALIZE`, else `"warn"`. A whole format is silenced by its class attribute `warn_on_materialize = False`.

    **Arguments:**

    - `mode`: `"warn"`: a [`MaterializeWarning`][eqquant.MaterializeWarning], once for each line
      of user code; `"ignore"`: nothing; `"error"`: a
      [`MaterializeError`][eqquant.MaterializeError].

    !!! example

        ```python
        import jax.numpy as jnp
        import eqquant as eqq

        q = eqq.Array8B.quantize(jnp.ones((4, 8)))
        with eqq.on_materialize("ignore"):
            y = jnp.sin(q)
        ```
    """
    _check_mode("on_materialize", mode)
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def set_on_materialize(mode: Mode | None) -> None:
    """Says for the whole process, threads included, what happens when an operation has no packed form. Inside
    [`on_materialize`][eqquant.on_materialize] and [`strict`][eqquant.strict], these decide.

    It acts while functions are *traced*: call it first.

    **Arguments:**

    - `mode`: as for `on_materialize`; None goes back to the environment variable `EQQUANT_ON_MATERIALIZE`, or to `"warn"`.

    !!! example

        ```python
        import eqquant as eqq

        eqq.set_on_materialize("error")  # strict, in threads too
        eqq.set_on_materialize(None)
        ```
    """
    if mode is not None:
        _check_mode("set_on_materialize", mode)
    _default_mode[0] = mode


def _check_mode(where: str, mode: Any) -> None:
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}; {where}({mode!r}).")


def strict() -> contextlib.AbstractContextManager[None]:
    """Inside this context, an operation that would materialize a quantized array raises
    [`MaterializeError`][eqquant.MaterializeError] instead: `on_materialize("error")`.

    Threads that are started inside do not inherit it. For a whole process there is
    [`set_on_materialize("error")`][eqquant.set_on_materialize], or the environment variable `EQQUANT_ON_MATERIALIZE=error`,
    which is read each time.

    !!! example

        ```python
        import jax.numpy as jnp
        import eqquant as eqq

        q = eqq.Array8B.quantize(jnp.ones((4, 8)))
        with eqq.strict():
            y = q @ jnp.ones(8)  # has a rule: fine
        ```
    """
    return on_materialize("error")


@contextlib.contextmanager
def recording(platform: str | None = None) -> Iterator[list[AuditRow]]:
    """Collects an `AuditRow` for every equation that meets a quantized operand, and never warns. Kernels are
    those that `platform` runs."""
    records: list[AuditRow] = []
    token, number = _records.set(records), _recording_number.set(next(_recording_numbers))
    platform_token = _platform.set(platform)
    try:
        yield records
    finally:
        _records.reset(token)
        _recording_number.reset(number)
        _platform.reset(platform_token)


@contextlib.contextmanager
def noting_kernels() -> Iterator[list[str]]:
    """Collects the kernels that `note_kernel` tells of."""
    kernels: list[str] = []
    token = _kernels.set(kernels)
    try:
        yield kernels
    finally:
        _kernels.reset(token)


def note_kernel(choose: Callable[[str], str]) -> None:
    """Tells an audit which kernel runs in the equation that is being evaluated, given the platform."""
    platform = _platform.get()
    if platform is not None and (kernel := choose(platform)) not in (noted := _kernels.get([])):
        noted.append(kernel)


def daylight_state() -> tuple[Any, ...]:
    """What happens when an array becomes dense, and who is recording: tracing depends on both."""
    return materialize_mode(), _recording_number.get()


def dense_nbytes(x: Any) -> int:
    """Bytes of the dense array that `x` stands for."""
    return int(np.prod(x.shape, dtype=np.int64)) * jnp.dtype(x.dtype).itemsize


def describe(x: Any) -> str:
    """`Array8B f32[8,16]`, or `dense f32[8,16]`."""
    kind = type(x).__name__ if isinstance(x, ImplicitArray) else "dense"
    # A literal may be a Python number.
    dtype = x.dtype if hasattr(x, "dtype") else np.result_type(x)
    name = jnp.dtype(dtype).name if not hasattr(dtype, "_rules") else str(dtype)
    return f"{kind} {name}[{','.join(map(str, np.shape(x)))}]"


@dataclass(frozen=True)
class MadeDense:
    """That implicit arrays became dense in an operation: all that a report needs, without the arrays."""

    primitive: str
    operands: tuple[str, ...]
    label: str
    formats: tuple[type, ...]
    packed: tuple[str, ...]
    nbytes: int


_collected: contextvars.ContextVar[list[MadeDense] | None] = contextvars.ContextVar(
    "collected", default=None
)


@contextlib.contextmanager
def collecting() -> Iterator[list[MadeDense]]:
    """Collects what would be reported, for a program that is kept and reports it whenever it runs. An error is
    raised all the same. Functions that were traced before are traced again inside."""
    made_dense: list[MadeDense] = []
    token, number = _collected.set(made_dense), _recording_number.set(next(_recording_numbers))
    try:
        yield made_dense
    finally:
        _collected.reset(token)
        _recording_number.reset(number)


def is_recording() -> bool:
    """Whether an audit is being made."""
    return _records.get() is not None


def report_materialized(primitive: str, operands: Sequence[Any], label: str | None = None) -> None:
    """Makes it visible that the implicit arrays among `operands` become dense in `primitive`.

    The warning speaks of `label` instead, if given: a line of code warns once for each label.
    """
    implicit = [x for x in operands if isinstance(x, ImplicitArray)]
    made_dense = MadeDense(
        primitive,
        tuple(map(describe, operands)),
        label or f"`{primitive}`",
        tuple(map(type, implicit)),
        tuple(map(describe, implicit)),
        sum(dense_nbytes(x) for x in implicit),
    )
    collected = _collected.get()
    if collected is None or is_recording() or materialize_mode() == "error":
        report(made_dense)
    else:
        collected.append(made_dense)


def report(made_dense: MadeDense) -> None:
    """Records it, warns or raises, as the mode says, with the line of user code that is running."""
    if (records := _records.get()) is not None:
        line = str(_compat.source_frame())
        records.append(
            AuditRow(
                made_dense.primitive, made_dense.operands, "densified", made_dense.nbytes, line
            )
        )
        return
    mode = materialize_mode()
    if mode == "ignore" or made_dense.nbytes == 0:
        return
    frame = _compat.source_frame()
    message = (
        f"{made_dense.label} has no packed form for {', '.join(made_dense.packed)}: "
        f"{format_bytes(made_dense.nbytes)} made dense at {frame}."
    )
    if mode == "error":
        raise MaterializeError(
            f"{message} Allow it with eqquant.on_materialize('warn'), materialize it yourself, or "
            "add a rule with eqquant.register."
        )
    if any(each.warn_on_materialize for each in made_dense.formats):
        warnings.warn_explicit(
            f"{message} eqquant.audit shows every such place; eqquant.on_materialize('ignore') "
            "silences this.",
            MaterializeWarning,
            frame.file or "<unknown>",
            frame.line,
            registry=_seen_lines,
        )


def report_rule(
    primitive: str, operands: Sequence[Any], rule: Callable[..., Any], kernels: Sequence[str]
) -> None:
    """Tells an audit which rule served `primitive`, and by which kernels."""
    if (records := _records.get()) is not None:
        code = inspect.unwrap(rule).__code__
        where = f"{rule.__name__} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
        line = str(_compat.source_frame())
        described = tuple(map(describe, operands))
        records.append(AuditRow(primitive, described, where, 0, line, ", ".join(kernels)))
