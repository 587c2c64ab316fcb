"""Canonical programs, from which `generate_coverage.py` finds out what stays packed in which format.

The operand `x` has the shape (16, 640) or that of `on`, quantized with default options: if its format
packs an axis, that is the last one. 320 elements are whole tiles in every format.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import eqquant as eqq
from eqquant import _daylight
from eqquant.formats.nested import NestedScale


@dataclasses.dataclass
class Program:
    """One row: the primitive that it shows, what it does, and how."""

    primitive: str
    label: str
    run: Callable[[Any], Any]
    on: tuple[int, ...] = (16, 640)


STACK = (2, 16, 640)
NOT_SHOWN = {
    "pcast": "inside shard_map only",
    "pvary": "inside shard_map only",
}


def _sharding(axis_type: AxisType) -> NamedSharding:
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(axis_type,))
    return NamedSharding(mesh, PartitionSpec())


def _ones(*shape: int) -> jax.Array:
    return jnp.ones(shape)


def _dot(x: Any, y: Any, contract: Sequence[Sequence[int]], batch: Any = ((), ())) -> Any:
    return lax.dot_general(x, y, (contract, batch))


PROGRAMS = [
    # structural
    Program("transpose", "two axes exchanged", lambda x: x.T),
    Program("reshape", "another axis split", lambda x: lax.reshape(x, (4, 4, 640))),
    Program("reshape", "other axes merged", lambda x: lax.reshape(x, (32, 640)), STACK),
    Program("reshape", "last axis split into whole tiles", lambda x: lax.reshape(x, (16, 2, 320))),
    Program("reshape", "last axis split across tiles", lambda x: lax.reshape(x, (16, 160, 4))),
    Program("reshape", "all axes merged", lambda x: lax.reshape(x, (16 * 640,))),
    Program("broadcast_in_dim", "new axis of length 1", lambda x: lax.expand_dims(x, (1,))),
    Program("broadcast_in_dim", "new leading axis", lambda x: lax.broadcast(x, (3,))),
    Program("squeeze", "axis of length 1", lambda x: lax.squeeze(x, (1,)), (16, 1, 640)),
    Program("squeeze", "to a vector", lambda x: lax.squeeze(x, (0,)), (1, 640)),
    Program("slice", "another axis", lambda x: x[2:9]),
    Program("slice", "another axis, strided", lambda x: lax.slice(x, (0, 0), (16, 640), (2, 1))),
    Program("slice", "last axis, whole tiles", lambda x: x[:, 320:]),
    Program("slice", "last axis, across tiles", lambda x: x[:, 1:639]),
    Program("rev", "another axis", lambda x: lax.rev(x, (0,))),
    Program("rev", "last axis", lambda x: lax.rev(x, (1,))),
    Program("concatenate", "along another axis", lambda x: lax.concatenate([x, x], 0)),
    Program("concatenate", "along the last axis", lambda x: lax.concatenate([x, x], 1)),
    Program(
        "concatenate",
        "with a dense array",
        lambda x: lax.concatenate([x, _ones(16, 640)], 0),
    ),
    Program("split", "another axis", lambda x: lax.split(x, [4, 12], 0)),
    Program("split", "last axis, whole tiles", lambda x: lax.split(x, [320, 320], 1)),
    Program("split", "last axis, across tiles", lambda x: lax.split(x, [1, 639], 1)),
    Program("stack", "of matrices", lambda x: jnp.stack([x, x])),
    Program("unstack", "into matrices", lambda x: jnp.unstack(x), STACK),
    Program("unstack", "into rows", lambda x: jnp.unstack(x)),
    Program("tile", "another axis", lambda x: jnp.tile(x, (2, 1))),
    Program("tile", "last axis", lambda x: jnp.tile(x, (1, 2))),
    Program("pad", "another axis with zeros", lambda x: lax.pad(x, 0.0, [(0, 4, 0), (0, 0, 0)])),
    Program("pad", "last axis with zeros", lambda x: lax.pad(x, 0.0, [(0, 0, 0), (0, 320, 0)])),
    Program("pad", "with another number", lambda x: lax.pad(x, 1.0, [(0, 4, 0), (0, 0, 0)])),
    # indexing
    Program("gather", "rows: an embedding", lambda x: x[jnp.array([3, 1, 3])]),
    Program("gather", "columns", lambda x: x[:, jnp.array([3, 1, 3])]),
    Program("gather", "elements", lambda x: x[jnp.array([3, 1]), jnp.array([2, 5])]),
    Program(
        "gather",
        "matrices of a stack",
        lambda x: jnp.take(x, jnp.array([1, 0, 1]), axis=0, mode="clip"),
        STACK,
    ),
    Program("dynamic_slice", "another axis", lambda x: lax.dynamic_slice_in_dim(x, 3, 4)),
    Program("dynamic_slice", "last axis", lambda x: lax.dynamic_slice_in_dim(x, 320, 320, 1)),
    Program(
        "dynamic_update_slice",
        "a matrix of a stack",
        lambda x: lax.dynamic_update_slice_in_dim(x, x[:1], 1, 0),
        STACK,
    ),
    Program(
        "dynamic_update_slice",
        "by dense values",
        lambda x: lax.dynamic_update_slice_in_dim(x, _ones(1, 640), 1, 0),
    ),
    Program("select_n", "by a scalar", lambda x: lax.select_n(jnp.array(True), x, x[:])),
    Program("select_n", "element by element", lambda x: lax.select_n(_ones(16, 640) > 0, x, x)),
    Program("scatter", "new rows", lambda x: x.at[jnp.array([1, 2])].set(0.0)),
    # elementwise
    Program("neg", "", lambda x: -x),
    Program("mul", "by a scalar", lambda x: 2 * x),
    Program("mul", "by an array", lambda x: x * _ones(16, 640)),
    Program("div", "by a scalar", lambda x: x / 2),
    Program("convert_element_type", "to bfloat16", lambda x: x.astype(jnp.bfloat16)),
    Program("convert_element_type", "to int32", lambda x: x.astype(jnp.int32)),
    Program("reduce_precision", "to its own", lambda x: lax.reduce_precision(x, 8, 23)),
    Program("copy", "", lambda x: lax.copy_p.bind(x)),
    Program("stop_gradient", "", lax.stop_gradient),
    Program("name", "", lambda x: checkpoint_name(x, "weight")),
    Program("optimization_barrier", "", lax.optimization_barrier),
    Program("device_put", "", jax.device_put),
    Program(
        "sharding_constraint",
        "",
        lambda x: lax.with_sharding_constraint(x, _sharding(AxisType.Auto)),
    ),
    Program("reshard", "", lambda x: jax.sharding.reshard(x, _sharding(AxisType.Explicit))),
    Program("add", "", lambda x: x + 1),
    Program("exp", "", jnp.exp),
    # contraction
    Program("dot_general", "`y @ x`", lambda x: _dot(_ones(3, 16), x, ((1,), (0,)))),
    Program("dot_general", "`x @ y`", lambda x: _dot(x, _ones(640, 3), ((1,), (0,)))),
    Program("dot_general", "`x.T @ y`", lambda x: _dot(x.T, _ones(16, 3), ((1,), (0,)))),
    Program(
        "dot_general",
        "batched",
        lambda x: _dot(_ones(2, 3, 16), x, ((2,), (1,)), ((0,), (0,))),
        STACK,
    ),
    Program(
        "ragged_dot_general",
        "a matrix for each group",
        lambda x: lax.ragged_dot(_ones(5, 16), x, jnp.array([2, 3])),
        STACK,
    ),
    Program(
        "conv_general_dilated",
        "kernel (out, in, width)",
        lambda x: lax.conv_general_dilated(_ones(1, 16, 1000), x, (1,), "SAME"),
        STACK,
    ),
    Program("reduce_sum", "another axis", lambda x: jnp.sum(x, 0)),
    Program("reduce_sum", "last axis", lambda x: jnp.sum(x, 1)),
    Program("reduce_max", "", lambda x: jnp.max(x, 1)),
    Program("reduce_min", "", lambda x: jnp.min(x, 1)),
    Program("reduce_prod", "", lambda x: jnp.prod(x, 1)),
    Program("argmax", "", lambda x: jnp.argmax(x, 1)),
    Program("argmin", "", lambda x: jnp.argmin(x, 1)),
    Program("reduce", "by a function", lambda x: lax.reduce(x, 0.0, lambda a, b: a + b * 1, (1,))),
    Program("sort", "", jnp.sort),
]


def _columns() -> dict[str, Callable[[Any], Any]]:
    columns = {}
    for name in eqq.formats.__all__:
        quantize = columns[name] = getattr(eqq, name).quantize
        if name == "ArrayNF4":
            columns[f"{name}, double"] = partial(quantize, double=True)
    return columns


COLUMNS = _columns()
"""By the heading of a column: how its operands are quantized."""


@cache
def _operand(quantize: Callable[[Any], Any], shape: tuple[int, ...]) -> Any:
    return quantize(jnp.linspace(-1, 1, math.prod(shape)).reshape(shape))


def outcome(program: Program, quantize: Callable[[Any], Any]) -> str:
    """What becomes of the operand: only its codes are computed."""
    x = _operand(quantize, program.on)
    with _daylight.recording() as met:
        results = jax.eval_shape(eqq.implicit(program.run), x)
    if program.primitive not in {row.primitive for row in met}:
        raise ValueError(
            f"the program {program.label!r} of {program.primitive} has no such equation"
        )
    if any(row.densified for row in met):
        return "dense"
    results = jtu.tree_leaves(results, is_leaf=eqq.is_implicit)
    if not all(map(eqq.is_implicit, results)):
        return "read packed"
    return "packed ¹" if _is_nested(x) and not all(map(_is_nested, results)) else "packed"


def _is_nested(x: Any) -> bool:
    def is_scale(node: Any) -> bool:
        return isinstance(node, NestedScale)

    return any(map(is_scale, jtu.tree_leaves(x, is_leaf=is_scale)))
