"""The rules: how JAX primitives act on quantized operands, one file for each kind of primitive.

Each file opens with its table. Rules are written once for the family of formats and import no
concrete format. Importing this package fills the table.
"""

from . import contraction, control_flow, elementwise, indexing, structural


__all__ = ["contraction", "control_flow", "elementwise", "indexing", "structural"]
