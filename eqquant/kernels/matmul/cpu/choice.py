"""The implementation for CPU, by format and shape. Speed was measured on two AVX-512 cores, in float32."""

from .. import int8_digits
from ..product import Product
from . import tables


# 4096 x 4096, up to 8 rows: 1.2 to 2.4 times as fast as tiles; 16 rows: 0.9 times; 1024 x 1024, packed: 0.6 times.
MAX_ROWS_OF_DIGITS = 8
MIN_SIZE_OF_DIGITS = 1 << 20
MIN_SIZE_OF_DIGITS_IF_PACKED = 1 << 22
# 1.2 to 4.2 times as fast as tiles where a look-up serves at least two elements of each row, else 0.7 to 0.9 times.
MIN_ELEMENTS_PER_ROW = 2
# The tables take less than a tenth of the dense weight from so many outputs on, for each element of a byte.
MIN_OUTPUTS_OF_TABLES = 10 * tables.BYTES


def choose(product: Product) -> str:
    """The name of the implementation."""
    w, rows = product.w, product.rows
    if (
        tables.supports(product)
        and w.packing is not None
        and rows * MIN_ELEMENTS_PER_ROW <= w.packing.elements
        and product.outputs * w.packing.elements >= MIN_OUTPUTS_OF_TABLES
    ):
        return "tables"
    least = MIN_SIZE_OF_DIGITS if w.packing is None else MIN_SIZE_OF_DIGITS_IF_PACKED
    serve = rows <= MAX_ROWS_OF_DIGITS and w.size >= least and int8_digits.supports(product)
    return "int8_digits" if serve else "tiled"
