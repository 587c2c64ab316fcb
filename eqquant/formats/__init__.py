"""One file for each format."""

from .int8 import Array8B as Array8B
from .nf4 import ArrayNF4 as ArrayNF4
from .one_bit import Array1B as Array1B
from .rsr import RSROperatorBinary as RSROperatorBinary, RSROperatorTernary as RSROperatorTernary


__all__ = ["Array1B", "Array8B", "ArrayNF4", "RSROperatorBinary", "RSROperatorTernary"]
