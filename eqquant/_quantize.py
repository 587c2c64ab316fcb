"""What every `quantize` checks about its arguments, in the same words."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding

from ._array import AbstractScaledArray, QuantizedArray


_Scaled = TypeVar("_Scaled", bound=AbstractScaledArray)


def as_float_array(where: str, array: Any) -> Array:
    """`array` as a JAX array, if it has a floating-point dtype."""
    if isinstance(array, QuantizedArray):
        raise TypeError(
            f"{where} takes a dense array; it was given {array!r}. Materialize it first."
        )
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        raise TypeError(f"{where} takes an array; it was given {array!r}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{where} takes a floating-point array; it was given {array.dtype}"
            f"{list(array.shape)}. Cast it first: array.astype(jnp.float32)."
        )
    with np.errstate(over="ignore"):  # float64 beyond float32: found as infinite later
        return jnp.asarray(array)


def check_dtype(where: str, dtype: Any) -> np.dtype:
    """`dtype` as a floating-point NumPy dtype of at least 16 bits."""
    found = jnp.dtype(dtype)
    if not jnp.issubdtype(found, jnp.floating) or found.itemsize < 2:
        raise TypeError(
            f"{where} must be float16, bfloat16, float32 or float64; it was given {found}."
        )
    return found


def normalize_axes(where: str, axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """`axis` as sorted non-negative integers without repetition."""
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"{where}: axis {a} is out of range for an array with {ndim} axes.")
    normal = sorted({int(a) % ndim for a in axes})
    if len(normal) != len(axes):
        raise ValueError(f"{where}: axis {axis} names an axis twice.")
    return tuple(normal)


def check_finite(where: str, array: Array, scale: Array) -> None:
    """Raises at the first NaN or infinity of `array`, if its `scale` shows that there is one.

    Does nothing under tracing, where values are unknown.
    """
    if isinstance(scale, Tracer) or bool(jnp.all(jnp.isfinite(scale))):
        return
    bad = np.argwhere(~np.isfinite(np.asarray(array, np.float64)))
    if not len(bad):
        raise ValueError(
            f"{where}: values as large as {float(jnp.max(jnp.abs(array)))} overflow a float32 scale."
        )
    index = tuple(int(i) for i in bad[0])
    raise ValueError(
        f"{where} takes finite numbers; array[{', '.join(map(str, index))}] is {array[index]} "
        f"({len(bad)} such elements). Clean it first, e.g. with jnp.nan_to_num."
    )


def inherit_sharding(quantized: _Scaled, array: Array) -> _Scaled:
    """`quantized`, split over devices as `array` is."""
    if isinstance(array, Tracer) or not isinstance(array.sharding, NamedSharding):
        return quantized
    if len(array.sharding.device_set) == 1:
        return quantized
    return quantized.with_sharding(array.sharding)
