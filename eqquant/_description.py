"""Arrays as plain data and back: what a file says about the numbers in it, and what is checked when they are read.

A description holds what is not in the leaves: the class, the static facts, and the shapes and dtypes of the leaves. It
follows from the fields of a class, so that a format has nothing to write for it.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ._facts import class_named, decoded, encoded, is_static, name_of, version_of
from ._implicit_array import ImplicitArray


Description = dict[str, Any]
"""What `json.dumps` takes: dictionaries by strings, lists, strings, numbers, booleans and None."""


def describe(array: Any) -> Description:
    """What a quantized array is, but for its numbers, as plain data.

    **Arguments:**

    - `array`: a quantized array. Its leaves may be `jax.ShapeDtypeStruct`s, or None where `eqx.filter` has taken
        them away.

    **Returns:** what `json.dumps` takes, with these entries:

    - `"class"`: its name; that of a class that is not of this library is `"module:QualName"`.
    - `"version"`: `description_version` of the class.
    - `"shape"` and `"dtype"`: of the logical array; None if leaves that say it are not there.
    - `"facts"`: the static fields, by name. Tuples are lists; the others that are no plain data are dictionaries of one
        entry, such as `{"dtype": "float32"}` or `{"Packing": {...}}`.
    - `"leaves"`: the other fields, by name: `{"dtype": ..., "shape": ...}` for an array, None for None, and a
        description for what is itself an `eqx.Module`, such as a scale that is stored in codes.

    **Raises:** `TypeError` if `array` is no quantized array, or a field holds what has no such form; it names class and
    field.

    !!! example

        ```python
        import json

        import jax.numpy as jnp
        import eqquant as eqq

        q = eqq.Array8B.quantize(jnp.ones((4, 8)))
        description = eqq.describe(q)
        assert description["class"] == "Array8B" and description["shape"] == [4, 8]
        assert description["leaves"]["weight"] == {"dtype": "int8", "shape": [4, 8]}
        assert json.loads(json.dumps(description)) == description
        ```
    """
    if not isinstance(array, ImplicitArray):
        raise TypeError(
            f"describe(array) takes a quantized array, such as Array8B.quantize(w); it was given {type(array).__name__}. "
            "Of a model, describe each: jax.tree.leaves(model, is_leaf=eqq.is_implicit) lists them."
        )
    return _describe(array)


def from_description(description: Description) -> Any:
    """The quantized array that a description is of, with `jax.ShapeDtypeStruct`s in place of its numbers.

    **Arguments:**

    - `description`: as [`describe`][eqquant.describe] gives it; it may have gone through JSON.

    **Returns:** an array of the tree structure of the one that was described. Nothing is computed, and no module is
    imported: a class that is not of this library is found if the module that defines it has been imported.

    **Raises:** `ValueError` if `description` is of a class that is not known, of another version of it, or is not what
    `describe` gives for any array of that class.

    !!! example

        ```python
        import jax, jax.numpy as jnp
        import eqquant as eqq

        q = eqq.ArrayNF4.quantize(jnp.ones((4, 63)))
        skeleton = eqq.from_description(eqq.describe(q))
        assert jax.tree.structure(skeleton) == jax.tree.structure(q)
        assert skeleton.shape == (4, 63) and skeleton.packed.dtype == jnp.uint8
        ```
    """
    return _build(description)


def serialise_filter_spec(f: Any, x: Any) -> None:
    """Writes a quantized array with its description; for `eqx.tree_serialise_leaves`.

    Give it together with `is_leaf=eqq.is_implicit`, which hands it the array as a whole: without that, it is given one
    leaf after another, and writes what Equinox does.

    **Arguments:**

    - `f`: a binary file.
    - `x`: a quantized array; anything else goes to `eqx.default_serialise_filter_spec`.

    **Raises:** what [`describe`][eqquant.describe] raises.

    !!! example

        ```python
        import io

        import equinox as eqx, jax
        import eqquant as eqq

        model = eqq.quantize(eqx.nn.Linear(64, 4, key=jax.random.key(0)), eqq.ArrayNF4.quantize)
        file = io.BytesIO()
        eqx.tree_serialise_leaves(file, model, eqq.serialise_filter_spec, is_leaf=eqq.is_implicit)
        ```
    """
    if not isinstance(x, ImplicitArray):
        eqx.default_serialise_filter_spec(f, x)
        return
    leaves = jtu.tree_leaves(x)
    if not leaves:  # all were taken away by eqx.filter
        return
    text = json.dumps(_describe(x), separators=(",", ":")).encode()
    f.write(_MAGIC + len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    for leaf in leaves:
        eqx.default_serialise_filter_spec(f, leaf)


def deserialise_filter_spec(f: Any, x: Any) -> Any:
    """Reads what [`serialise_filter_spec`][eqquant.serialise_filter_spec] wrote, if it is what `x` is; for
    `eqx.tree_deserialise_leaves`.

    Give it together with `is_leaf=eqq.is_implicit`, as when the file was written.

    **Arguments:**

    - `f`: a binary file that can `seek`.
    - `x`: what is to be there: arrays, or `jax.ShapeDtypeStruct`s. Anything but a quantized array goes to
        `eqx.default_deserialise_filter_spec`.

    **Returns:** `x` with the numbers of the file.

    **Raises:** `ValueError` if the file has another array here, and says how the two differ; or if it is cut short, or
    was not written so. Equinox puts it under a `RuntimeError` that names the path: the traceback shows both.

    !!! example

        ```python
        import io

        import equinox as eqx, jax
        import eqquant as eqq

        model = eqq.quantize(eqx.nn.Linear(64, 4, key=jax.random.key(0)), eqq.ArrayNF4.quantize)
        file = io.BytesIO()
        eqx.tree_serialise_leaves(file, model, eqq.serialise_filter_spec, is_leaf=eqq.is_implicit)

        file.seek(0)
        like = eqx.filter_eval_shape(lambda: model)
        loaded = eqx.tree_deserialise_leaves(
            file, like, eqq.deserialise_filter_spec, is_leaf=eqq.is_implicit
        )
        assert eqx.tree_equal(loaded, model)
        ```
    """
    if isinstance(x, ImplicitArray):
        return _read_described(f, x) if jtu.tree_leaves(x) else x
    if isinstance(x, jax.ShapeDtypeStruct) or eqx.is_array_like(x):
        return _read_numbers(f, x)
    return eqx.default_deserialise_filter_spec(f, x)


# --------------------------------------------------------------------------- arrays as plain data


def _describe(module: eqx.Module) -> Description:
    cls = type(module)
    facts, leaves = {}, {}
    for field in dataclasses.fields(module):  # pyright: ignore[reportArgumentType]
        value, where = getattr(module, field.name), f"{cls.__name__}.{field.name}"
        if is_static(field):
            facts[field.name] = encoded(value, where)
        else:
            leaves[field.name] = _leaf_described(value, where)
    head = {"class": name_of(cls), "version": version_of(cls)}
    logical = _logical(module) if isinstance(module, ImplicitArray) else {}
    return {**head, **logical, "facts": facts, "leaves": leaves}


def _logical(array: ImplicitArray) -> Description:
    """The shape and dtype, or None each where the leaves that say it are not there."""
    try:
        shape, dtype = [int(n) for n in array.shape], jnp.dtype(array.dtype).name
    except (AttributeError, TypeError):
        if all(leaf is not None for leaf in jtu.tree_leaves(array, is_leaf=lambda x: x is None)):
            raise
        shape = dtype = None
    return {"shape": shape, "dtype": dtype}


def _leaf_described(value: Any, where: str) -> Description | None:
    if isinstance(value, eqx.Module):
        return _describe(value)
    if value is None:
        return None
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return {"dtype": jnp.dtype(value.dtype).name, "shape": [int(n) for n in value.shape]}
    raise TypeError(
        f"{where} is {value!r}, which a description cannot say: a field holds an array, None or an eqx.Module of "
        "such. Declare what is no array with eqx.field(static=True)."
    )


def _build(description: Description) -> Any:
    cls = _class_of(description)
    stored = {**_entry(description, "facts"), **_entry(description, "leaves")}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if stored.keys() != fields.keys():
        odd = min(stored.keys() ^ fields.keys())
        how = "does not have" if odd in fields else "has, and the class does not"
        raise ValueError(f"{name_of(cls)}.{odd} is a field that this description {how}.")
    module = object.__new__(cls)  # a constructor may take other arguments than the fields
    for name, field in fields.items():
        where = f"{cls.__name__}.{name}"
        value = decoded(stored[name], where) if is_static(field) else _leaf_built(stored[name])
        object.__setattr__(module, name, value)
    if isinstance(module, ImplicitArray):
        want = {name: description.get(name) for name in ("shape", "dtype")}
        if (got := _logical(module)) != want:
            raise ValueError(
                f"This description of {name_of(cls)} says {want}, but its facts and leaves are of an array of {got}."
            )
    return module


def _leaf_built(value: Any) -> Any:
    if value is None:
        return None
    if "class" in value:
        return _build(value)
    return jax.ShapeDtypeStruct(tuple(value["shape"]), jnp.dtype(value["dtype"]))


def _entry(description: Any, name: str) -> Any:
    if not isinstance(description, dict) or name not in description:
        raise ValueError(
            f"A description is what eqq.describe gives; this one has no {name!r}: {description!r}."
        )
    return description[name]


def _class_of(description: Description) -> Any:
    name, version = _entry(description, "class"), _entry(description, "version")
    if (cls := class_named(name, eqx.Module)) is None:
        way_out = (
            f"import {name.split(':')[0]}, which defines it, first"
            if ":" in name
            else "was it described by a later version of eqquant?"
        )
        raise ValueError(f"No class of the name {name!r} is known: {way_out}.")
    if version != version_of(cls):
        raise ValueError(
            f"This description of {name} is of version {version}, but its class is of version {version_of(cls)}: read it "
            "with the release that wrote it, and quantize again."
        )
    return cls


# ------------------------------------------------------------------------------ in a file, checked

_MAGIC = b"\x93EQQUANT"  # as long as NumPy's "\x93NUMPY" and its version
_LENGTH_BYTES = 8
_LONGEST = 2**24  # of a description, in bytes; a longer one is none


def _read_described(f: Any, like: ImplicitArray) -> Any:
    want = _describe(like)
    start = _peek(f)
    if start != _MAGIC:
        raise ValueError(
            _cut_short("")
            if len(start) < len(_MAGIC)
            else f"The file has no description here, where an {want['class']} is to be. Was it saved without "
            "eqq.serialise_filter_spec and is_leaf=eqq.is_implicit, or is this weight dense there? Without both, "
            "eqx.tree_deserialise_leaves(path, like) loads it unchecked."
        )
    found = _read_description(f)
    if difference := _difference(found, want, ""):
        raise ValueError(
            f"{difference}: the numbers would mean another array. Build the skeleton the way the saved model was quantized."
        )
    # In the order of the file: fields may have changed places.
    expected, (leaves, treedef) = dict(_arrays(want)), jtu.tree_flatten(like)
    slots = dict(zip(expected, leaves, strict=True))
    read = {}
    for name, leaf in _arrays(found):
        array = _with_dtype(_read_numbers(f, slots[name]), leaf["dtype"])
        read[name] = array if isinstance(slots[name], np.ndarray) else jnp.asarray(array)
        if (got := _leaf_described(array, name)) != leaf:
            raise ValueError(
                f"The file is damaged: it says that {name} is {_shown(leaf)}, and has {_shown(got)}."
            )
    return jtu.tree_unflatten(treedef, [read[name] for name in expected])


def _with_dtype(array: Any, name: str) -> Any:
    """NumPy writes a dtype that it does not have, such as `float8_e4m3fn`, as bytes of its size."""
    dtype = jnp.dtype(name)
    if jnp.dtype(array.dtype).type is not np.void or array.dtype.itemsize != dtype.itemsize:
        return array
    return np.asarray(array).view(dtype)


def _read_description(f: Any) -> Description:
    f.read(len(_MAGIC))
    length = int.from_bytes(f.read(_LENGTH_BYTES), "little")
    text = f.read(length) if length <= _LONGEST else b""
    if len(text) < length:
        raise ValueError(_cut_short(" inside a description"))
    try:
        found = json.loads(text)
        for name in ("class", "version", "facts", "leaves"):
            _entry(found, name)
        return found
    except ValueError as error:  # of UTF-8, of JSON, or an entry that is not there
        raise ValueError(
            f"The file is damaged: the description here cannot be read ({error})."
        ) from error


def _read_numbers(f: Any, like: Any) -> Any:
    """One array or Python number, as Equinox reads it, if there is one here."""
    start = _peek(f)
    if start == _MAGIC:
        found = _read_description(f)
        raise ValueError(
            f"The file has an {found['class']} of shape {_shown(found['shape'])} here, the skeleton a number or a dense array: "
            "quantize the skeleton the way the saved model was, and pass is_leaf=eqq.is_implicit."
        )
    if not start.startswith(b"\x93NUMPY"):
        raise ValueError(
            _cut_short("")
            if len(start) < len(_MAGIC)
            else f"The file has no array here, but {start!r}: was it written by eqx.tree_serialise_leaves?"
        )
    try:
        return eqx.default_deserialise_filter_spec(f, like)
    except (EOFError, ValueError, OSError) as error:
        raise ValueError(f"{_cut_short(' inside an array')} ({error})") from error


def _peek(f: Any) -> bytes:
    start = f.read(len(_MAGIC))
    f.seek(-len(start), 1)
    return start


def _cut_short(where: str) -> str:
    return (
        f"The file ends{where} before all is read: was it cut short, or saved from a smaller model?"
    )


def _arrays(description: Description, prefix: str = "") -> Iterator[tuple[str, Description]]:
    """The leaves that are arrays, by their paths, in the order in which they are stored."""
    for name, leaf in description["leaves"].items():
        if leaf is not None and "class" in leaf:
            yield from _arrays(leaf, f"{prefix}{name}.")
        elif leaf is not None:
            yield prefix + name, leaf


def _difference(found: Description, want: Description, path: str) -> str | None:
    """A sentence, without its end, about the first thing in which two descriptions differ."""
    for name in ("class", "version", "shape", "dtype"):
        if found.get(name) != want.get(name):
            return _sentence(path + name, found.get(name), want.get(name), want["class"])
    facts = {**want["facts"], **found["facts"]}
    for name in sorted(facts, key=lambda name: isinstance(facts[name], dict)):  # the plainest first
        if difference := _of_facts(path + name, *(d["facts"].get(name) for d in (found, want))):
            return _sentence(*difference, want["class"])
    for name in {**want["leaves"], **found["leaves"]}:
        a, b = (d["leaves"].get(name) for d in (found, want))
        if a and b and "class" in a and "class" in b:
            if difference := _difference(a, b, f"{path}{name}."):
                return difference
        elif a != b:
            return _sentence(path + name, a, b, want["class"])
    return None


def _of_facts(name: str, found: Any, want: Any) -> tuple[str, Any, Any] | None:
    """The first part in which two facts differ: its path, and the two."""
    if found == want:
        return None
    if isinstance(found, dict) and isinstance(want, dict) and found.keys() == want.keys():
        ((_, a),), ((_, b),) = found.items(), want.items()
        if isinstance(a, dict) and a.keys() == b.keys():
            return next(filter(None, (_of_facts(f"{name}.{key}", a[key], b[key]) for key in b)))
    return name, found, want


def _sentence(name: str, found: Any, want: Any, of: str) -> str:
    found, want = _shown(found), _shown(want)
    if name.endswith("class"):
        return f"The file has {name} {found}, the skeleton {want}"
    return f"The file has {name} {found}, this {of.split(':')[-1]} {want}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(map(_shown, value))}{',' * (len(value) == 1)})"
    if isinstance(value, dict) and value.keys() == {"dtype", "shape"}:
        return f"{value['dtype']}[{','.join(map(str, value['shape']))}]"
    if isinstance(value, dict) and value.keys() == {"dtype"}:
        return value["dtype"]
    if isinstance(value, dict) and "class" in value:
        return value["class"]
    return str(value) if not isinstance(value, dict) else json.dumps(value)
