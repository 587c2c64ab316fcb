"""What `jax.export` writes about a quantized array: exported programs hold the tree structure of arguments and results.

Each class is registered when it is made, a format of the user's too, so that there is nothing to do for it.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, TypeVar

import jax.tree_util as jtu

from ._compat import register_node_serialization
from ._facts import decoded, encoded, is_static, name_of, version_of


_Class = TypeVar("_Class", bound=type)


def exportable(cls: _Class) -> _Class:
    """Registers a class that derives from `eqx.Module` with `jax.export`, under the name it has in descriptions.

    A class that is defined again, as in a notebook, takes the place of the first.
    """
    name = name_of(cls)
    register_node_serialization(
        cls,
        serialized_name=name if ":" in name else f"eqquant:{name}",
        serialize_auxdata=lambda auxdata: _written(cls, auxdata),
        deserialize_auxdata=lambda text: _read(cls, text),
        from_children=lambda facts, children: _built(cls, facts, children),
    )
    return cls


def _written(cls: type, auxdata: Any) -> bytes:
    """The static facts that Equinox keeps in the tree structure."""
    leaf = jtu.tree_structure(0)
    node = jtu.PyTreeDef.from_node_data_and_children(
        jtu.default_registry, (cls, auxdata), [leaf] * len(_fields(cls, static=False))
    )
    module = jtu.tree_unflatten(node, [0] * node.num_leaves)
    facts = {
        name: encoded(getattr(module, name), f"{cls.__name__}.{name}")
        for name in _fields(cls, static=True)
    }
    return json.dumps({"version": version_of(cls), "facts": facts}).encode()


def _read(cls: type, text: bytes) -> dict[str, Any]:
    """The inverse of `_written`, as facts by name."""
    found = json.loads(text)
    if found["version"] != version_of(cls) or [*found["facts"]] != _fields(cls, static=True):
        raise ValueError(
            f"This exported program has a {name_of(cls)} of version {found['version']} with the facts {[*found['facts']]}; "
            f"the class is of version {version_of(cls)} and has {_fields(cls, static=True)}. Export it again, or call it with "
            "the release that wrote it."
        )
    return {name: decoded(fact, f"{cls.__name__}.{name}") for name, fact in found["facts"].items()}


def _built(cls: type, facts: dict[str, Any], children: Sequence[Any]) -> Any:
    module = object.__new__(cls)  # a constructor may take other arguments than the fields
    leaves = dict(zip(_fields(cls, static=False), children, strict=True))
    for name, value in {**facts, **leaves}.items():
        object.__setattr__(module, name, value)
    return module


def _fields(cls: Any, *, static: bool) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if is_static(field) == static]
