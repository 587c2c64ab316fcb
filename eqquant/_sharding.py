"""Splitting the leaves of a quantized array over devices, together."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from ._tiles import Leaf


def as_spec(axis: PartitionSpec | Sequence[Any] | str | None) -> PartitionSpec:
    """A spec from None (replicated), a spec, a sequence of names, or one name."""
    if axis is None:
        return PartitionSpec()
    if isinstance(axis, PartitionSpec):
        return axis
    return PartitionSpec(axis) if isinstance(axis, str) else PartitionSpec(*axis)


def leaf_spec(
    leaf: Leaf, name: str, shape: Sequence[int], spec: PartitionSpec, mesh: Any
) -> PartitionSpec:
    """The spec of a leaf, from the spec of the logical array.

    **Raises:** `ValueError` if a shard would not hold whole tiles.
    """
    if len(spec) > len(shape):
        raise ValueError(f"sharding {spec} has more axes than the array of shape {tuple(shape)}.")
    axes = []
    for axis, names in enumerate(spec):
        if leaf.is_constant_along(axis) or names in (None, PartitionSpec.UNCONSTRAINED):
            axes.append(None if leaf.is_constant_along(axis) else names)
            continue
        names_ = names if isinstance(names, tuple) else (names,)
        unknown = [n for n in names_ if n not in mesh.shape]
        if unknown:
            raise ValueError(
                f"sharding {spec} names the mesh axis {unknown[0]!r}, but the mesh has "
                f"{dict(mesh.shape)}."
            )
        shards, tile = math.prod(mesh.shape[n] for n in names_), leaf.tiles[axis]
        if shape[axis] % (shards * tile.size):
            raise ValueError(
                f"Axis {axis} of length {shape[axis]} cannot be split over {shards} devices of "
                f"mesh axis {names!r} (mesh {dict(mesh.shape)}): its leaf {name!r} has tiles of "
                f"{tile.size}. Choose another spec, or a length divisible by {shards * tile.size}."
            )
        axes.append(names)
    return PartitionSpec(*axes)


def place(
    leaf: Leaf, name: str, shape: Sequence[int], sharding: NamedSharding | PartitionSpec
) -> Any:
    """The array of `leaf` laid out as `sharding` says for the logical array of `shape`."""
    if isinstance(sharding, PartitionSpec):
        mesh, logical, memory_kind = jax.sharding.get_abstract_mesh(), sharding, None
        if mesh.empty:
            raise ValueError(
                f"with_sharding({sharding}) needs a mesh: enter one with jax.set_mesh(mesh), or "
                "pass a NamedSharding."
            )
    else:
        mesh, logical, memory_kind = sharding.mesh, sharding.spec, sharding.memory_kind
    spec = leaf_spec(leaf, name, shape, logical, mesh)
    to = NamedSharding(mesh, spec, memory_kind=memory_kind)
    constrain = partial(lax.with_sharding_constraint, shardings=to)
    traced = isinstance(leaf.array, Tracer)
    if isinstance(mesh, AbstractMesh):  # the current one
        if _is_explicit(spec, mesh):
            return jax.sharding.reshard(leaf.array, to)
        return constrain(leaf.array) if traced else jax.jit(constrain)(leaf.array)
    if traced and not _is_explicit(spec, mesh):
        return constrain(leaf.array)
    return jax.device_put(leaf.array, to)


def _is_explicit(spec: PartitionSpec, mesh: Any) -> bool:
    """Whether a spec is part of the type of an array, by the mesh axes it names."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    named = [types[name] for entry in entries for name in entry if name in types]
    return all(kind == AxisType.Explicit for kind in named or types.values())
