"""Splitting the leaves of a quantized array over devices, together."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

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
        if names is None or leaf.is_constant_along(axis):
            axes.append(None)
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
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            raise ValueError(
                f"with_sharding({sharding}) needs a mesh: enter one with jax.set_mesh(mesh), or "
                "pass a NamedSharding."
            )
        place_as: Any = leaf_spec(leaf, name, shape, sharding, mesh)
        return jax.sharding.reshard(leaf.array, place_as) if _is_explicit(mesh) else _constrain(
            leaf.array, place_as
        )
    place_as = NamedSharding(
        sharding.mesh,
        leaf_spec(leaf, name, shape, sharding.spec, sharding.mesh),
        memory_kind=sharding.memory_kind,
    )
    if isinstance(leaf.array, jax.core.Tracer):
        return _constrain(leaf.array, place_as)
    return jax.device_put(leaf.array, place_as)


def _constrain(array: Any, sharding: Any) -> Any:
    return lax.with_sharding_constraint(array, sharding)


def _is_explicit(mesh: Any) -> bool:
    return mesh.are_all_axes_explicit
