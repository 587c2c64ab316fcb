"""Dispatch: a table of rules keyed by JAX primitive and by the types of the operands.

`register` adds a rule, `resolve` finds it, and `apply` evaluates one equation: by its rule, or
by materializing the operands in daylight (a warning, an error, or a line of the audit).
"""

import contextlib
import contextvars
import inspect
import itertools
import os
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import plum
from jax import Array
from jax.core import Tracer
from jax.extend.core import Primitive

from . import _compat
from ._table import format_bytes


class ImplicitArray(eqx.Module):
    """A pytree that stands for an array: the type that rules are dispatched on.

    It has a logical `shape` and `dtype`, and `materialize()` defines its value. Everything else
    about it is an optimization. [`QuantizedArray`][eqquant.QuantizedArray] adds the behaviour of
    an array: operators, indexing, sizes.
    """

    warn_on_materialize: ClassVar[bool] = True
    """Whether an operation that has no rule for this class warns before it materializes."""
    trained: ClassVar[tuple[str, ...]] = ()
    """The fields that [`trainable`][eqquant.trainable] selects."""

    shape: eqx.AbstractVar[tuple[int, ...]]
    """The shape of the array this stands for."""
    dtype: eqx.AbstractVar[np.dtype]
    """The dtype of the array this stands for."""

    def materialize(self) -> Array:
        """The dense array of `shape` and `dtype` that this stands for."""
        raise NotImplementedError(f"{type(self).__name__}.materialize is missing")

    def settle(self) -> "ImplicitArray":
        """This array, with what it puts off while a function is evaluated carried out."""
        return self

    def lay_out(self) -> "ImplicitArray":
        """This array in the form that rules know which have no row for its class."""
        return self.settle()

    def sliceable(self, axes: Sequence[int] = (0,)) -> "ImplicitArray | None":
        """This array with every leaf as long as it is along `axes`, so that it can be cut or joined
        there as a pytree; None if it has no such form."""
        return None


class MaterializeWarning(UserWarning):
    """A quantized array was turned into a dense one because an operation has no packed form."""


class MaterializeError(RuntimeError):
    """As `MaterializeWarning`, in strict mode."""


# ------------------------------------------------------------------------------------ the table


class _Dense:
    """In signatures: any operand that is an ordinary array."""


_Rule = Callable[..., Any]
_resolvers: dict[Primitive, _compat.Resolver] = {}
_resolved: dict[tuple[Any, ...], _Rule | None] = {}
_table_version = 0


def register(*primitives: Primitive | str) -> Callable[[_Rule], _Rule]:
    """Adds a rule: how JAX primitives act on quantized operands.

    The decorated function is called as `rule(primitive, *operands, **params)`, where `params` are
    the parameters of the primitive. The annotations of the operands are the row of the table: a
    subclass of [`ImplicitArray`][eqquant.ImplicitArray] matches its instances, `jax.Array`
    matches every ordinary array, and the most specific rule wins. It returns an array, an
    implicit array, or a list of them for primitives with several results; or `NotImplemented`, to
    say that these operands have no packed form.

    **Arguments:**

    - `primitives`: JAX primitives, or their names as a printed jaxpr shows them. Names that this
      version of JAX does not have are skipped.

    !!! example

        ```python
        import jax.numpy as jnp
        from jax import lax
        import eqquant as eqq

        @eqq.register(lax.sign_p)
        def sign_array8b(primitive, x: eqq.Array8B, **params):
            return (jnp.sign(x.weight) * jnp.sign(x.scale)).astype(x.dtype)
        ```

    **Raises:** `TypeError` if an operand lacks an annotation, or if no primitive is given.
    """
    if not primitives:
        raise TypeError("register() needs at least one JAX primitive, e.g. register(lax.sin_p).")

    def add(rule: _Rule) -> _Rule:
        signature = _signature(rule)
        for primitive in primitives:
            found = _compat.find_primitive(primitive) if isinstance(primitive, str) else primitive
            if found is not None:
                resolver = _resolvers.setdefault(found, _compat.Resolver(found.name))
                resolver.register(plum.Method(rule, signature, function_name=found.name))
        global _table_version
        _table_version += 1
        _resolved.clear()
        return rule

    return add


def _signature(rule: _Rule) -> plum.Signature:
    hints = typing.get_type_hints(rule)
    _, *operands = inspect.signature(rule).parameters.values()
    types_, varargs = [], {}
    for operand in operands:
        if operand.kind in (operand.KEYWORD_ONLY, operand.VAR_KEYWORD):
            continue
        if operand.name not in hints:
            raise TypeError(
                f"The rule {rule.__name__} must annotate its operand {operand.name!r}: with a "
                "subclass of eqquant.ImplicitArray, with jax.Array, or with a union of them."
            )
        if operand.kind == operand.VAR_POSITIONAL:
            varargs = {"varargs": _as_dispatched(hints[operand.name])}
        else:
            types_.append(_as_dispatched(hints[operand.name]))
    return plum.Signature(*types_, **varargs)


def _as_dispatched(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = tuple(_as_dispatched(member) for member in typing.get_args(hint))
        return typing.Union[members]  # noqa: UP007
    if isinstance(hint, type) and issubclass(hint, ImplicitArray):
        return hint
    return _Dense


def resolve(primitive: Primitive, *operand_types: type) -> _Rule | None:
    """The rule for `primitive` on operands of these types, or None.

    Any type that is not an implicit array counts as an ordinary array.

    **Raises:** `plum.AmbiguousLookupError` if two rules fit equally well.
    """
    key = (primitive, *operand_types)
    if key not in _resolved:
        row = [t if issubclass(t, ImplicitArray) else _Dense for t in operand_types]
        try:
            _resolved[key] = _resolvers[primitive].resolve(plum.Signature(*row)).implementation
        except (KeyError, plum.NotFoundLookupError):
            _resolved[key] = None
    return _resolved[key]


def rules() -> dict[str, list[tuple[str, _Rule]]]:
    """Every rule, by the name of its primitive: the signature and the function."""
    return {
        primitive.name: [(_row(m.signature), m.implementation) for m in resolver.methods]
        for primitive, resolver in _resolvers.items()
    }


def _row(signature: plum.Signature) -> str:
    def name(hint: Any) -> str:
        members = typing.get_args(hint)
        return (
            " | ".join(map(name, members)) if members else hint.__name__.replace("_Dense", "Array")
        )

    operands = [name(hint) for hint in signature.types]
    return ", ".join(
        [*operands, f"*{name(signature.varargs)}"] if signature.has_varargs else operands
    )


# -------------------------------------------------------------- what happens when there is no rule

Mode = Literal["warn", "ignore", "error"]
_MODES = typing.get_args(Mode)
_mode: contextvars.ContextVar[Mode | None] = contextvars.ContextVar("mode", default=None)
_records: contextvars.ContextVar[list["AuditRow"] | None] = contextvars.ContextVar(
    "records", default=None
)
_recording_numbers = itertools.count(1)
_recording_number: contextvars.ContextVar[int] = contextvars.ContextVar("number", default=0)
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)
_kernels: contextvars.ContextVar[list[str]] = contextvars.ContextVar("kernels")
_implementation: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "implementation", default=None
)
_activations: contextvars.ContextVar[Any] = contextvars.ContextVar("activations", default=None)
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
    mode = _mode.get() or os.environ.get("EQQUANT_ON_MATERIALIZE", "warn")
    if mode not in _MODES:
        raise ValueError(
            f"EQQUANT_ON_MATERIALIZE must be one of {', '.join(_MODES)}; it is {mode!r}."
        )
    return typing.cast(Mode, mode)


@contextlib.contextmanager
def on_materialize(mode: Mode) -> Iterator[None]:
    """Says what happens when an operation has no packed form and materializes its operands.

    It acts while functions are *traced*: enclose the first call of a jitted function. The default
    is taken from the environment variable `EQQUANT_ON_MATERIALIZE`, else `"warn"`. A whole format
    is silenced by its class attribute `warn_on_materialize = False`.

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
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}; on_materialize({mode!r}).")
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def strict() -> contextlib.AbstractContextManager[None]:
    """Inside this context, an operation that would materialize a quantized array raises
    [`MaterializeError`][eqquant.MaterializeError] instead: `on_materialize("error")`.

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


def note_kernel(choose: Callable[[str], str]) -> None:
    """Tells an audit which kernel runs in the equation that is being evaluated, given the platform."""
    platform = _platform.get()
    if platform is not None and (kernel := choose(platform)) not in (noted := _kernels.get([])):
        noted.append(kernel)


@contextlib.contextmanager
def preferring(implementation: str | None, activations: Any = None) -> Iterator[None]:
    """Products that are traced inside go by this implementation where it serves, and round their activations so;
    None changes nothing."""
    token = _implementation.set(implementation or _implementation.get())
    other = _activations.set(_activations.get() if activations is None else activations)
    try:
        yield
    finally:
        _implementation.reset(token)
        _activations.reset(other)


def preferred_implementation() -> str | None:
    """What the innermost `preferring` says."""
    return _implementation.get()


def preferred_activations() -> Any:
    """Likewise."""
    return _activations.get()


def tracing_state() -> tuple[Any, ...]:
    """What tracing depends on besides its arguments: a key for caches of traced functions."""
    preferences = _implementation.get(), _activations.get()
    return materialize_mode(), _recording_number.get(), _table_version, preferences


def dense_nbytes(x: Any) -> int:
    """Bytes of the dense array that `x` stands for."""
    return int(np.prod(x.shape, dtype=np.int64)) * jnp.dtype(x.dtype).itemsize


def short(x: Any) -> str:
    """`Array8B f32[8,16]`, or `dense f32[8,16]`."""
    kind = type(x).__name__ if isinstance(x, ImplicitArray) else "dense"
    dtype = (
        x.dtype if hasattr(x, "dtype") else np.result_type(x)
    )  # a literal may be a Python number
    name = jnp.dtype(dtype).name if not hasattr(dtype, "_rules") else str(dtype)
    return f"{kind} {name}[{','.join(map(str, np.shape(x)))}]"


def report_materialized(primitive: str, operands: Sequence[Any], label: str | None = None) -> None:
    """Makes it visible that the implicit arrays among `operands` become dense in `primitive`.

    The warning speaks of `label` instead, if given: a line of code warns once for each label.
    """
    implicit = [x for x in operands if isinstance(x, ImplicitArray)]
    nbytes = sum(dense_nbytes(x) for x in implicit)
    if (records := _records.get()) is not None:
        line = str(_compat.source_frame())
        records.append(AuditRow(primitive, tuple(map(short, operands)), "densified", nbytes, line))
        return
    mode = materialize_mode()
    if mode == "ignore" or nbytes == 0:
        return
    frame = _compat.source_frame()
    message = (
        f"{label or f'`{primitive}`'} has no packed form for "
        f"{', '.join(short(x) for x in implicit)}: {format_bytes(nbytes)} made dense at {frame}."
    )
    if mode == "error":
        raise MaterializeError(
            f"{message} Allow it with eqquant.on_materialize('warn'), materialize it yourself, or "
            "add a rule with eqquant.register."
        )
    if any(type(x).warn_on_materialize for x in implicit):
        warnings.warn_explicit(
            f"{message} eqquant.audit shows every such place; eqquant.on_materialize('ignore') "
            "silences this.",
            MaterializeWarning,
            frame.file or "<unknown>",
            frame.line,
            registry=_seen_lines,
        )


# ------------------------------------------------------------------------------- one equation


def apply(primitive: Primitive, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Evaluates one equation that has an implicit array among its operands.

    Returns the list of its results, arrays or implicit arrays.
    """
    rule = resolve(primitive, *map(type, operands))
    if rule is not None:
        with jax.ensure_compile_time_eval():  # the value of a literal is known under tracing too
            arrays = [
                x if isinstance(x, (ImplicitArray, Array)) else jnp.asarray(x) for x in operands
            ]
        kernels: list[str] = []
        token = _kernels.set(kernels)
        try:
            out = rule(primitive, *arrays, **params)
        finally:
            _kernels.reset(token)
        if out is not NotImplemented:
            if (records := _records.get()) is not None and not getattr(rule, "transparent", False):
                records.append(_record(primitive, operands, rule, ", ".join(kernels)))
            return list(out) if primitive.multiple_results else [out]
    laid_out = [lay_out(x) for x in operands]
    if any(new is not old for new, old in zip(laid_out, operands, strict=True)):
        return apply(primitive, laid_out, params)
    return densify(primitive, operands, params)


def densify(primitive: Primitive, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Evaluates an equation on its materialized operands, in daylight."""
    report_materialized(primitive.name, operands)
    return _compat.bind(primitive, [as_dense(x) for x in operands], params)


def settle(x: Any) -> Any:
    """`x`, with what it puts off (a transposition, say) carried out."""
    return x.settle() if isinstance(x, ImplicitArray) else x


def lay_out(x: Any) -> Any:
    """`x` in the form that rules know which have no row for its class."""
    return x.lay_out() if isinstance(x, ImplicitArray) else x


def as_dense(x: Any) -> Any:
    """`x`, materialized if it is an implicit array."""
    return x.materialize() if isinstance(x, ImplicitArray) else x


def _record(primitive: Primitive, operands: Sequence[Any], rule: _Rule, kernel: str) -> AuditRow:
    code = inspect.unwrap(rule).__code__
    where = f"{rule.__name__} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
    line = str(_compat.source_frame())
    return AuditRow(primitive.name, tuple(map(short, operands)), where, 0, line, kernel)


def transparent(rule: _Rule) -> _Rule:
    """Marks the rule of a call-like primitive: the audit shows the equations inside it instead."""
    rule.transparent = True  # pyright: ignore[reportFunctionMemberAccess]
    return rule


def safe_materialize(arr: Any) -> tuple[Any, bool]:
    """`arr` as a dense array, and whether it had to be materialized.

    !!! example

        ```python
        import jax.numpy as jnp
        import eqquant as eqq

        q = eqq.Array8B.quantize(jnp.ones((4, 8)))
        dense, materialized = eqq.safe_materialize(q)
        assert materialized and dense.shape == (4, 8)
        ```
    """
    return (arr.materialize(), True) if isinstance(arr, ImplicitArray) else (arr, False)


def safe_delete(arr: Any, materialized: bool) -> None:
    """Frees the buffer of `arr` if it is the temporary that
    [`safe_materialize`][eqquant.safe_materialize] made (`materialized`), and only then. Does
    nothing under tracing.

    !!! example

        ```python
        import jax.numpy as jnp
        import eqquant as eqq

        dense, materialized = eqq.safe_materialize(eqq.Array8B.quantize(jnp.ones((4, 8))))
        total = dense.sum()
        eqq.safe_delete(dense, materialized)
        ```
    """
    if materialized and isinstance(arr, Array) and not isinstance(arr, Tracer):
        arr.delete()
