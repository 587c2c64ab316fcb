"""One file for each format."""

from .fp8 import ArrayFP8 as ArrayFP8
from .int4 import ArrayInt4 as ArrayInt4
from .int8 import Array8B as Array8B
from .nf4 import ArrayNF4 as ArrayNF4
from .nvfp4 import ArrayNVFP4 as ArrayNVFP4
from .one_bit import Array1B as Array1B
from .rsr import RSROperatorBinary as RSROperatorBinary, RSROperatorTernary as RSROperatorTernary


__all__ = [
    "Array1B",
    "Array8B",
    "ArrayFP8",
    "ArrayInt4",
    "ArrayNF4",
    "ArrayNVFP4",
    "RSROperatorBinary",
    "RSROperatorTernary",
]
