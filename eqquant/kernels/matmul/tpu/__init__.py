"""A kernel for TPUs in Pallas, which is imported where it is called and not before."""

from .product import pays as pays, supports as supports, tpu as tpu
