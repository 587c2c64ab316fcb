"""What every `quantize` checks about its arguments, in the same words."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding

from ._array import QuantizedArray
from ._scaled import AbstractScaledArray
from .tiles import BlockSize


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
        way_out = "Cast it first: array.astype(jnp.float32)."
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            way_out = "Leave it dense; or quantize array.real and array.imag as two arrays, and multiply by each."
        raise TypeError(
            f"{where} takes a floating-point array; it was given {array.dtype}{list(array.shape)}. {way_out}"
        )
    with np.errstate(over="ignore"):  # float64 beyond float32: found as infinite later
        return jnp.asarray(array)


def as_floats(where: str, array: Any, dtype: Any) -> tuple[Array, np.dtype]:
    """The array that `where` is given, if it is one of floating-point numbers, and the dtype that it asks for or has."""
    array = as_float_array(where, array)
    dtype = check_dtype(f"{where}(dtype=...)", array.dtype if dtype is None else dtype)
    # Numbers of 8 bits or fewer do not promote by themselves.
    return array.astype(jnp.float32) if array.dtype.itemsize < 2 else array, dtype


def check_dtype(where: str, dtype: Any, integers: bool = False) -> np.dtype:
    """`dtype` as a NumPy dtype: floating-point, of at least 16 bits, or an integer if allowed."""
    found = jnp.dtype(dtype)
    if integers and jnp.issubdtype(found, jnp.integer):
        return found
    if not jnp.issubdtype(found, jnp.floating) or found.itemsize < 2:
        raise TypeError(
            f"{where} must be float16, bfloat16, float32 or float64{' or integer' * integers}; it was "
            f"given {found}."
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


def check_integers(where: str, array: Any, allowed: Sequence[int]) -> Array:
    """`array` as a JAX array, if it holds integers, and only these (unknown under tracing)."""
    if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.integer):
        shown = f"{array.dtype}{list(array.shape)}" if hasattr(array, "dtype") else repr(array)
        raise TypeError(
            f"{where} takes an array of integers; it was given {shown}. Cast it first, e.g. "
            "jnp.sign(array).astype(jnp.int8)."
        )
    array = jnp.asarray(array)
    if isinstance(array, Tracer):
        return array
    bad = np.argwhere(~np.isin(np.asarray(array), allowed))
    if len(bad):
        index = tuple(int(i) for i in bad[0])
        raise ValueError(
            f"{where} takes integers among {', '.join(map(str, allowed))}; "
            f"array[{', '.join(map(str, index))}] is {array[index]} ({len(bad)} such elements). Give "
            "floating-point numbers to have them rounded."
        )
    return array


def check_finite(where: str, array: Array, scale: Array) -> None:
    """Raises at the first NaN or infinity of `array`, if its `scale` shows that there is one.

    Does nothing under tracing, where values are unknown.
    """
    if isinstance(scale, Tracer) or not array.size or bool(jnp.all(jnp.isfinite(scale))):
        return
    bad = np.argwhere(~np.isfinite(np.asarray(array, np.float64)))
    if not len(bad):
        raise ValueError(
            f"{where}: values as large as {float(jnp.max(jnp.abs(array)))} overflow a {scale.dtype} scale."
        )
    index = tuple(int(i) for i in bad[0])
    raise ValueError(
        f"{where} takes finite numbers; array[{', '.join(map(str, index))}] is {array[index]} "
        f"({len(bad)} such elements). An array that is meant to hold them, such as a mask, has to stay dense."
    )


def inherit_sharding(quantized: _Scaled, array: Array) -> _Scaled:
    """`quantized`, split over devices as `array` is."""
    # An array of NumPy has no sharding.
    sharding = None if isinstance(array, Tracer) else getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or len(sharding.device_set) == 1:
        return quantized
    return quantized.with_sharding(sharding)


def check_choice(where: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{where} must be one of {', '.join(choices)}; it was given {value!r}.")


def axes_and_blocks(
    where: str, axis: int | Sequence[int], block_size: BlockSize, ndim: int
) -> tuple[tuple[int, ...], BlockSize]:
    """The axes as sorted non-negative integers, and the block sizes in their order.

    **Raises:** `ValueError` unless `block_size` is None, a positive number with one axis, or one for each axis.
    """
    axes = normalize_axes(f"{where}(axis=...)", axis, ndim)
    if block_size is None or not ndim:
        return axes, None
    given = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    sizes = (block_size,) if isinstance(block_size, (int, np.integer)) else tuple(block_size)
    if len(sizes) != len(given) or any(size is None or size < 1 for size in sizes):
        raise ValueError(
            f"{where}(block_size=...) must be positive and goes with exactly one axis (or is a tuple, with a size for each "
            f"axis); it was given {block_size} with the axes {given}."
        )
    by_axis = {int(a) % ndim: int(size) for a, size in zip(given, sizes, strict=True)}
    return axes, by_axis[axes[0]] if len(axes) == 1 else tuple(by_axis[a] for a in axes)
