"""A kernel for TPUs in Pallas, which is imported where it is called and not before."""
