r"""Products by tables: one look-up for each stored byte, and no decoding.

A byte of a payload that is packed along the sum stands for several weights $q_{g0}, q_{g1}, \dots$, and is one of
256. With $t_g[b] = \sum_k x_{gk} v_k(b)$, where $v_k(b)$ is the value of element $k$ in the byte $b$,

$$ \sum_j q_{ij} x_j = \sum_g t_g[b_{ig}] $$

The tables take 256 products for each element of $x$, whatever the number of outputs. A scale that differs
along the sum multiplies the sum of its block.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ...._scaled import AbstractScaledArray
from ....tiles import to_elements
from ...in_pieces import zeros
from ..product import Product, Target


BYTES = 256


def supports(product: Product) -> bool:
    """Whether `compute` does: products along the first stored axis of `w` alone, packed in bytes, with scales that
    are constant along it or on whole tiles of the payload."""
    w, axes, packing, scale = product.w, product.axes, product.w.packing, product.w.scale_leaf
    return (
        product.inputs > 0
        and w.ndim >= 2
        and packing is not None
        and packing.axis == -w.ndim
        and [*w.payloads] == [w.payload]
        and type(w).plane is AbstractScaledArray.plane  # a value follows from its code alone
        and w.payload_leaf.array.dtype == jnp.uint8
        and axes.w_contract == (0,)
        and not axes.w_batch
        and (
            scale is None
            or scale.is_constant_along(0)
            or scale.tiles[0].size % packing.tile.size == 0
        )
    )


def compute(product: Product, target: Target) -> Array:
    """As `reference`, where `supports` says so."""
    w, accumulate = product.w, product.accumulate
    packing, scale = w.packing, w.scale_leaf
    assert packing is not None
    (x_axis,) = product.axes.x_contract
    x = jnp.moveaxis(product.x, x_axis, -1).astype(accumulate)
    parts = packing._replace(axis=-1).split(x)
    parts = jnp.stack([part.reshape(-1, packing.stored) for part in parts], -1)
    payload = w.payload_leaf.array.reshape(packing.stored, -1)
    look_up, scales = _look_up, None
    if scale is not None:
        scales = to_elements(scale, range(1, w.ndim)).astype(accumulate)
        scales = scales.reshape(scale.array.shape[0], -1)
        if not scale.is_constant_along(0):
            per_scale = scale.tiles[0].size // packing.tile.size * packing.tile.stored
            look_up = partial(_look_up_scaled, scales=scales, bytes_per_scale=per_scale)
            scales = None
    values = _values_of_bytes(w, accumulate)
    y = jnp.stack([look_up(row, payload, values) for row in parts])
    y = y if scales is None else y * scales
    return y.reshape(*x.shape[:-1], *w.shape[1:])


def _values_of_bytes(w: AbstractScaledArray, dtype: Any) -> Array:
    """The values of the elements (rows) of each byte (columns)."""
    assert w.packing is not None
    stored, elements = jnp.arange(BYTES, dtype=jnp.uint8), w.packing.elements
    codes = [w.coding.unpack(stored, i, elements) for i in range(elements)]
    return jnp.stack([w.coding.value(each, dtype) for each in codes])


def _look_up(parts: Array, payload: Array, values: Array) -> Array:
    """The sum over `g` and `k` of `parts[g, k] * values[k, payload[g, i]]`."""
    tables = jnp.matmul(parts, values, precision=lax.Precision.HIGHEST)

    def step(y: Array, each: tuple[Array, Array]) -> tuple[Array, None]:
        table, codes = each
        return y + table.at[codes].get(mode="promise_in_bounds"), None

    start = zeros((tables, payload), payload.shape[1:], tables.dtype)
    return lax.scan(step, start, (tables, payload))[0]


def _look_up_scaled(
    parts: Array, payload: Array, values: Array, scales: Array, bytes_per_scale: int
) -> Array:
    """As `_look_up`, the sums of each so many bytes times their scales."""

    def step(y: Array, each: tuple[Array, Array, Array]) -> tuple[Array, None]:
        parts, payload, scales = each
        return y + scales * _look_up(parts, payload, values), None

    count = len(payload) // bytes_per_scale
    done = count * bytes_per_scale

    def whole(a: Array) -> Array:
        return a[:done].reshape(count, bytes_per_scale, a.shape[1])

    start = zeros((parts, payload, scales), payload.shape[1:], scales.dtype)
    y, _ = lax.scan(step, start, (whole(parts), whole(payload), scales[:count]))
    if done < len(payload):
        y, _ = step(y, (parts[done:], payload[done:], scales[count]))
    return y
