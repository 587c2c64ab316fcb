"""The rules: how JAX primitives act on quantized operands, one file for each kind of primitive.

Each file opens with its table. Rules are written once for the family of formats and import no
concrete format. Those of weights with adapters are in a file of their own. Importing this package fills the table.
"""

from . import adapted, contraction, control_flow, elementwise, indexing, structural


__all__ = ["adapted", "contraction", "control_flow", "elementwise", "indexing", "structural"]
