"""Every way to quantize, once: what tests, benchmarks and documentation go through.

It stands here, not in `eqquant.testing`, which shows it: benchmarks read it where `hypothesis` is not
installed. Importing `eqquant` does not import it.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

from ._transposed import column_major
from .formats import (
    Array1B,
    Array8B,
    ArrayFP8,
    ArrayInt4,
    ArrayNF4,
    ArrayNVFP4,
    RSROperatorBinary,
    RSROperatorTernary,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Quantizer:
    """A format with its options, and what is expected of it. It is called as `quantize` is."""

    name: str
    """As tests and documentation say it."""
    format: Any
    """The class of the arrays that it makes."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of `format.quantize`."""
    _: dataclasses.KW_ONLY
    bits: float
    """At most so many for each weight of a 4096 x 4096 matrix, with all leaves; less than 0.01 too many."""
    sqnr_db: float | None = None
    """Signal over noise of 1024 x 4096 normal numbers, in decibels, to 0.03; None where nothing says what it
    has to be."""
    packed: int = 1
    """How many elements lie in one stored number, along the last axis."""
    block_size: int | None = None
    """How many elements share a scale, along the last axis; None for all of them."""
    variant: str = ""
    """What tells it from other entries of its class, in tables of benchmarks."""
    like: str = ""
    """The entry whose arrays are stored alike: only the numbers are found in another way."""

    def __call__(self, array: Any, **options: Any) -> Any:
        return self.format.quantize(array, **{**self.options, **options})

    @property
    def title(self) -> str:
        """As tables of benchmarks say it."""
        return f"{self.format.__name__}, {self.variant}" if self.variant else self.format.__name__

    @property
    def tile(self) -> int:
        """How many elements stay together, along the last axis, when an array is cut."""
        return math.lcm(self.packed, self.block_size or 1)

    def takes(self, option: str) -> bool:
        """Whether `format.quantize` has such an argument."""
        return option in inspect.signature(self.format.quantize).parameters

    def with_blocks(self, block_size: int) -> "Quantizer":
        """The same with blocks of another size, for small arrays; itself, if it has none to choose."""
        if self.block_size is None or not self.takes("block_size"):
            return self
        options = {**self.options, "block_size": block_size}
        return dataclasses.replace(self, options=options, block_size=block_size)

    def column_major(self, array: Any, **options: Any) -> Any:
        """Its arrays, stored column by column."""
        return column_major(self(array, **options))


# Of rounding to equal steps it depends on the largest number: test_formats computes it. The levels of the others
# are optimal or given: integrals over the normal density, by numbers for NF4. RSROperatorBinary keeps what is positive.
_TERNARY_DB, _POSITIVE_DB = 5.794, -10 * math.log10(1 - 1 / math.pi)

# fmt: off
_ENTRIES = [
    Quantizer("int8", Array8B, bits=8.01),
    Quantizer("int8 blocks", Array8B, {"block_size": 64}, bits=8.5, block_size=64, variant="blocks of 64"),
    Quantizer("nf4", ArrayNF4, bits=4.5, sqnr_db=20.73, packed=2, block_size=64),
    Quantizer("nf4 double", ArrayNF4, {"double": True}, bits=4.13, sqnr_db=20.73, packed=2, block_size=64, variant="double"),
    Quantizer("nf4 search", ArrayNF4, {"scale": "search"}, bits=4.5, sqnr_db=21.40, packed=2, block_size=64, variant="search", like="nf4"),
    Quantizer("int4", ArrayInt4, bits=4.5, packed=2, block_size=64),
    Quantizer("int4 affine", ArrayInt4, {"zero": "affine"}, bits=5.0, packed=2, block_size=64, variant="affine"),
    Quantizer("int4 search", ArrayInt4, {"scale": "search"}, bits=4.5, packed=2, block_size=64, variant="search", like="int4"),
    Quantizer("nvfp4", ArrayNVFP4, bits=4.51, packed=2, block_size=16),
    Quantizer("fp8", ArrayFP8, bits=8.01),
    Quantizer("ternary", Array1B, bits=1.61, sqnr_db=_TERNARY_DB, packed=5, variant="ternary"),
    Quantizer("ternary least squares", Array1B, {"scale": "least_squares"}, bits=1.61, sqnr_db=7.208, packed=5, variant="least squares", like="ternary"),
    Quantizer("binary", Array1B, {"levels": "binary"}, bits=1.01, sqnr_db=4.396, packed=8, variant="binary"),
    Quantizer("rsr binary", RSROperatorBinary, bits=1.01, sqnr_db=_POSITIVE_DB, packed=8),
    Quantizer("rsr ternary", RSROperatorTernary, bits=2.01, sqnr_db=_TERNARY_DB, packed=8),
]
# fmt: on
QUANTIZERS: dict[str, Quantizer] = {quantizer.name: quantizer for quantizer in _ENTRIES}
"""By its name: every way to quantize that tests and benchmarks go through."""

LAYOUTS: dict[str, Quantizer] = {name: each for name, each in QUANTIZERS.items() if not each.like}
"""Those whose arrays are stored in ways of their own: where only that matters, and compiling takes its time."""
