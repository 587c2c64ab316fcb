"""Implementations of `dot_general(x, w)` with quantized `w`; all have the signature of `reference`."""

from .choice import choose as choose
from .fused import fused as fused
from .gpu import gpu as gpu
from .integer import integer as integer
from .reference import reference as reference
from .tables import tables as tables
from .tiled import tiled as tiled
from .tpu import tpu as tpu
