"""One file for each format."""

from .int8 import Array8B as Array8B


__all__ = ["Array8B"]
