"""What a product with a quantized weight means, up to an offset, which is added for all implementations in one place."""

from typing import Any

from jax import Array, lax

from ..._scaled import AbstractScaledArray
from ...tiles import broadcastable
from .product import Product, Target


def compute(product: Product, target: Target) -> Array:
    """`lax.dot_general` with the scaled values of `w`."""
    accumulate = product.accumulate
    return lax.dot_general(
        product.x.astype(accumulate),
        scaled_values(product.w, accumulate),
        product.axes.dimension_numbers,
        precision=product.precision,
        preferred_element_type=accumulate,
    )


def scaled_values(w: AbstractScaledArray, dtype: Any) -> Array:
    """The values of `w` times its scale, computed in `dtype`."""
    values, scale = w.values(dtype), w.scale_leaf
    return values if scale is None else values * broadcastable(scale).astype(dtype)


def dense(w: AbstractScaledArray, dtype: Any) -> Array:
    """As `w.materialize()`, but computed in `dtype` and not rounded."""
    values, offset = scaled_values(w, dtype), w.offset_leaf
    return values if offset is None else values + broadcastable(offset).astype(dtype)
