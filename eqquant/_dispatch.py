"""Dispatch: a table of rules keyed by JAX primitive and by the types of the operands.

`register` adds a rule, `resolve` finds those that match, and `apply` evaluates one equation: by the
most specific rule that does not decline, or by materializing the operands in daylight.
"""

import contextlib
import contextvars
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import plum
from jax import Array
from jax.extend.core import Primitive

from . import _compat
from ._daylight import daylight_state, noting_kernels, report_materialized, report_rule
from ._implicit_array import as_dense, ImplicitArray, in_row_major


# ------------------------------------------------------------------------------------ the table


class _Dense:
    """In signatures: any operand that is an ordinary array."""


_Rule = Callable[..., Any]
_resolvers: dict[Primitive, _compat.Resolver] = {}
_resolved: dict[tuple[Any, ...], tuple[_Rule, ...]] = {}
_table_version = 0


def register(*primitives: Primitive | str) -> Callable[[_Rule], _Rule]:
    """Adds a rule: how JAX primitives act on quantized operands.

    The decorated function is called as `rule(primitive, *operands, **params)`, where `params` are
    the parameters of the primitive. The annotations of the operands are the row of the table: a
    subclass of [`ImplicitArray`][eqquant.ImplicitArray] matches its instances, `jax.Array`
    matches every ordinary array, and the most specific rule wins. It returns an array, an
    implicit array, or a list of them for primitives with several results; or `NotImplemented`, to
    leave these operands to the next less specific rule. Where no rule is left, they become dense.

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


def resolve(primitive: Primitive, *operand_types: type) -> tuple[_Rule, ...]:
    """The rules for `primitive` on operands of these types, the most specific first.

    Any type that is not an implicit array counts as an ordinary array.

    **Raises:** `plum.AmbiguousLookupError` if two rules fit equally well, and better than all others.
    Two that do so further down end the chain in a function that raises the error, if their turn comes.
    """
    key = (primitive, *operand_types)
    if key not in _resolved:
        row = [t if issubclass(t, ImplicitArray) else _Dense for t in operand_types]
        none = all(
            each is _Dense for each in row
        )  # all are ordinary arrays: nothing to do for a rule
        _resolved[key] = () if none else _chain(primitive, plum.Signature(*row))
    return _resolved[key]


def _chain(primitive: Primitive, target: plum.Signature) -> tuple[_Rule, ...]:
    remaining, chain = _compat.Resolver(primitive.name), []
    for method in _resolvers.get(primitive, remaining).methods:
        if target <= method.signature:
            remaining.register(method)
    while remaining.methods:
        try:
            most_specific = remaining.resolve(target)
        except plum.AmbiguousLookupError:
            if not chain:
                raise
            return *chain, lambda *operands, **params: remaining.resolve(target)
        chain.append(most_specific.implementation)
        remaining.methods.remove(most_specific)
    return tuple(chain)


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


# ------------------------------------------------------------------------------- one equation


def apply(primitive: Primitive, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Evaluates one equation that has an implicit array among its operands: by the most specific rule
    that does not decline, else on operands in row-major order, else on dense ones.

    Returns the list of its results, arrays or implicit arrays.
    """
    chain = resolve(primitive, *map(type, operands))
    if chain:
        with jax.ensure_compile_time_eval():  # the value of a literal is known under tracing too
            arrays = [
                x if isinstance(x, (ImplicitArray, Array)) else jnp.asarray(x) for x in operands
            ]
        for rule in chain:
            with noting_kernels() as kernels:
                out = rule(primitive, *arrays, **params)
            if out is not NotImplemented:
                if not getattr(rule, "transparent", False):
                    report_rule(primitive.name, operands, rule, kernels)
                return list(out) if primitive.multiple_results else [out]
    row_major = [in_row_major(x) for x in operands]
    if any(new is not old for new, old in zip(row_major, operands, strict=True)):
        return apply(primitive, row_major, params)
    return densify(primitive, operands, params)


def densify(primitive: Primitive, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Evaluates an equation on its materialized operands, in daylight."""
    report_materialized(primitive.name, operands)
    return _compat.bind(primitive, [as_dense(x) for x in operands], params)


def transparent(rule: _Rule) -> _Rule:
    """Marks the rule of a call-like primitive: the audit shows the equations inside it instead."""
    rule.transparent = True  # pyright: ignore[reportFunctionMemberAccess]
    return rule


# -------------------------------------------------------------------- what else tracing depends on

_implementation: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "implementation", default=None
)
_activations: contextvars.ContextVar[Any] = contextvars.ContextVar("activations", default=None)


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
    return *daylight_state(), _table_version, _implementation.get(), _activations.get()
