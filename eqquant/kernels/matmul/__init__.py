"""Implementations of products with a quantized weight: functions of a `Product` and a `Target`."""
