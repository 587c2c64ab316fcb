"""Quantized arrays whose leaves are stored in another order than that of their axes."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import _sharding, tiles
from ._array import QuantizedArray
from ._implicit_array import ImplicitArray
from ._scaled import AbstractScaledArray


class TransposedView(ImplicitArray):
    """A quantized array seen with its axes permuted, while a function is being evaluated.

    `dot_general` reads the stored order directly; every other rule, and the caller of `implicit`,
    gets the leaves transposed.
    """

    array: AbstractScaledArray
    permutation: tuple[int, ...] = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape[axis] for axis in self.permutation)

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def without_views(self) -> AbstractScaledArray:
        return self.array.moved(lambda leaf: tiles.transpose(leaf, self.permutation))

    def materialize(self) -> Array:
        return lax.transpose(self.array.materialize(), self.permutation)


class ColumnMajor(QuantizedArray):
    """A quantized matrix, or a stack of them, stored column by column: as its transpose.

    Made by [`column_major`][eqquant.column_major]. Products, casts and transposition read the stored order;
    every other operation takes the leaves transposed, and so gives what it gives for the array in row-major
    order.
    """

    stored: AbstractScaledArray
    """The array with its last two axes exchanged; packed along the last but one."""

    @property
    def view(self) -> TransposedView:
        """The matrix, seen in what is stored."""
        return TransposedView(self.stored, _exchanged(self.stored.ndim))  # pyright: ignore[reportCallIssue]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logical array."""
        return self.view.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the logical array."""
        return self.stored.dtype

    def materialize(self) -> Array:
        """The dense array of `shape` and `dtype`."""
        return self.view.materialize()

    def in_row_major(self) -> AbstractScaledArray:
        return self.view.without_views()

    def encode(self, array: Any) -> "ColumnMajor":
        """As [`AbstractScaledArray.encode`][eqquant.AbstractScaledArray.encode]."""
        return ColumnMajor(self.stored.encode(jnp.asarray(array).mT))  # pyright: ignore[reportCallIssue]

    def per_element_along(self, axes: Sequence[int] = (0,)) -> "QuantizedArray | None":
        if any(axis >= self.ndim - 2 for axis in axes):
            return self.in_row_major().per_element_along(axes)
        stored = self.stored.per_element_along(axes)
        return None if stored is None else ColumnMajor(stored)  # pyright: ignore[reportCallIssue]

    @property
    def sharding(self) -> jax.sharding.Sharding | None:
        """How the stored payload is laid out over devices; None under tracing."""
        return self.stored.sharding

    @property
    def is_sharded(self) -> bool:
        """Whether the leaves lie on more than one device."""
        return self.stored.is_sharded

    def with_sharding(self, sharding: NamedSharding | PartitionSpec | None) -> "ColumnMajor":
        """As [`AbstractScaledArray.with_sharding`][eqquant.AbstractScaledArray.with_sharding], for the axes of
        the logical array."""
        if sharding is not None:
            named = isinstance(sharding, NamedSharding)
            spec = list(sharding.spec if named else sharding)
            spec += [None] * (self.ndim - len(spec))
            spec = PartitionSpec(*(spec[axis] for axis in _exchanged(self.ndim)))
            sharding = NamedSharding(sharding.mesh, spec) if named else spec
        return ColumnMajor(self.stored.with_sharding(sharding))  # pyright: ignore[reportCallIssue]

    def reshard(self, sharding: NamedSharding | PartitionSpec | None) -> "ColumnMajor":
        """Alias of `with_sharding`."""
        return self.with_sharding(sharding)

    def with_mesh_and_axis(
        self, mesh_and_axis: tuple[Mesh, PartitionSpec | Sequence[Any] | str | None]
    ) -> "ColumnMajor":
        """`with_sharding` from a mesh and a spec."""
        mesh, axis = mesh_and_axis
        return self.with_sharding(NamedSharding(mesh, _sharding.as_spec(axis)))


def _exchanged(ndim: int) -> tuple[int, ...]:
    return (*range(ndim - 2), ndim - 1, ndim - 2)


def column_major(array: AbstractScaledArray) -> ColumnMajor:
    """Stores a packed weight column by column, for products with one vector at a time on CPU.

    A product with a vector then takes one look-up in a table for each stored byte, instead of decoding all
    weights. It is the same array: every operation gives the same values. With many vectors at a time, row-major
    order is as fast or faster.

    **Arguments:**

    - `array`: a quantized array of two or more axes, packed along its last one, as
        [`Array1B.quantize`][eqquant.Array1B.quantize] and [`ArrayNF4.quantize`][eqquant.ArrayNF4.quantize]
        make from the weight of an `eqx.nn.Linear`.

    **Returns:** a [`ColumnMajor`][eqquant.ColumnMajor] of the same values. Scales that are quantized themselves
    (`ArrayNF4` with `double=True`) stay so where groups of 256 are whole rows or equal parts of a row; else they are
    expanded.

    **Raises:** `TypeError` if `array` is not packed so.

    !!! example

        ```python
        import equinox as eqx, jax, jax.numpy as jnp
        import eqquant as eqq

        model = eqx.nn.MLP(64, 8, 512, 2, key=jax.random.key(0))
        rows = eqq.quantize(model, eqq.Array1B.quantize)
        columns = eqq.quantize(model, lambda w: eqq.column_major(eqq.Array1B.quantize(w)))
        x = jnp.ones(64)
        assert jnp.allclose(rows(x), columns(x), atol=1e-5)
        ```
    """
    packing = array.packing if isinstance(array, AbstractScaledArray) else None
    if packing is None or packing.axis != -1 or array.ndim < 2:
        raise TypeError(
            "column_major(array) needs a quantized array of two or more axes that is packed along its last "
            f"one, such as Array1B.quantize(w) or ArrayNF4.quantize(w); it was given {array!r}."
        )
    return ColumnMajor(TransposedView(array, _exchanged(array.ndim)).without_views())  # pyright: ignore[reportCallIssue]
