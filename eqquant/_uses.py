"""What a call of a model does with each of its arrays: which are operands of products, and which are looked up.

A call is traced, and the equations are followed from the arrays to where they end. Nothing is computed.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from . import _compat
from ._implicit import is_implicit


def used_as_weights(call: Callable[..., Any], tree: Any, inputs: Sequence[Any]) -> list[bool]:
    """For each leaf of `tree`, whether `call(tree, *inputs)` multiplies it as a matrix, or looks up its rows.

    Quantized arrays are leaves. In place of arrays, of `tree` and of `inputs`, there may be `jax.ShapeDtypeStruct`s.
    """
    leaves, treedef = jtu.tree_flatten((tree, tuple(inputs)), is_leaf=is_implicit)
    count = len(jtu.tree_leaves(tree, is_leaf=is_implicit))
    traced = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def on_arrays(*arrays: Any) -> list[Any]:
        filled = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            filled[i] = array
        tree, inputs = jtu.tree_unflatten(treedef, filled)
        return [x for x in jtu.tree_leaves(call(tree, *inputs)) if isinstance(x, jax.Array)]

    jaxpr = jax.make_jaxpr(on_arrays)(*(_struct(leaves[i]) for i in traced))
    given = [_Seen(_only(i, count), _only(i, count), inputs=i >= count) for i in traced]
    uses = _Uses()
    for out in uses.follow(jaxpr, given):
        uses.weights |= out.rows
    return [i in uses.weights for i in range(count)]


def _only(i: int, count: int) -> frozenset[int]:
    return frozenset([i] if i < count else [])


def _is_array(x: Any) -> bool:
    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    return isinstance(x, kinds) or is_implicit(x)


def _struct(x: Any) -> Any:
    """What the traced call sees of an array."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if isinstance(x, jax.Array):
        return _compat.as_struct(jax.typeof(x))
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What is known of a number of the program. Arrays of the tree are their places among its leaves."""

    of: frozenset[int] = frozenset()
    """The arrays of the tree that it is computed from."""
    whole: frozenset[int] = frozenset()
    """The arrays of which it is all or a part: rearranged, cast, or times a factor."""
    rows: frozenset[int] = frozenset()
    """The arrays from which it was looked up, at places that the program computes."""
    repeats: bool = False
    """Whether it repeats along an axis: a factor of such a kind leaves a weight a weight."""
    inputs: bool = False
    """Whether it is computed from inputs."""

    def __or__(self, other: "_Seen") -> "_Seen":
        return _Seen(
            self.of | other.of,
            self.whole | other.whole,
            self.rows | other.rows,
            self.repeats and other.repeats,
            self.inputs or other.inputs,
        )


_NOTHING = _Seen(repeats=True)

_PRODUCTS = frozenset(("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"))
_REARRANGING = frozenset(
    "transpose reshape squeeze expand_dims slice rev copy copy_p reduce_precision neg split "
    "sharding_constraint optimization_barrier device_put pvary pcast mesh_cast reshard name real "
    "stop_gradient all_gather ppermute".split()
)


class _Uses:
    """Follows the equations of a program, and notes which arrays of the tree are used as weights."""

    def __init__(self) -> None:
        self.weights: frozenset[int] = frozenset()

    def follow(self, jaxpr: Any, args: Sequence[_Seen]) -> list[_Seen]:
        """What is known of the results of a jaxpr."""
        jaxpr, consts = _compat.open_jaxpr(jaxpr)
        known = [*(_constant(x) for x in consts), *args]
        seen: dict[Any, _Seen] = dict(zip(jaxpr.invars, known, strict=True))

        def read(atom: Any) -> _Seen:
            return _NOTHING if isinstance(atom, _compat.Literal) else seen[atom]

        for eqn in jaxpr.eqns:
            results = self.equation(eqn, [read(atom) for atom in eqn.invars])
            seen.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[_Seen]) -> list[_Seen]:
        name, params, count = eqn.primitive.name, eqn.params, len(eqn.outvars)
        if name == "scan":
            return self.scan(params, operands)
        if name == "while":
            return self.while_loop(params, operands)
        if name == "cond":
            results = [self.follow(branch, operands[1:]) for branch in params["branches"]]
            chosen = dataclasses.replace(operands[0], whole=frozenset(), rows=frozenset())
            return [
                _joined([*each, dataclasses.replace(chosen, repeats=True)])
                for each in zip(*results, strict=True)
            ]
        if (body := _body(eqn)) is not None:
            return self.follow(body, operands)
        everything = _joined(operands)
        computed = _Seen(of=everything.of, inputs=everything.inputs)
        if name in _REARRANGING and len(operands) == count:
            return operands
        if name in _REARRANGING:
            return [operands[0]] * count
        if name in _PRODUCTS:
            self.product(eqn, operands)
        elif name == "convert_element_type":
            if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
                return operands
        elif name in ("broadcast_in_dim", "tile"):
            return [_broadcast(operands[0], eqn.invars[0].aval, eqn.outvars[0].aval)]
        elif name in ("gather", "dynamic_slice"):
            return [_looked_up(name, operands, computed)]
        elif name == "pad":
            return [dataclasses.replace(operands[0], repeats=False)]
        elif name in ("mul", "div"):
            return [self.scaled(eqn, operands, computed)]
        elif name in ("concatenate", "complex") and all(x.whole or x.rows for x in operands):
            return [dataclasses.replace(everything, repeats=False)]
        else:
            self.weights |= everything.rows
        repeats = name not in _PRODUCTS and 0 < len(operands) == sum(x.repeats for x in operands)
        return [dataclasses.replace(computed, repeats=repeats)] * count

    def product(self, eqn: Any, operands: list[_Seen]) -> None:
        batch: Sequence[Sequence[int]] = ((), ())
        if eqn.primitive.name == "dot_general":
            _, batch = eqn.params["dimension_numbers"]
        for var, x, axes in zip(eqn.invars[:2], operands[:2], batch, strict=True):
            kept = [n for axis, n in enumerate(var.aval.shape) if axis not in axes]
            if is_matrix_shape(kept):
                self.weights |= x.whole
            self.weights |= x.rows

    def scaled(self, eqn: Any, operands: list[_Seen], computed: _Seen) -> _Seen:
        """A product or quotient by elements: a weight with a factor is a weight. Rows that are multiplied into what
        the model computes from other arrays are factors, such as the cosines of rotary positions."""
        operands = [
            _broadcast(x, atom.aval, eqn.outvars[0].aval)
            for x, atom in zip(operands, eqn.invars, strict=True)
        ]
        whole: frozenset[int] = frozenset()
        rows: frozenset[int] = frozenset()
        for i, x in enumerate(operands):
            other = operands[1 - i]
            if other.repeats and (i == 0 or eqn.primitive.name == "mul"):
                whole |= x.whole
            for row in x.rows:
                if other.of == {row} and not other.repeats:
                    self.weights |= {row}  # by a function of the rows alone, as in a norm
                elif other.repeats or not other.of:
                    rows |= {row}
        repeats = all(x.repeats for x in operands)
        return dataclasses.replace(computed, whole=whole, rows=rows, repeats=repeats)

    def scan(self, params: dict[str, Any], operands: list[_Seen]) -> list[_Seen]:
        num_consts, num_carry = _compat.scan_counts(params)
        consts, xs = operands[:num_consts], operands[num_consts + num_carry :]

        def step(carry: list[_Seen]) -> list[_Seen]:
            return self.follow(params["jaxpr"], [*consts, *carry, *xs])

        carry = _settled(operands[num_consts : num_consts + num_carry], step)
        return [*carry, *step(carry)[num_carry:]]

    def while_loop(self, params: dict[str, Any], operands: list[_Seen]) -> list[_Seen]:
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        consts = operands[n_cond : n_cond + n_body]
        carry = _settled(
            operands[n_cond + n_body :],
            lambda carry: self.follow(params["body_jaxpr"], [*consts, *carry]),
        )
        self.follow(params["cond_jaxpr"], [*operands[:n_cond], *carry])
        return carry


def _settled(carry: list[_Seen], step: Callable[[list[_Seen]], list[_Seen]]) -> list[_Seen]:
    """What is known of a carry in all steps of a loop."""
    while True:
        after = [old | new for old, new in zip(carry, step(carry), strict=False)]
        if after == carry:
            return carry
        carry = after


def _joined(seen: Sequence[_Seen]) -> _Seen:
    return functools.reduce(operator.or_, seen, _NOTHING)


def _constant(x: Any) -> _Seen:
    return _Seen(repeats=np.size(x) == 1)


def _body(eqn: Any) -> Any:
    """The jaxpr of the results of a call-like equation; None if it is none."""
    for value in eqn.params.values():
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns"):
            counts = len(jaxpr.invars), len(jaxpr.outvars)
            if counts == (len(eqn.invars), len(eqn.outvars)):
                return value
    return None


def is_matrix_shape(shape: Sequence[int]) -> bool:
    """Whether it has two axes or more, not counting axes of length 1."""
    return sum(n != 1 for n in shape) >= 2


def _broadcast(x: _Seen, before: Any, after: Any) -> _Seen:
    """What is known of `x`, repeated up to the shape `after`."""
    if after.size == before.size:
        return x
    # A vector that is repeated, such as a token or a scale, does not become a matrix by it.
    whole = x.whole if is_matrix_shape(before.shape) else frozenset()
    return dataclasses.replace(x, whole=whole, repeats=True)


def _looked_up(name: str, operands: list[_Seen], computed: _Seen) -> _Seen:
    x, places = operands[0], _joined(operands[1:])
    if name == "gather":
        return dataclasses.replace(computed, rows=x.rows | x.whole)
    # A slice is a look-up where data say its place: not in a loop over layers.
    found = x.whole if places.inputs or places.of else frozenset()
    return dataclasses.replace(computed, whole=x.whole, rows=x.rows | found)
