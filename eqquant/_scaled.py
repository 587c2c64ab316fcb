"""The family of formats: codes on a scale, plus an offset, x = scale * values + offset.

Three things are kept apart. *Stored leaves* (`leaves`) are what is moved, split over devices and saved. *What products
read* (`plane`, `scale_leaf`, `offset_leaf`) is computed from whatever is stored. And the value (`materialize`) is defined
here, once for all formats.
"""

import contextlib
import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, get_origin, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import _sharding
from ._array import QuantizedArray
from ._compat import promote_types
from ._exporting import exportable
from .coding import Coding
from .tiles import (
    BlockSize,
    broadcastable,
    check_scale,
    combine,
    common_block_size,
    each_along,
    Leaf,
    Packing,
    packing_of,
    payload_leaf,
    Role,
    rounded,
    scale_leaf,
    Tile,
    Unaligned,
)


_Scaled = TypeVar("_Scaled", bound="AbstractScaledArray")


class StoredFactor(eqx.Module):
    """A factor or summand that is itself stored in codes: what a format holds in place of an array of floats.

    Its arrays have the rank of the logical array, as all stored leaves have; those of `"codes"` have the blocks that
    the format says.
    """

    is_grouped: ClassVar[bool] = False
    """Whether the numbers are quantized in groups of their own: such an array cannot always be cut as its numbers are."""
    description_version: ClassVar[int] = 1
    """As that of an array."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        exportable(cls)

    def leaves(self, shape: tuple[int, ...], block_size: BlockSize) -> dict[str, Leaf]:
        """Its stored leaves. Raises `Unaligned` if it cannot be cut as the logical array is."""
        raise NotImplementedError

    def with_leaves(self, leaves: dict[str, Leaf]) -> "StoredFactor":
        """The same of these leaves."""
        raise NotImplementedError

    def decoded(self, shape: tuple[int, ...], block_size: BlockSize) -> Leaf:
        """The numbers in floating point."""
        raise NotImplementedError


class CodedScale(StoredFactor):
    """Numbers for blocks, stored in codes: in 8 bits of floating point (NVFP4, MXFP4), or as small integers."""

    codes: Array
    """One code for each block."""
    coding: Coding = eqx.field(static=True)
    """What a code stands for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.codes.ndim

    def materialize(self) -> Array:
        """The numbers in float32."""
        return self.coding.value(self.codes, jnp.float32)

    def leaves(self, shape: tuple[int, ...], block_size: BlockSize) -> dict[str, Leaf]:
        return {"codes": scale_leaf(self.codes, shape, block_size)}

    def with_leaves(self, leaves: dict[str, Leaf]) -> "CodedScale":
        return CodedScale(leaves["codes"].array, self.coding)

    def decoded(self, shape: tuple[int, ...], block_size: BlockSize) -> Leaf:
        return scale_leaf(self.materialize(), shape, block_size)


class AbstractScaledArray(QuantizedArray):
    r"""A quantized array $x = s \circ v + m$: values $v$ from a small set, times a scale $s$, plus an offset $m$, both
    constant on tiles.

    A format gives its fields and says what each stored one is: the codes (`payload`), a factor of the scale
    (`factors`), or a summand of the offset (`summands`); and what the codes stand for (`coding`). Every stored leaf has
    the rank of the logical array, and each of its axes covers the matching logical axis in equal tiles. From that alone
    follow values, products, transposition, slicing, broadcasting, `vmap`, `scan` and sharding, for every format.
    """

    payload: eqx.AbstractClassVar[str]
    """The name of the field that holds the codes."""
    coding: eqx.AbstractVar[Coding]
    """What the codes stand for, and how they lie in stored numbers."""
    packing: eqx.AbstractVar[Packing | None]
    """How the payload holds several elements in one stored number; None if it does not."""
    block_size: eqx.AbstractVar[BlockSize]
    """How many elements share a stored factor or summand along an axis that has several; None if no axis has. One
    with blocks of another size has a field of its own for that: `<name>_block_size`."""
    casts: eqx.AbstractVar[tuple[np.dtype, ...]]
    """The dtypes that the values were rounded to before they were cast to `dtype`."""

    high_payload: ClassVar[str | None] = None
    """The name of a second field of codes: it holds the high bits of each (`Coding.high_bits`)."""
    factors: ClassVar[tuple[str, ...]] = ("scale",)
    """The fields whose product is the scale."""
    summands: ClassVar[tuple[str, ...]] = ()
    """The fields whose sum is the offset."""
    multiplied: ClassVar[tuple[str, ...] | None] = None
    """The fields that are multiplied when the array is: by default the first factor, and all summands."""
    activations: ClassVar[str] = "float"
    """`"int8"` if what this is multiplied with is rounded to 8 bits, too."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("materialize", "values"):
            if name in cls.__dict__:
                raise TypeError(
                    f"{cls.__name__}.{name}: the value of a scaled array is its scale times its values plus its "
                    "offset, and products rely on that. Give it a `coding`, or override `plane`, `scale_leaf` or "
                    "`offset_leaf`; or derive from eqquant.QuantizedArray."
                )
        if {"scale_leaf", "offset_leaf"} & {*cls.__dict__} and cls.multiplied is None:
            raise TypeError(
                f"{cls.__name__} computes what products read in a way of its own. Say which of its fields are multiplied "
                "when the array is, so that 2 * x is right: multiplied: ClassVar[tuple[str, ...]] = (...)."
            )
        if "payload" not in cls.__dict__:
            return
        read = {cls.payload, cls.high_payload, *cls.factors, *cls.summands}
        if unread := [name for name in _stored_fields(cls) if name not in read]:
            raise TypeError(
                f"{cls.__name__}.{unread[0]} is stored, but nothing reads it. Name it among `factors` (multiplied into "
                "the scale) or `summands` (added to the offset), or as `payload` or `high_payload`; a static fact is "
                "declared with eqx.field(static=True)."
            )

    def __check_init__(self) -> None:
        for name, value, _ in self._numbers():
            if hasattr(value, "shape"):
                check_scale(name, value, self.shape, self._block_size_of(name))

    # ---------------------------------------------------------------------------- values of codes

    @property
    def integers(self) -> bool:
        """Whether all values are integers of at most 8 bits."""
        return self.coding.is_integer

    @property
    def codebook(self) -> tuple[float, ...] | None:
        """The values by their codes; None if they are computed."""
        return self.coding.levels

    def values(self, dtype: Any) -> Array:
        """The values $v$, without scale and offset, as a dense array of `dtype`."""
        self._check_codes()
        if self.packing is None:
            return self.plane(0, dtype)
        return self.packing.merge([self.plane(i, dtype) for i in range(self.packing.elements)])

    def plane(self, i: int, dtype: Any) -> Array:
        """The values $v$ of the elements that lie in place `i` of their stored numbers: an array of the
        shape of the payload."""
        return self.coding.value(self.plane_codes(i), dtype)

    def plane_codes(self, i: int) -> Array:
        """The codes of those elements."""
        packing, stored = self.packing, getattr(self, self.payload)
        codes = self.coding.unpack(stored, i, 1 if packing is None else packing.elements)
        if self.high_payload is None:
            return codes
        stored, wide = getattr(self, self.high_payload), self._packing_of(self.high_payload)
        if packing is None or wide is None:
            high = self.coding.unpack(stored, 0, 1, high=True)
        else:
            # A stored number of the second payload holds `ratio` times as many elements: this plane is as many of its.
            ratio = wide.elements // packing.elements
            places = range(i * ratio, (i + 1) * ratio)
            parts = [
                self.coding.unpack(stored, place, wide.elements, high=True) for place in places
            ]
            in_plane = Tile(packing.tile.stored, wide.tile.stored)
            high = Packing(wide.axis, packing.stored, in_plane).merge(parts)
        return codes | (high.astype(codes.dtype) << self.coding.low_bits)

    def encode(self: _Scaled, array: Any) -> _Scaled:
        """This scale and offset with other codes: those that are nearest to `array`.

        **Arguments:**

        - `array`: of the shape of this one.

        **Raises:** `ValueError` if it has another shape, or holds NaN or infinity (outside tracing).

        !!! example

            ```python
            import jax.numpy as jnp
            import eqquant as eqq

            x = jnp.linspace(-1, 1, 12).reshape(3, 4)
            q = eqq.Array8B.quantize(x)
            assert (q.encode(x).weight == q.weight).all()
            ```
        """
        array = jnp.asarray(array)
        if array.shape != self.shape:
            raise ValueError(
                f"encode(array) takes an array of shape {self.shape}; it was given {array.shape}."
            )
        if not isinstance(array, Tracer) and not bool(jnp.isfinite(array).all()):
            raise ValueError("encode(array) takes finite numbers; this one holds NaN or infinity.")
        return self.with_codes_of(array)

    def with_codes_of(self: _Scaled, array: Array) -> _Scaled:
        """As `encode`, of an array that is known to fit."""
        return self.replace(**_encode(self, array))

    def _encoded(self, values: Array) -> dict[str, Array]:
        """The payloads that hold the codes nearest to these values."""
        codes, changes = self.coding.nearest(values), {}
        for name in self.payloads:
            packing = self._packing_of(name)
            planes = [codes] if packing is None else packing.split(codes)
            changes[name] = self.coding.pack(planes, high=name == self.high_payload)
        return changes

    # ---------------------------------------------------------------------- what products read

    @property
    def scale_leaf(self) -> Leaf | None:
        """The scale that products take: one number for each tile, computed from whatever is stored for it. None if
        all are 1."""
        return self._combined(operator.mul, self.factors)

    @property
    def offset_leaf(self) -> Leaf | None:
        """What is added to the scaled values, likewise. None if nothing is."""
        return self._combined(operator.add, self.summands)

    def _combined(self, function: Callable[..., Array], names: Sequence[str]) -> Leaf | None:
        there = [self.number_leaf(name) for name in names if getattr(self, name) is not None]
        return functools.reduce(functools.partial(combine, function), there) if there else None

    def number_leaf(self, name: str) -> Leaf:
        """One of the stored factors or summands, in float32 (float64 if it is)."""
        value, size = getattr(self, name), self._block_size_of(name)
        if isinstance(value, StoredFactor):
            return value.decoded(self.shape, size)
        wide = promote_types(value.dtype, jnp.float32)
        return scale_leaf(value.astype(wide), self.shape, size)

    # ----------------------------------------------------------------------------- stored leaves

    @property
    def payload_leaf(self) -> Leaf:
        """The payload, with its tiles: the shape of the logical array is derived from it.

        **Raises:** `TypeError` if it has been turned into floating-point numbers.
        """
        self._check_codes()
        return payload_leaf(self.payloads[self.payload], self.packing)

    def _check_codes(self) -> None:
        codes = self.payloads[self.payload]
        if jnp.issubdtype(codes.dtype, jnp.inexact):
            raise TypeError(
                f"The codes of this {type(self).__name__} have dtype {codes.dtype}: was it combined with others leaf by leaf, "
                "as by jax.tree.map(lambda a, b: (a + b) / 2, model, other)? Codes are no numbers. Materialize the models "
                "first (eqquant.materialize), or stop at quantized arrays with is_leaf=eqquant.is_implicit."
            )

    @property
    def payloads(self) -> dict[str, Any]:
        """The stored codes, by the names of their leaves."""
        names = [self.payload] + ([self.high_payload] if self.high_payload else [])
        return {name: getattr(self, name) for name in names}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logical array."""
        return self.payload_leaf.shape

    def _packing_of(self, name: str) -> Packing | None:
        """How this one of the payloads is packed."""
        if name == self.high_payload and self.packing is not None:
            return self.packing.of_high_bits(self.coding.low_bits, self.coding.high_bits)
        return self.packing

    def _block_size_of(self, name: str) -> BlockSize:
        return getattr(self, f"{name}_block_size", self.block_size)

    def _numbers(self) -> Iterator[tuple[str, Any, Role]]:
        """The stored factors and summands that are there."""
        roles: list[tuple[Role, tuple[str, ...]]] = [
            ("factor", self.factors),
            ("summand", self.summands),
        ]
        for role, names in roles:
            for name in names:
                if (value := getattr(self, name)) is not None:
                    yield name, value, role

    def leaves(self) -> dict[str, Leaf]:
        """Every stored leaf, with its tiles, by the name of its field. Raises `Unaligned` if one has none: see
        `forms`."""
        shape = self.shape
        found = {
            name: payload_leaf(array, self._packing_of(name))
            for name, array in self.payloads.items()
        }
        for name, value, role in self._numbers():
            size = self._block_size_of(name)
            if isinstance(value, StoredFactor):
                parts = value.leaves(shape, size).items()
                found |= {f"{name}.{part}": leaf._replace(role=role) for part, leaf in parts}
            else:
                found[name] = scale_leaf(value, shape, size, role)
        return found

    def with_leaves(self: _Scaled, leaves: dict[str, Leaf]) -> _Scaled:
        """An array of these leaves, all else equal. Raises `Unaligned` if this format cannot
        express their tiles."""
        packing = packing_of(leaves[self.payload])
        changes = self._with_payloads({name: leaves[name] for name in self.payloads}, packing)
        numbers: dict[str, Leaf] = {}
        for name, value, _ in self._numbers():
            if isinstance(value, StoredFactor):
                start = f"{name}."
                parts = {k.removeprefix(start): v for k, v in leaves.items() if k.startswith(start)}
                changes[name], numbers[name] = value.with_leaves(parts), parts["codes"]
            else:
                changes[name], numbers[name] = leaves[name].array, leaves[name]
        return self.replace(**changes, **self._facts(numbers, packing))

    def _facts(self, numbers: dict[str, Leaf], packing: Packing | None) -> dict[str, Any]:
        """The static facts that say the tiles of the factors and summands, and of a payload that is packed so. Raises
        `Unaligned` if this format cannot say them."""
        groups: dict[str, list[Leaf]] = {"block_size": []}
        for name, leaf in numbers.items():
            own = f"{name}_block_size"
            groups.setdefault(own if hasattr(self, own) else "block_size", []).append(leaf)
        facts = {name: common_block_size(group) for name, group in groups.items()}
        facts |= {"packing": packing}
        fields = {field.name for field in dataclasses.fields(self)}
        fixed = {name for name in facts if getattr(type(self), name, "") is None} - fields
        if any(facts[name] is not None for name in fixed):
            raise Unaligned  # this format is never packed, or has no scales of blocks
        return {name: value for name, value in facts.items() if name in fields}

    def _with_payloads(self, leaves: dict[str, Leaf], packing: Packing | None) -> dict[str, Any]:
        """The changes of fields that make these leaves the payloads."""
        if self.high_payload is not None:
            expected = packing
            if packing is not None:
                expected = packing.of_high_bits(self.coding.low_bits, self.coding.high_bits)
            if packing_of(leaves[self.high_payload]) != expected:
                raise Unaligned
        return {name: leaf.array for name, leaf in leaves.items()}

    def forms(self: _Scaled) -> Iterator[_Scaled]:
        """This array; and, if it has factors that are quantized in groups of their own, an equal one that has them
        expanded: it can be cut where this one cannot."""
        yield self
        expanded = self.expanded()
        if expanded is not self:
            yield expanded

    def moved(self: _Scaled, move: Callable[[Leaf], Leaf]) -> _Scaled:
        """An array of the moved leaves, in the first of its forms that has them. Raises `Unaligned` if none has."""
        for form in self.forms():
            with contextlib.suppress(Unaligned):
                return form.with_leaves({name: move(leaf) for name, leaf in form.leaves().items()})
        raise Unaligned

    def expanded(self: _Scaled) -> _Scaled:
        """An equal array without factors that are quantized in groups of their own: they are expanded, exactly."""
        there = {name: value for name, value, _ in self._numbers()}
        grouped = [
            name for name, v in there.items() if isinstance(v, StoredFactor) and v.is_grouped
        ]
        if not grouped:
            return self
        numbers = {name: self.number_leaf(name) for name in there}
        try:
            facts = self._facts(numbers, self.packing)
        except Unaligned:  # blocks that the format cannot say: a number for each element
            numbers |= {name: each_along(numbers[name], range(self.ndim)) for name in grouped}
            facts = self._facts(numbers, self.packing)
        return self.replace(**{name: numbers[name].array for name in grouped}, **facts)

    def per_element_along(self, axes: Sequence[int] = (0,)) -> "AbstractScaledArray | None":
        stored = jtu.tree_leaves(self)
        if all(leaf.shape[a : a + 1] == (self.shape[a],) for leaf in stored for a in axes):
            return self
        with contextlib.suppress(Unaligned):
            return self.moved(lambda leaf: each_along(leaf, axes))
        return None

    def filler(self, name: str) -> int | None:
        """A stored number of this payload all of whose elements are 0; None if 0 has no code."""
        elements = 1 if (packing := self._packing_of(name)) is None else packing.elements
        return self.coding.filler(elements, high=name == self.high_payload)

    def with_multiplied(self: _Scaled, change: Callable[[Array], Array]) -> _Scaled | None:
        """This array with what is multiplied when it is (`multiplied`) changed; None if it has no scale to change."""
        names = (*self.factors[:1], *self.summands) if self.multiplied is None else self.multiplied
        there = {name: value for name in names if (value := getattr(self, name)) is not None}
        if not any(name in self.factors for name in there):
            return None
        if any(isinstance(value, StoredFactor) for value in there.values()):
            expanded = self.expanded()
            return None if expanded is self else expanded.with_multiplied(change)
        return self.replace(**{name: change(value) for name, value in there.items()})

    def means_as(self, other: Any) -> bool:
        """Whether equal leaves of the two would mean the same: they have one format, with the same static facts but
        for those that say how leaves are cut."""

        def facts(x: AbstractScaledArray) -> Any:
            cut = ("packing", "block_size")
            static = [f.name for f in dataclasses.fields(x) if f.metadata.get("static", False)]
            kept = {name: getattr(x, name) for name in static if not name.endswith(cut)}
            numbers = {n: (type(v), getattr(v, "coding", None)) for n, v, _ in x._numbers()}
            return kept, {
                n: t if issubclass(t[0], StoredFactor) else None for n, t in numbers.items()
            }

        return type(self) is type(other) and facts(self) == facts(other)

    def replace(self: _Scaled, **changes: Any) -> _Scaled:
        """A copy with some of its fields changed."""
        return dataclasses.replace(self, **changes)

    def with_dtype(self: _Scaled, dtype: np.dtype, casts: tuple[np.dtype, ...]) -> _Scaled:
        """An array of the same leaves with another logical dtype (see `cast`)."""
        return self.replace(dtype=dtype, casts=casts)

    def materialize(self) -> Array:
        """The dense array of `shape` and `dtype`: the values times the scale plus the offset, computed in float32
        (float64 if `dtype` is) with each of the two rounded, then rounded to `dtype`."""
        return _materialize(self)

    @property
    def compute_dtype(self) -> np.dtype:
        """What `materialize` computes in before it rounds."""
        dtypes = {self.dtype, *(jnp.dtype(leaf.dtype) for leaf in jtu.tree_leaves(self))}
        return jnp.dtype(jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32)

    # ------------------------------------------------------------------------------- sharding

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """How the payload is laid out over devices; None under tracing."""
        payload = self.payload_leaf.array
        return None if isinstance(payload, Tracer) else payload.sharding

    @property
    def is_sharded(self) -> bool:
        """Whether the leaves lie on more than one device."""
        return self.sharding is not None and len(self.sharding.device_set) > 1

    def with_sharding(self: _Scaled, sharding: NamedSharding | PartitionSpec | None) -> _Scaled:
        """This array with payload and scale split together over devices.

        **Arguments:**

        - `sharding`: for the axes of the *logical* array. A `PartitionSpec` refers to the current
            mesh (`jax.set_mesh`); None leaves the array as it is. Under tracing it is a
            constraint, otherwise the leaves are moved.

        **Raises:** `ValueError` if an axis cannot be split so: it names axis, tile and mesh.
        """
        if sharding is None:
            return self
        placed = {
            id(leaf.array): _sharding.place(leaf, name, sharding)
            for name, leaf in self.leaves().items()
        }
        return jtu.tree_map(lambda array: placed[id(array)], self)

    def reshard(self: _Scaled, sharding: NamedSharding | PartitionSpec | None) -> _Scaled:
        """Alias of `with_sharding`."""
        return self.with_sharding(sharding)

    def with_mesh_and_axis(
        self: _Scaled, mesh_and_axis: tuple[Mesh, PartitionSpec | Sequence[Any] | str | None]
    ) -> _Scaled:
        """`with_sharding` from a mesh and a spec: None (replicated), a `PartitionSpec`, a
        sequence of axis names, or one name (for the first axis)."""
        mesh, axis = mesh_and_axis
        return self.with_sharding(NamedSharding(mesh, _sharding.as_spec(axis)))


def _stored_fields(cls: type) -> list[str]:
    """The fields that a class declares that are neither static nor variables of the class."""
    found = []
    for name, hint in inspect.get_annotations(cls).items():
        default = cls.__dict__.get(name)
        static = isinstance(default, dataclasses.Field) and default.metadata.get("static", False)
        text = hint if isinstance(hint, str) else ""
        variable = (
            get_origin(hint) is ClassVar
            or hint is ClassVar
            or text.startswith(("ClassVar", "typing.ClassVar"))
        )
        if not static and not variable:
            found.append(name)
    return found


def _decode(array: AbstractScaledArray) -> Array:
    x = array.values(array.compute_dtype)
    if (scale := array.scale_leaf) is not None:
        x = x * broadcastable(scale).astype(x.dtype)
    if (offset := array.offset_leaf) is not None:
        x = rounded(x) + broadcastable(offset).astype(x.dtype)
    for dtype in (*array.casts, array.dtype):
        x = x.astype(dtype)
    return x


@jax.jit
def _encode(array: AbstractScaledArray, x: Array) -> dict[str, Any]:
    x = x.astype(array.compute_dtype)
    if (offset := array.offset_leaf) is not None:
        x = x - broadcastable(offset).astype(x.dtype)
    if (scale := array.scale_leaf) is not None:
        scales = broadcastable(scale).astype(x.dtype)
        x = jnp.where(scales == 0, 0, x / jnp.where(scales == 0, 1, scales))
    return array._encoded(x)


def _materialize(array: AbstractScaledArray) -> Array:
    # One fused pass when called by itself; part of the surrounding program under tracing.
    if any(isinstance(leaf, Tracer) for leaf in jtu.tree_leaves(array)):
        return _decode(array)
    return _decode_in_one_pass(array)


_decode_in_one_pass = jax.jit(_decode)


def cast(array: AbstractScaledArray, dtype: Any) -> tuple[np.dtype, tuple[np.dtype, ...]]:
    """The `dtype` and `casts` of `array` cast to a floating-point `dtype`, value for value."""
    chain = [array.compute_dtype, *array.casts, array.dtype, jnp.dtype(dtype)]
    for i in range(len(chain) - 2, 0, -1):  # a cast that lost nothing need not be remembered
        if promote_types(chain[i - 1], chain[i]) == chain[i]:
            del chain[i]
    return chain[-1], tuple(chain[1:-1])
