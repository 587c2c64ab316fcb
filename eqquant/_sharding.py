"""Splitting the leaves of a quantized array over devices, together."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from .tiles import Leaf, UNIT


def as_spec(axis: PartitionSpec | Sequence[Any] | str | None) -> PartitionSpec:
    """A spec from None (replicated), a spec, a sequence of names, or one name."""
    if axis is None:
        return PartitionSpec()
    if isinstance(axis, PartitionSpec):
        return axis
    return PartitionSpec(axis) if isinstance(axis, str) else PartitionSpec(*axis)


def leaf_spec(leaf: Leaf, name: str, spec: PartitionSpec, mesh: Any) -> PartitionSpec:
    """The spec of a leaf, from the spec of the logical array.

    **Raises:** `ValueError` if a shard would not hold whole tiles.
    """
    shape = leaf.shape
    if len(spec) > len(shape):
        raise ValueError(f"sharding {spec} has more axes than the array of shape {shape}.")
    axes = []
    for axis, names in enumerate(spec):
        if leaf.is_constant_along(axis) or names in (None, PartitionSpec.UNCONSTRAINED):
            axes.append(None if leaf.is_constant_along(axis) else names)
            continue
        unknown = [n for n in _names(names) if n not in mesh.shape]
        if unknown:
            raise ValueError(
                f"sharding {spec} names the mesh axis {unknown[0]!r}, but the mesh has "
                f"{dict(mesh.shape)}."
            )
        _check_whole(
            shape[axis], axis, leaf.tiles[axis].size, names, mesh, f"its leaf {name!r} has"
        )
        axes.append(names)
    return PartitionSpec(*axes)


def _names(entry: Any) -> tuple[Any, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def names_of(spec: PartitionSpec) -> frozenset[str]:
    """The mesh axes that a spec names."""
    return frozenset(name for entry in spec if entry is not None for name in _names(entry))


def _check_whole(length: int, axis: int, size: int, names: Any, mesh: Any, what: str) -> None:
    shards = math.prod(mesh.shape[n] for n in _names(names))
    if shards > 1 and length % (shards * size):
        raise ValueError(
            f"Axis {axis} of length {length} cannot be split over {shards} devices of mesh axis "
            f"{names!r} (mesh {dict(mesh.shape)}): {what} tiles of {size}. Choose another spec, or a "
            f"length divisible by {shards * size}."
        )


def replicate(array: Any, name: str, like: NamedSharding | PartitionSpec, batch: int = 0) -> Any:
    """`array` as a whole on all devices of the mesh of a sharding, but for its first `batch` axes."""
    leaf = Leaf(array, array.shape, (UNIT,) * array.ndim, role="codes")
    if isinstance(like, PartitionSpec):
        return place(leaf, name, PartitionSpec(*like[:batch]))
    return place(leaf, name, like.update(spec=PartitionSpec(*like.spec[:batch])))


def place(leaf: Leaf, name: str, sharding: NamedSharding | PartitionSpec) -> Any:
    """The array of `leaf` laid out as `sharding` says for the logical array."""
    if isinstance(sharding, PartitionSpec):
        mesh, logical, memory_kind = jax.sharding.get_abstract_mesh(), sharding, None
        if mesh.empty:
            raise ValueError(
                f"with_sharding({sharding}) needs a mesh: enter one with jax.set_mesh(mesh), or "
                "pass a NamedSharding."
            )
    else:
        mesh, logical, memory_kind = sharding.mesh, sharding.spec, sharding.memory_kind
    spec = leaf_spec(leaf, name, logical, mesh)
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
    named = [types[name] for entry in spec for name in _names(entry) if name in types]
    return all(kind == AxisType.Explicit for kind in named or types.values())


# -------------------------------------------------------- where the sharding is a part of the type


def _in_type(x: Any) -> NamedSharding | None:
    """The sharding that the type of `x` says, if mesh axes are explicit."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def is_explicit(x: Any) -> bool:
    """Whether the type of `x` says how it is split over devices."""
    return _in_type(x) is not None


def check_tiles(x: Any, axis: int, size: int) -> None:
    """Raises `ValueError` if the type of `x` says that its devices do not hold whole tiles."""
    sharding = _in_type(x)
    names = None if sharding is None else sharding.spec[axis]
    if sharding is not None and names is not None:
        _check_whole(x.shape[axis], axis, size, names, sharding.mesh, "it is quantized in")


def look_up(table: Array, indices: Array) -> Array:
    """`table[indices]`, laid out over devices as `indices` are."""
    sharding = _in_type(indices)
    return table[indices] if sharding is None else table.at[indices].get(out_sharding=sharding)


def whole(x: Array) -> Array:
    """`x` on each device as a whole, if its type says otherwise: it can be reshaped in any way."""
    sharding = _in_type(x)
    return x if sharding is None else jax.sharding.reshard(x, sharding.update(spec=PartitionSpec()))


def split_as(x: Array, y: Array) -> Array:
    """`x` split over devices as the type of `y` says, if it does."""
    sharding = _in_type(y)
    return x if sharding is None else jax.sharding.reshard(x, sharding)
