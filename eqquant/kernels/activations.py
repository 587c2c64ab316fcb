"""Rounding what a quantized weight is multiplied with: a property of the call, not of the weight alone."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._compat import promote_types
from .._scaled import AbstractScaledArray
from ..rounding import largest_magnitude
from .matmul.axes import Axes
from .matmul.product import DIGITS


class Int8Blocks(NamedTuple):
    """Activations are rounded to 8 bits, and every `size` of those that are summed up share a scale."""

    size: int


def rounded(x: Array, w: AbstractScaledArray, axes: Axes, activations: Any) -> tuple[Array, int]:
    """`x` as it is multiplied with `w`, and how many 8-bit digits say all of it (see `Product`)."""
    in_blocks = isinstance(activations, Int8Blocks)
    if activations not in ("float", "int8") and not (in_blocks and activations.size > 0):
        raise ValueError(
            f"activations must be 'float', 'int8' or Int8Blocks(size) of a positive size; it is {activations!r}."
        )
    if activations == "float" or not w.integers:
        return x, DIGITS
    if not in_blocks:
        return rounded_rows(x, axes.x_contract), 1
    if len(axes.x_contract) != 1:
        raise ValueError(
            f"activations={activations!r} takes sums along a single axis; this one is along the axes "
            f"{axes.x_contract} of the activations, of shape {x.shape}. Leave them to activations='int8'."
        )
    (axis,), size = axes.x_contract, activations.size
    before, length, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    padded = jnp.pad(x, [(0, -length % size * (i == axis)) for i in range(x.ndim)])
    blocks = rounded_rows(padded.reshape(*before, -(-length // size), size, *after), (axis + 1,))
    return lax.slice_in_dim(blocks.reshape(padded.shape), 0, length, axis=axis), DIGITS


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def rounded_rows(x: Array, axes: tuple[int, ...]) -> Array:
    """`x` rounded to 8 bits: the numbers along `axes` to integers times their largest magnitude over 127.
    Its derivative is the identity."""
    wide = x.astype(promote_types(x.dtype, jnp.float32))
    scaled, unit = scaled_to_int8(wide, axes)
    # Rounding to the dtype of `x` may move a number, but not to where another integer is nearest.
    rounded = jnp.where(jnp.isinf(unit), jnp.where(jnp.isinf(x), wide, 0), jnp.round(scaled) * unit)
    return rounded.astype(x.dtype)


@rounded_rows.defjvp
def _rounded_rows_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    return rounded_rows(*primals, axes), tangents[0]


def scaled_to_int8(x: Array, axes: Sequence[int]) -> tuple[Array, Array]:
    """`x` over a 127th of its largest magnitude along `axes`, and that: the unit of its digits."""
    largest = largest_magnitude(x, tuple(axes))
    unit = jnp.maximum(largest / 127, jnp.finfo(x.dtype).tiny)
    # Infinite inputs are the only ones that count in their row.
    return jnp.where(jnp.isinf(x), jnp.sign(x) * 127, x / unit), unit
