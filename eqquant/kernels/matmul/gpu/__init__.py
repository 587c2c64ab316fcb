"""A kernel for NVIDIA GPUs in Pallas, which is imported where it is called and not before."""
