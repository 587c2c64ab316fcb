"""Implementations of `dot_general(x, w)` with quantized `w`; all have the signature of `reference`."""

from .fused import fused as fused
from .reference import reference as reference
from .tiled import tiled as tiled
