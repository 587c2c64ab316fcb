"""What a quantized array means: a logical array, its stored leaves, and how to make it dense."""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from . import _sharding
from ._daylight import report_materialized
from ._implicit import implicit
from ._implicit_array import ImplicitArray
from .tiles import (
    EACH,
    Leaf,
    Packing,
    packing_of,
    payload_leaf,
    scale_block_size,
    scale_leaf,
    spread,
    Unaligned,
)


_Scaled = TypeVar("_Scaled", bound="AbstractScaledArray")


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: "QuantizedArray", *others: Any) -> Any:
        if not all(map(_is_operand, others)):
            return NotImplemented
        return implicit(function)(self, *others)

    return method


def _reflected(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: "QuantizedArray", other: Any) -> Any:
        if not (_is_operand(other) and self.commute_ops):
            return NotImplemented
        return implicit(function)(other, self)

    return method


def _is_operand(x: Any) -> bool:
    return isinstance(
        x, (bool, int, float, complex, Array, np.ndarray, np.generic, ImplicitArray)
    ) or hasattr(x, "__jax_array__")


class QuantizedArray(ImplicitArray):
    """An array whose values are stored in few bits.

    It is used in place of a `jax.Array`: the operators, indexing and array methods below go
    through the same rules as [`implicit`][eqquant.implicit] and keep the packed form where it can
    be kept. `jax.numpy` functions accept it too, but JAX makes it dense first, with a
    [`MaterializeWarning`][eqquant.MaterializeWarning]; call them inside `implicit` instead.

    Only [`materialize`][eqquant.QuantizedArray.materialize], `shape` and `dtype` are abstract.
    """

    commute_ops: ClassVar[bool] = True
    """Whether Python operators with a quantized array on the right (`2 * q`) are served."""

    # NumPy leaves `numpy_array @ q` to us.
    __array_priority__: ClassVar[int] = 1000

    # ------------------------------------------------------------------------------ sizes

    @property
    def ndim(self) -> int:
        """The number of axes of the logical array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the logical array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored leaves."""
        return sum(map(leaf_nbytes, jtu.tree_leaves(self)))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales and padding included, for each logical element."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    def __repr__(self) -> str:
        try:
            leaves = ", ".join(
                f"{jtu.keystr(path, simple=True)}={leaf.dtype}[{','.join(map(str, leaf.shape))}]"
                for path, leaf in jtu.tree_leaves_with_path(self)
            )
            shape = ",".join(map(str, self.shape))
            bits = f"{self.bits_per_weight:.4g} bits/weight"
            return f"{type(self).__name__}({self.dtype}[{shape}], {bits}, {leaves})"
        except (AttributeError, TypeError, IndexError):  # leaves replaced by None, masks, …
            return eqx.tree_pformat(self)

    # ------------------------------------------------------------------------- dense forms

    def dequantize(self) -> Array:
        """Alias of `materialize`."""
        return self.materialize()

    def __jax_array__(self) -> Array:
        report_materialized(
            "__jax_array__", [self], "A jax.numpy function outside eqquant.implicit"
        )
        return self.materialize()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("A quantized array has no dense buffer: np.asarray(q) must copy.")
        return np.asarray(self.materialize(), dtype)

    def delete(self) -> None:
        """Frees the buffers of the stored leaves now. Does nothing under tracing."""
        for leaf in jtu.tree_leaves(self):
            if isinstance(leaf, Array) and not isinstance(leaf, Tracer):
                leaf.delete()

    # ---------------------------------------------------------------------------- operators

    __add__, __radd__ = _operator(operator.add), _reflected(operator.add)
    __sub__, __rsub__ = _operator(operator.sub), _reflected(operator.sub)
    __mul__, __rmul__ = _operator(operator.mul), _reflected(operator.mul)
    __truediv__, __rtruediv__ = _operator(operator.truediv), _reflected(operator.truediv)
    __floordiv__, __rfloordiv__ = _operator(operator.floordiv), _reflected(operator.floordiv)
    __mod__, __rmod__ = _operator(operator.mod), _reflected(operator.mod)
    __divmod__, __rdivmod__ = _operator(divmod), _reflected(divmod)
    __pow__, __rpow__ = _operator(operator.pow), _reflected(operator.pow)
    __matmul__, __rmatmul__ = _operator(operator.matmul), _reflected(operator.matmul)
    __neg__, __pos__, __abs__ = _operator(operator.neg), _operator(operator.pos), _operator(abs)
    __round__ = _operator(jnp.round)
    __lt__, __le__ = _operator(operator.lt), _operator(operator.le)
    __gt__, __ge__ = _operator(operator.gt), _operator(operator.ge)
    __eq__ = _operator(operator.eq)  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    __ne__ = _operator(operator.ne)  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __hash__(self) -> int:
        return id(self)

    def __getitem__(self, index: Any) -> Any:
        return implicit(lambda x: x[index])(self)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d quantized array.")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self.materialize())

    def __float__(self) -> float:
        return float(self.materialize())

    def __int__(self) -> int:
        return int(self.materialize())

    def __complex__(self) -> complex:
        return complex(self.materialize())

    # ------------------------------------------------------------------------- array methods

    @property
    def T(self) -> Any:
        """The logical array with its axes in reverse order."""
        return implicit(lambda x: x.T)(self)

    @property
    def mT(self) -> Any:
        """The logical array with its last two axes exchanged."""
        return implicit(lambda x: x.mT)(self)

    @property
    def at(self) -> Any:
        """`jax.Array.at` of the dense array: updated elements have no packed form."""
        report_materialized("at", [self])
        return self.materialize().at

    def reshape(self, *shape: Any, **kwargs: Any) -> Any:
        """As `jax.Array.reshape`; stays packed where tiles stay whole."""
        return implicit(lambda x: x.reshape(*shape, **kwargs))(self)

    def ravel(self) -> Any:
        """As `jax.Array.ravel`."""
        return self.reshape(-1)

    def squeeze(self, axis: Any = None) -> Any:
        """As `jax.Array.squeeze`."""
        return implicit(lambda x: x.squeeze(axis))(self)

    def transpose(self, *axes: Any) -> Any:
        """As `jax.Array.transpose`; always stays packed."""
        return implicit(lambda x: x.transpose(*axes))(self)

    def swapaxes(self, axis1: int, axis2: int) -> Any:
        """As `jax.Array.swapaxes`; always stays packed."""
        return implicit(lambda x: x.swapaxes(axis1, axis2))(self)

    def astype(self, dtype: Any) -> Any:
        """As `jax.Array.astype`; stays packed for floating-point dtypes."""
        return implicit(lambda x: x.astype(dtype))(self)

    def dot(self, other: Any, **kwargs: Any) -> Any:
        """As `jnp.dot(self, other)`."""
        return implicit(lambda x, y: jnp.dot(x, y, **kwargs))(self, other)

    def sum(self, axis: Any = None, **kwargs: Any) -> Any:
        """As `jax.Array.sum`."""
        return implicit(lambda x: x.sum(axis, **kwargs))(self)

    def mean(self, axis: Any = None, **kwargs: Any) -> Any:
        """As `jax.Array.mean`."""
        return implicit(lambda x: x.mean(axis, **kwargs))(self)

    def max(self, axis: Any = None, **kwargs: Any) -> Any:
        """As `jax.Array.max`."""
        return implicit(lambda x: x.max(axis, **kwargs))(self)

    def min(self, axis: Any = None, **kwargs: Any) -> Any:
        """As `jax.Array.min`."""
        return implicit(lambda x: x.min(axis, **kwargs))(self)


class AbstractScaledArray(QuantizedArray):
    r"""A quantized array $x = s \circ v$: values $v$ from a small set, times a scale $s$ that is
    constant on tiles.

    Every stored leaf has the rank of the logical array, and each of its axes covers the matching
    logical axis in equal tiles. From that alone follow transposition, slicing, broadcasting,
    `vmap`, `scan` and sharding, for every format.

    A format gives its fields, one of them the payload, and one method: `values`, or `plane` if a
    stored number holds several elements.
    """

    payload: eqx.AbstractClassVar[str]
    """The name of the field that holds the codes."""
    packing: eqx.AbstractVar[Packing | None]
    """How the payload holds several elements in one stored number; None if it does not."""
    scale: eqx.AbstractVar[Float[Array, "..."] | None]
    """One number for each tile; None if all are 1."""
    block_size: eqx.AbstractVar[int | None]
    """How many elements share a scale along an axis that has several scales; None if no axis has."""
    via: eqx.AbstractVar[tuple[np.dtype, ...]]
    """The dtypes that the values were rounded to before they were cast to `dtype`."""

    largest: ClassVar[float] = 1.0
    """The largest magnitude among the values."""
    integers: ClassVar[bool] = False
    """Whether all values are integers of at most 8 bits."""
    activations: ClassVar[str] = "float"
    """`"int8"` if what this is multiplied with is rounded to 8 bits, too."""
    has_zero_code: ClassVar[bool] = False
    """Whether a stored code of 0 means the value 0."""
    codebook: ClassVar[tuple[float, ...] | None] = None
    """The sixteen values by their numbers, if a stored byte holds two of those: the first in its high half."""

    def values(self, dtype: Any) -> Array:
        """The values $v$, without scale, as a dense array of `dtype`."""
        if type(self).plane is AbstractScaledArray.plane:
            raise NotImplementedError(f"{type(self).__name__} needs a method `values` or `plane`")
        if self.packing is None:
            return self.plane(0, dtype)
        return self.packing.merge([self.plane(i, dtype) for i in range(self.packing.elements)])

    def plane(self, i: int, dtype: Any) -> Array:
        """The values $v$ of the elements that lie in place `i` of their stored numbers: an array of the
        shape of the payload."""
        values = self.values(dtype)
        return values if self.packing is None else self.packing.split(values)[i]

    @property
    def payload_leaf(self) -> Leaf:
        """The payload, with its tiles: the shape of the logical array is derived from it."""
        return payload_leaf(getattr(self, self.payload), self.packing)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logical array."""
        return self.payload_leaf.shape

    @property
    def scale_leaf(self) -> Leaf | None:
        """The scale that products take: one number for each tile, whatever is stored for it."""
        return None if self.scale is None else scale_leaf(self.scale, self.shape, self.block_size)

    @property
    def offset_leaf(self) -> Leaf | None:
        """What is added to the scaled values: one number for each tile, or None."""
        return None

    def leaves(self) -> dict[str, Leaf]:
        """Every stored leaf, with its tiles: the payload by the name of its field, and `"scale"`."""
        leaf = self.payload_leaf
        leaves = {self.payload: leaf}
        if self.scale is not None:
            leaves["scale"] = scale_leaf(self.scale, leaf.shape, self.block_size)
        return leaves

    def with_leaves(self: _Scaled, leaves: dict[str, Leaf]) -> _Scaled:
        """An array of these leaves, all else equal. Raises `Unaligned` if this format cannot
        express their tiles."""
        payload, scale = leaves[self.payload], leaves.get("scale")
        changes: dict[str, Any] = {self.payload: payload.array, "packing": packing_of(payload)}
        if scale is not None:
            changes |= {"scale": scale.array, "block_size": scale_block_size(scale)}
        names = {field.name for field in dataclasses.fields(self)}
        if any(changes.get(name) is not None for name in changes.keys() - names):
            raise Unaligned  # this format is never packed, or has no scales of blocks
        return self.replace(**{name: value for name, value in changes.items() if name in names})

    def sliceable(self, axes: Sequence[int] = (0,)) -> "AbstractScaledArray | None":
        moved: dict[str, Leaf] = {}
        for name, leaf in self.leaves().items():
            for axis in axes:
                if leaf.array.shape[axis] != self.shape[axis]:
                    if leaf.ordered:
                        return None
                    leaf = leaf.with_axis(axis, spread(leaf, [axis]), EACH, self.shape[axis])
            moved[name] = leaf
        return self.with_leaves(moved)

    def unnested(self: _Scaled) -> _Scaled:
        """This array with every stored leaf of its rank: scales that are quantized themselves are
        expanded, exactly."""
        return self

    def replace(self: _Scaled, **changes: Any) -> _Scaled:
        """A copy with some of its fields changed."""
        return dataclasses.replace(self, **changes)

    def with_dtype(self: _Scaled, dtype: np.dtype, via: tuple[np.dtype, ...]) -> _Scaled:
        """An array of the same leaves with another logical dtype (see `cast`)."""
        return self.replace(dtype=dtype, via=via)

    def materialize(self) -> Array:
        """The dense array of `shape` and `dtype`: the values times the scale, computed in float32
        (float64 if `dtype` is), then rounded to `dtype`."""
        return _materialize(self)

    @property
    def compute_dtype(self) -> np.dtype:
        """What `materialize` computes in before it rounds."""
        scale = jnp.float32 if self.scale is None else self.scale.dtype
        return jnp.promote_types(jnp.promote_types(scale, jnp.float32), _float64_or_32(self.dtype))

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


def _decode(array: AbstractScaledArray) -> Array:
    x = array.values(array.compute_dtype)
    if array.scale is not None:
        x = x * spread(array.scale_leaf).astype(x.dtype)
    for dtype in (*array.via, array.dtype):
        x = x.astype(dtype)
    return x


def _materialize(array: AbstractScaledArray) -> Array:
    # One fused pass when called by itself; part of the surrounding program under tracing.
    if any(isinstance(leaf, Tracer) for leaf in jtu.tree_leaves(array)):
        return _decode(array)
    return _decode_in_one_pass(array)


_decode_in_one_pass = jax.jit(_decode)


def _float64_or_32(dtype: np.dtype) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def cast(array: AbstractScaledArray, dtype: Any) -> tuple[np.dtype, tuple[np.dtype, ...]]:
    """The `dtype` and `via` of `array` cast to a floating-point `dtype`, value for value."""
    chain = [array.compute_dtype, *array.via, array.dtype, jnp.dtype(dtype)]
    for i in range(len(chain) - 2, 0, -1):  # a cast that lost nothing need not be remembered
        if jnp.promote_types(chain[i - 1], chain[i]) == chain[i]:
            del chain[i]
    return chain[-1], tuple(chain[1:-1])


def leaf_nbytes(leaf: Any) -> int:
    """Bytes of one stored array; sub-byte dtypes count as the bits they are."""
    dtype = jnp.dtype(leaf.dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        bits = jnp.iinfo(dtype).bits
    elif jnp.issubdtype(dtype, jnp.floating):
        bits = jnp.finfo(dtype).bits
    else:
        bits = 8 * dtype.itemsize
    return -(-math.prod(leaf.shape) * bits // 8)
