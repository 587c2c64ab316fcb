"""The products behind `dot_general`: what they mean, and one implementation for each platform.

Nothing outside this package imports Pallas, and importing it loads none.
"""

from .activations import Int8Blocks as Int8Blocks
from .convolution import convolve as convolve, quantized_convolution_p as quantized_convolution_p
from .dot_general import (
    quantized_dot_general as quantized_dot_general,
    quantized_dot_general_p as quantized_dot_general_p,
)
from .ragged_dot import quantized_ragged_dot as quantized_ragged_dot


__all__ = [
    "Int8Blocks",
    "convolve",
    "quantized_convolution_p",
    "quantized_dot_general",
    "quantized_dot_general_p",
    "quantized_ragged_dot",
]
