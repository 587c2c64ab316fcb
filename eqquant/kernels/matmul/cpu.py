"""The implementation for CPU, by format and shape."""

import math
from typing import Any

from ..._scaled import AbstractScaledArray
from .integer import supports
from .reference import Axes
from .tables import BYTES, supports as supports_tables


# Measured on two AVX-512 cores, float32, time of `tiled` over that of `integer`, for int8 and binary weights:
#     rows         1           4           8          16
#     4096^2    2.1, 1.2    2.4, 1.5    1.3, 1.2    0.9, 0.9
#     1024^2    1.6, 0.6    1.5, 0.7
MAX_ROWS_OF_DIGITS = 8
MIN_SIZE_OF_DIGITS = 1 << 20
MIN_SIZE_OF_DIGITS_IF_PACKED = 1 << 22
# `x @ w`, time of `tiled` over that of `tables`, for binary, ternary and NF4 weights:
#     rows           1               2             4
#     4096^2   4.2, 2.9, 1.7   2.2, 1.4, 0.7   1.4, 0.8
#     1024^2   3.0, 3.2, 1.6   2.4, 1.6, 0.8   1.2, 0.9
#     384^2    1.9, 2.4, 1.2
# that is, where a look-up serves at least two elements of each row. The tables take less than a tenth of the
# dense weight from so many outputs on (for each element of a byte).
MIN_ELEMENTS_PER_ROW = 2
MIN_OUTPUTS_OF_TABLES = 10 * BYTES


def choose(x: Any, w: AbstractScaledArray, axes: Axes, accumulate: Any) -> str:
    """The name of the implementation."""
    rows = x.size // max(math.prod(x.shape[axis] for axis in axes.x_contract), 1)
    outputs = w.size // max(math.prod(w.shape[axis] for axis in axes.w_contract), 1)
    if (
        supports_tables(x, w, axes, accumulate)
        and w.packing is not None
        and rows * MIN_ELEMENTS_PER_ROW <= w.packing.elements
        and outputs * w.packing.elements >= MIN_OUTPUTS_OF_TABLES
    ):
        return "tables"
    size = MIN_SIZE_OF_DIGITS if w.packing is None else MIN_SIZE_OF_DIGITS_IF_PACKED
    digits = rows <= MAX_ROWS_OF_DIGITS and w.size >= size and supports(x, w, axes, accumulate)
    return "integer" if digits else "tiled"
