"""Implementations for CPUs, and which of all serves best there."""
