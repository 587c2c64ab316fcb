"""A kernel for NVIDIA GPUs in Pallas, which is imported where it is called and not before."""

from .product import gpu as gpu, pays as pays, supports as supports
