"""A weight with a low-rank adapter: base and factors are kept apart."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ._array import QuantizedArray
from ._compat import promote_types
from ._implicit_array import as_dense, ImplicitArray, without_views


class AdaptedArray(QuantizedArray):
    r"""A weight with a low-rank adapter: $W + \alpha\, B A$.

    Made by [`lora.add`][eqquant.lora.add]. It is used as any quantized array; a product takes three:
    with the base, and with each factor.

    The kernel of a convolution is a matrix of `out` rows, each of which holds its inputs at all points of the window:
    $A$ is a kernel with `rank` outputs, and $B$ mixes these. All groups of a convolution share $A$.
    """

    base: Array | ImplicitArray
    """$W$, of shape (..., out, in), or (..., out, in, *window). Dense or quantized. Not trained."""
    a: Float[Array, "..."]
    """$A$, of shape (..., rank, in) or (..., rank, in, *window). Random at first."""
    b: Float[Array, "... out rank"]
    """$B$. Zero at first."""
    scale: float = eqx.field(static=True)
    r"""$\alpha$: `alpha / rank`, or `alpha / sqrt(rank)` (rank-stabilized)."""
    dropout_rate: float = eqx.field(static=True)
    """The share of inputs that [`lora.dropout`][eqquant.lora.dropout] hides from the adapter."""
    casts: tuple[np.dtype, ...] = eqx.field(static=True, default=())
    """The dtypes that the weight was cast to, one after another; the last is its own."""
    window_axes: int = eqx.field(static=True, default=0)
    """How many axes follow `in`: those of the window, if this is the kernel of a convolution."""

    trained: ClassVar[tuple[str, ...]] = ("a", "b")

    def __check_init__(self) -> None:
        shape = self.base.shape
        fits = 0 <= self.window_axes <= len(shape) - 2 and self.a.ndim == len(shape)
        if fits:
            *batch, out = shape[: self.out_axis + 1]
            inner = shape[self.out_axis + 1 :]
            fits = self.a.shape == (*batch, self.rank, *inner)
            fits = fits and self.b.shape == (*batch, out, self.rank)
        if not fits:
            window = ", *window" if self.window_axes else ""
            raise ValueError(
                f"The factors of a weight of shape {shape}, (..., out, in{window}) with window_axes={self.window_axes}, must "
                f"have the shapes (..., rank, in{window}) and (..., out, rank); they have {self.a.shape} and {self.b.shape}."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the weight."""
        return self.casts[-1] if self.casts else self.base.dtype

    @property
    def out_axis(self) -> int:
        """Which axis counts the rows of the matrix; those before it count matrices, those after it what a row holds."""
        return len(self.base.shape) - 2 - self.window_axes

    @property
    def rank(self) -> int:
        """The number of rows of $A$."""
        return self.a.shape[self.out_axis]

    def materialize(self) -> Array:
        """$W + \\alpha B A$, summed in float32 (float64 if a part is), then cast as `casts` says."""
        wide = promote_types(self.base.dtype, self.a.dtype, jnp.float32)
        inner = self.a.shape[self.out_axis + 1 :]
        rows = self.a.reshape(*self.a.shape[: self.out_axis + 1], math.prod(inner))
        product = self.b.astype(wide) @ rows.astype(wide)
        return self.summed(self.base, product.reshape(self.shape))

    def summed(self, base: Any, product: Array) -> Array:
        """Some elements of the weight: these of the base, and of $B A$."""
        wide = promote_types(self.base.dtype, product.dtype, jnp.float32)
        weight = as_dense(base).astype(wide) + self.scale * product.astype(wide)
        for dtype in (self.base.dtype, *self.casts):
            weight = weight.astype(dtype)
        return weight

    def without_views(self) -> "AdaptedArray":
        base = without_views(self.base)
        return self if base is self.base else self.replace(base=base)

    def per_element_along(self, axes: Sequence[int] = (0,)) -> "AdaptedArray | None":
        base = (
            self.base.per_element_along(axes) if isinstance(self.base, ImplicitArray) else self.base
        )
        inside = all(axis < self.out_axis for axis in axes)
        return self.replace(base=base) if inside and base is not None else None

    def replace(self, **changes: Any) -> "AdaptedArray":
        """A copy with some of its fields changed."""
        return dataclasses.replace(self, **changes)

    # What holds for each axis of the weight, for those of a factor: one axis of it counts ranks.

    def for_a(self, of_axes: Sequence[Any], of_rank: Any) -> list[Any]:
        """What `of_axes` says of the axes of the weight, for the axes of $A$."""
        return [*of_axes[: self.out_axis], of_rank, *of_axes[self.out_axis + 1 :]]

    def for_b(self, of_axes: Sequence[Any], of_rank: Any) -> list[Any]:
        """The same for the axes of $B$."""
        return [*of_axes[: self.out_axis + 1], of_rank]
