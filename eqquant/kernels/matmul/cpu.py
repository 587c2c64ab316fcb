"""The implementation for CPU, by format and shape."""

import math
from typing import Any

from jax import Array

from ..._array import AbstractScaledArray
from .integer import integer, supports
from .reference import Axes
from .tiled import tiled


# Measured on two AVX-512 cores, float32, time of `tiled` over that of `integer`, for int8 and binary weights:
#     rows         1           4           8          16
#     4096^2    2.1, 1.2    2.4, 1.5    1.3, 1.2    0.9, 0.9
#     1024^2    1.6, 0.6    1.5, 0.7
MAX_ROWS_OF_DIGITS = 8
MIN_SIZE_OF_DIGITS = 1 << 20
MIN_SIZE_OF_DIGITS_IF_PACKED = 1 << 22


def cpu(x: Array, w: AbstractScaledArray, *, axes: Axes, precision: Any, accumulate: Any) -> Array:
    """As `reference`."""
    rows = x.size // max(math.prod(x.shape[axis] for axis in axes.x_contract), 1)
    size = MIN_SIZE_OF_DIGITS if w.packing is None else MIN_SIZE_OF_DIGITS_IF_PACKED
    digits = rows <= MAX_ROWS_OF_DIGITS and w.size >= size and supports(x, w, axes, accumulate)
    implementation = integer if digits else tiled
    return implementation(x, w, axes=axes, precision=precision, accumulate=accumulate)
