"""Products by the compiled kernels of `eqquant.native`: they read the payload as it is stored."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from .... import native
from ...._scaled import AbstractScaledArray
from ....coding import Coding, FloatCoding, TernaryCoding
from ....tiles import Leaf, Tile
from ..as_matrices import (
    by_matrices,
    holds_for_matrices,
    scale_of_inputs,
    scale_of_outputs,
)
from ..product import Product, Target


FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
CHUNK = 16
"""The kernels decode so many bytes at once."""


class _Code(NamedTuple):
    """How a stored byte holds numbers: `Code` in `native/src/problem.h`."""

    number: int
    places: int
    levels: tuple[float, ...] = ()


def supports(product: Product) -> bool:
    """Whether the kernels are there, and decode the weight where it lies."""
    batch = product.axes.w_batch
    in_place = batch == (*range(len(batch)),)  # matrices that are apart would be copied
    found = native.info().loaded and in_place
    return found and holds_for_matrices(_decodes, product, FLOATS, all_scales=True)


def compute(product: Product, target: Target) -> Array:
    """As `reference`, where `supports` says so. Reads the stored numbers, and writes nothing but the result."""

    def of_matrix(x: Array, w: AbstractScaledArray, scale: Leaf | None, axis: int) -> Array:
        x, rounded, outputs = x.astype(jnp.float32), product.digits == 1, None
        if scale is not None and not _takes(w, scale):
            if scale.is_constant_along(axis):
                outputs = scale_of_outputs(scale, axis).astype(jnp.float32)
            else:
                x, rounded = x * scale_of_inputs(scale, axis).astype(jnp.float32), False
            scale = None
        code, tile = _code_of(w), _tile_of(w)
        assert code is not None
        scales = jnp.ones((1, 1), jnp.float32)
        blocks = [max(length, 1) for length in w.shape]
        if scale is not None:
            scales = scale.array.astype(jnp.float32)
            blocks = [_block(scale, each) for each in range(2)]
        y = native.call_product(
            x,
            w.payload_leaf.array,
            scales,
            jnp.asarray([[*code.levels, *[0.0] * (16 - len(code.levels))]], jnp.float32),
            outputs=w.shape[1 - axis],
            code=code.number,
            sum_along_rows=axis == 1,
            down=not _is_along_rows(w, scale),
            height=w.shape[0],
            length=w.shape[1],
            tile=tile.size,
            stored=tile.stored,
            high_first=w.coding.first == "high",
            row_block=blocks[0],
            block=blocks[1],
            rounded=rounded,
        )
        return y if outputs is None else y * outputs

    return by_matrices(of_matrix, product.x, product.w, product.axes, all_scales=True)


def _decodes(x: Any, w: AbstractScaledArray, scale: Leaf | None, axis: int) -> bool:
    """Whether the kernels take this matrix."""
    code, tile = _code_of(w), _tile_of(w)
    if code is None or code.places != -(-tile.size // tile.stored):
        return False
    if scale is not None and any(map(scale.is_constant_along, range(2))) and not _takes(w, scale):
        scale = None  # it goes to the input or the output
    return _takes(w, scale)


def _takes(w: AbstractScaledArray, scale: Leaf | None) -> bool:
    """Whether the kernels multiply the numbers of this matrix with this scale."""
    return _is_along_rows(w, scale) or _is_down_columns(w, scale)


def _is_along_rows(w: AbstractScaledArray, scale: Leaf | None) -> bool:
    """Whether the matrix is packed along its rows, if at all, with scales for whole chunks of bytes or halves of
    them."""
    if w.packing is not None and w.packing.axis != -1:
        return False
    if scale is None or scale.is_constant_along(1):
        return True
    tile = _tile_of(w)
    tiles, rest = divmod(scale.tiles[1].size, tile.size)
    stored = tiles * tile.stored
    return not rest and (stored % CHUNK == 0 or 2 * stored == CHUNK)


def _is_down_columns(w: AbstractScaledArray, scale: Leaf | None) -> bool:
    """Whether the matrix is packed down its columns, if at all, with scales for whole tiles of one column or of all."""
    if w.packing is not None and w.packing.axis != -2:
        return False
    if scale is None:
        return True
    one_or_all = scale.is_constant_along(1) or scale.tiles[1].size == 1
    whole = scale.is_constant_along(0) or scale.tiles[0].size % _tile_of(w).size == 0
    return one_or_all and whole


def _code_of(w: AbstractScaledArray) -> _Code | None:
    """How a byte of the payload holds numbers, if the kernels know it."""
    coding = w.coding
    plain = type(w).plane is AbstractScaledArray.plane and [*w.payloads] == [w.payload]
    if not plain or coding.high_bits or w.payload_leaf.array.dtype not in (jnp.int8, jnp.uint8):
        return None
    if isinstance(coding, FloatCoding):
        number = {"float8_e4m3fn": 4, "float8_e5m2": 5}.get(coding.kind)
        return None if number is None else _Code(number, 1)
    if isinstance(coding, TernaryCoding):
        return _Code(2, 5, (-1.0, 0.0, 1.0))
    if type(coding) is not Coding:
        return None
    if coding.signed:
        return _Code(0, 1) if coding.bits == 8 else None
    levels = coding.levels or tuple(
        float(coding.low + coding.step * c) for c in range(2**coding.bits)
    )
    return {4: _Code(1, 2, levels), 1: _Code(3, 8, levels)}.get(coding.bits)


def _tile_of(w: AbstractScaledArray) -> Tile:
    return Tile(1) if w.packing is None else w.packing.tile


def _block(scale: Leaf, axis: int) -> int:
    """How many elements of an axis share a scale."""
    return max(scale.shape[axis], 1) if scale.is_constant_along(axis) else scale.tiles[axis].size
