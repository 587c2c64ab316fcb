"""What stands for an array: a shape, a dtype, and how to make it dense."""

from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import numpy as np
from jax import Array
from jax.core import Tracer

from ._exporting import exportable


class ImplicitArray(eqx.Module):
    """A pytree that stands for an array: the type that rules are dispatched on.

    It has a logical `shape` and `dtype`, and `materialize()` defines its value. Everything else
    about it is an optimization. [`QuantizedArray`][eqquant.QuantizedArray] adds the behaviour of
    an array: operators, indexing, sizes.
    """

    warn_on_materialize: ClassVar[bool] = True
    """Whether an operation that has no rule for this class warns before it materializes."""
    trained: ClassVar[tuple[str, ...]] = ()
    """The fields that [`trainable`][eqquant.trainable] selects."""
    description_version: ClassVar[int] = 1
    """What [`describe`][eqquant.describe] gives as `"version"`: raise it when equal leaves and facts come to mean
    something else."""

    shape: eqx.AbstractVar[tuple[int, ...]]
    """The shape of the array this stands for."""
    dtype: eqx.AbstractVar[np.dtype]
    """The dtype of the array this stands for."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        exportable(cls)

    def materialize(self) -> Array:
        """The dense array of `shape` and `dtype` that this stands for."""
        raise NotImplementedError(f"{type(self).__name__}.materialize is missing")

    def without_views(self) -> "ImplicitArray":
        """This array with any pending transposition applied."""
        return self

    def in_row_major(self) -> "ImplicitArray":
        """This array in row-major order, the form that every rule of the family takes."""
        return self.without_views()

    def per_element_along(self, axes: Sequence[int] = (0,)) -> "ImplicitArray | None":
        """This array with every leaf as long as it is along `axes`, so that it can be cut or joined
        there as a pytree; None if it has no such form."""
        return None


def without_views(x: Any) -> Any:
    """`x` with any pending transposition applied."""
    return x.without_views() if isinstance(x, ImplicitArray) else x


def in_row_major(x: Any) -> Any:
    """`x` in row-major order, if it is an implicit array."""
    return x.in_row_major() if isinstance(x, ImplicitArray) else x


def as_dense(x: Any) -> Any:
    """`x`, materialized if it is an implicit array."""
    return x.materialize() if isinstance(x, ImplicitArray) else x


def safe_materialize(arr: Any) -> tuple[Any, bool]:
    """`arr` as a dense array, and whether it had to be materialized.

    !!! example

        ```python
        import jax.numpy as jnp
        import eqquant as eqq

        q = eqq.Array8B.quantize(jnp.ones((4, 8)))
        dense, materialized = eqq.safe_materialize(q)
        assert materialized and dense.shape == (4, 8)
        ```
    """
    return (arr.materialize(), True) if isinstance(arr, ImplicitArray) else (arr, False)


def safe_delete(arr: Any, materialized: bool) -> None:
    """Frees the buffer of `arr` if it is the temporary that
    [`safe_materialize`][eqquant.safe_materialize] made (`materialized`), and only then. Does
    nothing under tracing.

    !!! example

        ```python
        import jax.numpy as jnp
        import eqquant as eqq

        dense, materialized = eqq.safe_materialize(eqq.Array8B.quantize(jnp.ones((4, 8))))
        total = dense.sum()
        eqq.safe_delete(dense, materialized)
        ```
    """
    if materialized and isinstance(arr, Array) and not isinstance(arr, Tracer):
        arr.delete()
