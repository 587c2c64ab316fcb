"""Structural primitives: they only rearrange elements, so they act leaf by leaf, exactly.

| primitive                       | stays packed where                                            |
|---------------------------------|---------------------------------------------------------------|
| `transpose`                     | always                                                        |
| `reshape`                       | every tile stays whole                                        |
| `broadcast_in_dim`              | always, unless a packed axis of length 1 is widened           |
| `squeeze`                       | always; a vector comes out dense                              |
| `slice`, `split`, `unstack`     | on tile boundaries, or inside one tile of a scale             |
| `rev`                           | along axes of single elements or of whole tiles of a scale    |
| `concatenate`, `stack`, `tile`  | equal formats meet at tile boundaries                         |
| `pad`                           | with zeros, where a code of 0 means 0                         |
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import Array, lax
from jax.core import Tracer

from .. import tiles
from .._array import QuantizedArray
from .._dispatch import apply, register, transparent
from .._scaled import AbstractScaledArray
from .._transposed import ColumnMajor, TransposedView
from ..tiles import Leaf, Unaligned


def leafwise(x: AbstractScaledArray, move: Callable[[Leaf], Leaf]) -> Any:
    """`x` with every leaf moved, or `NotImplemented` where that has no packed form."""
    try:
        return x.moved(move)
    except Unaligned:
        return NotImplemented


@register(lax.transpose_p)
def transpose_scaled(
    primitive: Any, x: AbstractScaledArray, *, permutation: Any, **params: Any
) -> Any:
    return TransposedView(array=x, permutation=tuple(permutation))  # pyright: ignore[reportCallIssue]


@register(lax.transpose_p)
def transpose_view(primitive: Any, x: TransposedView, *, permutation: Any, **params: Any) -> Any:
    permutation = tuple(x.permutation[axis] for axis in permutation)
    return TransposedView(array=x.array, permutation=permutation)  # pyright: ignore[reportCallIssue]


_ON_STORED = (lax.convert_element_type_p, lax.neg_p, lax.mul_p, lax.div_p)


@register(lax.transpose_p, *_ON_STORED)
@transparent
def as_view_column_major(primitive: Any, *operands: ColumnMajor | Array, **params: Any) -> Any:
    """What a view of the stored array gives, and column-major again where that keeps the order."""
    if (x := _alone(operands, ColumnMajor)) is None:
        return NotImplemented
    (y,) = apply(primitive, [x.view if each is x else each for each in operands], params)
    if isinstance(y, TransposedView) and y.permutation == x.view.permutation:
        return ColumnMajor(y.array)  # pyright: ignore[reportCallIssue]
    return y


@register(*_ON_STORED)
@transparent
def on_stored_view(primitive: Any, *operands: TransposedView | Array, **params: Any) -> Any:
    """Elementwise: on what is stored."""
    if (x := _alone(operands, TransposedView)) is None:
        return NotImplemented
    (y,) = apply(primitive, [x.array if each is x else each for each in operands], params)
    if isinstance(y, AbstractScaledArray):
        return TransposedView(array=y, permutation=x.permutation)  # pyright: ignore[reportCallIssue]
    return lax.transpose(y, x.permutation)


def _alone(operands: Sequence[Any], kind: type) -> Any:
    """The one operand of this kind, if all others are scalars."""
    found = [x for x in operands if isinstance(x, kind)]
    others = [x for x in operands if not isinstance(x, kind)]
    return found[0] if len(found) == 1 and not any(x.ndim for x in others) else None


@register(lax.reshape_p)
def reshape_scaled(
    primitive: Any, x: AbstractScaledArray, *, new_sizes: Any, dimensions: Any = None, **params: Any
) -> Any:
    if params.get("sharding") is not None:
        return NotImplemented
    order = range(x.ndim) if dimensions is None else dimensions
    return leafwise(x, lambda leaf: tiles.reshape(tiles.transpose(leaf, order), new_sizes))


@register(lax.broadcast_in_dim_p)
def broadcast_in_dim_scaled(
    primitive: Any,
    x: AbstractScaledArray,
    *,
    shape: Any,
    broadcast_dimensions: Any,
    sharding: Any = None,
    **params: Any,
) -> Any:
    if sharding is not None:
        return NotImplemented

    def move(leaf: Leaf) -> Leaf:
        source = dict(zip(broadcast_dimensions, x.shape, strict=True))
        for axis, length in enumerate(shape):
            if axis not in source:
                leaf = tiles.insert_axis(leaf, axis)
            if source.get(axis, 1) != length:
                leaf = tiles.widen(leaf, axis, length)
        return leaf

    return leafwise(x, move)


@register(lax.squeeze_p)
def squeeze_scaled(
    primitive: Any, x: AbstractScaledArray, *, dimensions: Any, **params: Any
) -> Any:
    def move(leaf: Leaf) -> Leaf:
        for axis in sorted((d % x.ndim for d in dimensions), reverse=True):
            leaf = tiles.remove_axis(leaf, axis)
        return leaf

    return as_activation(leafwise(x, move), x)


@register(lax.slice_p)
def slice_scaled(
    primitive: Any,
    x: AbstractScaledArray,
    *,
    start_indices: Any,
    limit_indices: Any,
    strides: Any,
    **params: Any,
) -> Any:
    return _slice(x, start_indices, limit_indices, strides or (1,) * x.ndim)


def _slice(x: AbstractScaledArray, starts: Any, stops: Any, strides: Any) -> Any:
    def move(leaf: Leaf) -> Leaf:
        for axis, bounds in enumerate(zip(starts, stops, strides, strict=True)):
            leaf = tiles.reslice(leaf, axis, *map(int, bounds))
        return leaf

    return leafwise(x, move)


def as_activation(result: Any, x: AbstractScaledArray) -> Any:
    """`result`, dense if it is a vector cut from the matrix `x`: a row is used in arithmetic."""
    if isinstance(result, QuantizedArray) and result.ndim < 2 <= x.ndim:
        return result.materialize()
    return result


@register(lax.rev_p)
def rev_scaled(primitive: Any, x: AbstractScaledArray, *, dimensions: Any, **params: Any) -> Any:
    def move(leaf: Leaf) -> Leaf:
        for axis in dimensions:
            leaf = tiles.reverse(leaf, axis)
        return leaf

    return leafwise(x, move)


def _pieces(x: AbstractScaledArray, axis: int, sizes: Sequence[int]) -> Any:
    bounds = np.cumsum([0, *sizes])
    pieces = []
    for start, stop in itertools.pairwise(bounds):
        starts, stops = [0] * x.ndim, list(x.shape)
        starts[axis], stops[axis] = int(start), int(stop)
        pieces.append(_slice(x, starts, stops, [1] * x.ndim))
    return pieces if all(piece is not NotImplemented for piece in pieces) else NotImplemented


@register("split")
def split_scaled(
    primitive: Any, x: AbstractScaledArray, *, sizes: Any, axis: int, **params: Any
) -> Any:
    return _pieces(x, axis, [int(size) for size in sizes])  # jnp.split gives numbers of NumPy


@register("unstack")
def unstack_scaled(primitive: Any, x: AbstractScaledArray, *, axis: int, **params: Any) -> Any:
    pieces = _pieces(x, axis, [1] * x.shape[axis])
    if pieces is NotImplemented:
        return NotImplemented
    rows = [squeeze_scaled(lax.squeeze_p, piece, dimensions=(axis,)) for piece in pieces]
    return rows if all(row is not NotImplemented for row in rows) else NotImplemented


def join(arrays: Sequence[Any], axis: int) -> Any:
    """The arrays concatenated, leaf by leaf; `NotImplemented` unless equal leaves of all mean the same."""
    if not all(isinstance(x, AbstractScaledArray) for x in arrays):
        return NotImplemented
    kept = [x for x in arrays if x.shape[axis]] or arrays[:1]
    if len(kept) == 1:
        return kept[0]
    for forms in (kept, [x.expanded() for x in kept]):
        if not all(form.means_as(forms[0]) for form in forms):
            continue
        with contextlib.suppress(Unaligned):
            leaves = [form.leaves() for form in forms]
            joined = {name: tiles.join([each[name] for each in leaves], axis) for name in leaves[0]}
            return forms[0].with_leaves(joined)
    return NotImplemented


@register(lax.concatenate_p)
def concatenate_any(
    primitive: Any, *arrays: QuantizedArray | Array, dimension: int, **params: Any
) -> Any:
    return join(arrays, dimension)


@register("stack")
def stack_any(primitive: Any, *arrays: QuantizedArray | Array, axis: int, **params: Any) -> Any:
    if not all(isinstance(x, AbstractScaledArray) for x in arrays):
        return NotImplemented
    rows = [leafwise(x, lambda leaf: tiles.insert_axis(leaf, axis)) for x in arrays]  # pyright: ignore
    return NotImplemented if any(row is NotImplemented for row in rows) else join(rows, axis)


@register("tile")
def tile_scaled(primitive: Any, x: AbstractScaledArray, *, reps: Any, **params: Any) -> Any:
    result: Any = x
    for axis, count in enumerate(reps):
        if count != 1 and result is not NotImplemented:
            result = join([result] * count, axis) if count else NotImplemented
    return result


@register(lax.pad_p)
def pad_scaled(
    primitive: Any, x: AbstractScaledArray, value: Array, *, padding_config: Any, **params: Any
) -> Any:
    fillers = {name: x.filler(name) for name in x.payloads}
    if isinstance(value, Tracer) or None in fillers.values() or np.asarray(value) != 0:
        return NotImplemented

    def padded(name: str, leaf: Leaf) -> Leaf:
        # A code of 0 times anything, plus 0.
        filler = fillers.get(name, 0 if leaf.role == "summand" else 1)
        for axis, (low, high, interior) in enumerate(padding_config):
            leaf = tiles.pad(leaf, axis, int(low), int(high), int(interior), filler)
        return leaf

    try:
        return x.with_leaves({name: padded(name, leaf) for name, leaf in x.leaves().items()})
    except Unaligned:
        return NotImplemented
