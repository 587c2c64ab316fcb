"""What is said of a class and of its static facts as plain data: in descriptions, and in exported programs."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from .coding import Coding
from .tiles import Packing, Tile


def name_of(cls: type) -> str:
    """The name of a class in descriptions: files keep it, so that of this library says nothing about modules."""
    ours = cls.__module__.split(".")[0] == __name__.split(".")[0]
    return cls.__qualname__ if ours else f"{cls.__module__}:{cls.__qualname__}"


def version_of(cls: type) -> int:
    """Of what its facts and leaves mean: a number that its author raises."""
    return getattr(cls, "description_version", 1)


def class_named(name: str, base: type) -> Any:
    """The class of this name among all that derive from `base`; of two, the one that was defined last. None if there is
    none."""
    found, waiting = {}, [base]
    while waiting:
        cls = waiting.pop(0)
        found[name_of(cls)] = cls
        waiting += cls.__subclasses__()
    return found.get(name)


# --------------------------------------------------------------------------------- static facts


def encoded(value: Any, where: str) -> Any:
    """A static fact as plain data."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    if type(value) is tuple:
        return [encoded(each, where) for each in value]
    if type(value) in (Packing, Tile):
        parts = value._asdict()
    elif isinstance(value, Coding):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    else:
        raise TypeError(
            f"{where} is a static fact of type {type(value).__name__}, which a description cannot say: it says None, "
            "bool, int, float, str, np.dtype, Packing, Tile, Coding, and tuples of these. Keep one of them in the field, and "
            "compute the rest from it in a property."
        )
    return {name_of(type(value)): {name: encoded(part, where) for name, part in parts.items()}}


def decoded(value: Any, where: str) -> Any:
    """The inverse of `encoded`."""
    if isinstance(value, list):
        return tuple(decoded(each, where) for each in value)
    if not isinstance(value, dict):
        return value
    ((kind, parts),) = value.items()
    if kind in _SCALARS:
        return _SCALARS[kind](parts)
    cls = _RECORDS.get(kind) or class_named(kind, Coding)
    if cls is None:
        raise ValueError(
            f"{where} is a fact of the unknown type {kind!r} in this description: import the module that defines it first."
        )
    return cls(**{name: decoded(part, where) for name, part in parts.items()})


_SCALARS = {"float": float, "dtype": jnp.dtype}
_RECORDS = {"Packing": Packing, "Tile": Tile}


def is_static(field: dataclasses.Field) -> bool:
    """Whether a field of an `eqx.Module` is part of the tree structure."""
    return field.metadata.get("static", False)
