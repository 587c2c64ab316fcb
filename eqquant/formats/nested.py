"""Quantized scales: the double quantization of QLoRA."""

import math
import operator
from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, UInt8

from .. import tiles
from .._scaled import StoredFactor
from .._sharding import look_up, whole
from ..coding import bisect
from ..tiles import (
    BlockSize,
    combine,
    common_block_size,
    constant_tile,
    Leaf,
    refined,
    repeat,
    rounded,
    scale_leaf,
    Tile,
    UNIT,
)


GROUP = 256


def _dynamic_map() -> np.ndarray:
    """The 256 values of bitsandbytes' signed dynamic map: seven decades, each twice as finely divided
    as the one below ([8-bit optimizers](https://arxiv.org/abs/2110.02861), section 2)."""
    values = [0.0, 1.0]
    for i in range(7):
        steps = np.arange(2**i + 1)
        # As PyTorch rounds them: bounds are counted from the nearer end.
        step = (np.float32(1) - np.float32(0.1)) / np.float32(2**i)
        up, down = np.float32(0.1) + np.float64(step) * steps, 1 - np.float64(step) * steps[::-1]
        bounds = np.where(steps < (len(steps) // 2), up, down).astype(np.float32)
        decade = np.float32(10.0 ** (i - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        values += [*decade, *-decade]
    return np.sort(np.asarray(values, np.float32))


DYNAMIC_MAP = _dynamic_map()
_MIDPOINTS = (DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / np.float32(2)


class NestedScale(StoredFactor):
    r"""Scales $s_i \approx o + m_g \, d_{c_i}$, with 8-bit codes $c_i$ into the dynamic map $d$.

    $o$ is the mean of all scales, and $m_g$ the largest magnitude of $s - o$ in a group of 256 scales, which are counted
    in row-major order. Under `vmap`, each slice is nested by itself. Where groups are whole rows, or equal parts of a
    row, they are tiles of the array, and stay nested when it is cut or transposed; other ones are expanded then.
    """

    codes: UInt8[Array, "..."]
    """Of the shape of the scales."""
    absmax: Float[Array, "..."]
    """One for each group: along a last axis, after axes that come from `vmap`; or, as tiles, of the rank of `codes`."""
    offset: Float[Array, "..."]
    """The mean; its axes, if any, come from `vmap`. With groups as tiles, of the rank of `codes`."""
    blocks: BlockSize = eqx.field(static=True, default=None)
    """How many elements of the array share a group, or a mean, along an axis that has several, if groups are tiles."""

    is_grouped: ClassVar[bool] = True

    @property
    def dtype(self) -> np.dtype:
        """What `materialize` gives."""
        return self.absmax.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the scales."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the scales."""
        return self.codes.ndim

    @property
    def are_tiles(self) -> bool:
        """Whether groups are stored as tiles of the array."""
        return self.offset.ndim == self.absmax.ndim == self.codes.ndim

    def materialize(self) -> Float[Array, "..."]:
        """The scales in float32, split over devices as the codes are. Of groups that are not tiles.

        **Raises:** `ValueError` if there are too many or too few groups for the codes: if `shard_map`
        has cut them.
        """
        shape, batch = self.codes.shape, self.offset.ndim
        if self.absmax.shape[-1] != -(-math.prod(shape[batch:]) // GROUP):
            raise ValueError(
                f"Scales of shape {shape[batch:]} are not in {self.absmax.shape[-1]} groups of {GROUP}: "
                "were they cut by shard_map? Call it inside eqquant.implicit."
            )
        centred = look_up(jnp.asarray(DYNAMIC_MAP), self.codes) * _each(self.absmax, shape)
        # Rounded before the sum: a fused multiply-add gives other bits than bitsandbytes.
        return rounded(centred) + lax.expand_dims(self.offset, range(batch, len(shape)))

    def leaves(self, shape: tuple[int, ...], block_size: BlockSize) -> dict[str, Leaf]:
        codes = scale_leaf(self.codes, shape, block_size)
        absmax, offset = self.absmax, self.offset
        if self.are_tiles:
            return {
                "codes": codes,
                "absmax": scale_leaf(absmax, shape, self.blocks),
                "offset": scale_leaf(offset, shape, self.blocks),
            }
        batch, grouped = self.codes.shape[: offset.ndim], self.codes.shape[offset.ndim :]
        flat = Leaf(
            absmax, (*batch, math.prod(grouped)), (*[UNIT] * len(batch), Tile(GROUP)), "factor"
        )
        groups = tiles.reshape(flat, self.codes.shape)
        covers = tuple(
            constant_tile(length) if groups.is_constant_along(axis) else Tile(group.size * own.size)
            for axis, (length, group, own) in enumerate(
                zip(shape, groups.tiles, codes.tiles, strict=True)
            )
        )
        mean = lax.expand_dims(offset, range(len(batch), len(shape)))
        return {
            "codes": codes,
            "absmax": Leaf(groups.array, shape, covers, "factor"),
            "offset": scale_leaf(mean, shape),
        }

    def with_leaves(self, leaves: dict[str, Leaf]) -> "NestedScale":
        absmax, offset = leaves["absmax"], leaves["offset"]
        absmax, offset = refined(absmax, offset), refined(offset, absmax)  # of two that were joined
        blocks = common_block_size([absmax, offset])
        return NestedScale(leaves["codes"].array, absmax.array, offset.array, blocks)

    def decoded(self, shape: tuple[int, ...], block_size: BlockSize) -> Leaf:
        if not self.are_tiles:
            return scale_leaf(self.materialize(), shape, block_size)
        codes, absmax, offset = self.leaves(shape, block_size).values()
        levels = codes._replace(array=look_up(jnp.asarray(DYNAMIC_MAP), self.codes))
        centred = combine(operator.mul, levels, absmax)
        return combine(operator.add, centred._replace(array=rounded(centred.array)), offset)

    @classmethod
    def quantize(cls, scales: Float[Array, "..."]) -> "NestedScale":
        """Quantizes float32 scales of any shape."""
        return _quantize(scales)


@jax.jit
def _quantize(scales: Float[Array, "..."]) -> NestedScale:
    flat = whole(scales).reshape(-1)
    offset = _mean(flat)
    centred = flat - offset
    groups = -(-flat.size // GROUP)
    padded = jnp.pad(centred, (0, groups * GROUP - flat.size)).reshape(groups, GROUP)
    absmax = jnp.max(jnp.abs(padded), axis=1)
    inverse = jnp.where(absmax == 0, 0, 1 / jnp.where(absmax == 0, 1, absmax))
    codes = bisect((scales - offset) * _each(inverse, scales.shape), _MIDPOINTS)
    return NestedScale(codes, absmax, offset)


def _each(groups: Float[Array, "... groups"], shape: Sequence[int]) -> Float[Array, "..."]:
    """What each scale of an array of `shape` gets of its group. The trailing axes are grouped."""
    return repeat(groups, GROUP, -1, math.prod(shape[groups.ndim - 1 :])).reshape(shape)


def _mean(x: Float[Array, " n"]) -> Float[Array, ""]:
    """The mean, summed in the order in which PyTorch does it on CPU: so that the bits agree."""
    rows = x.size // 32  # of four vectors of eight lanes
    vectors = x[rows * 32 : x.size // 8 * 8].reshape(-1, 8)
    four = _cascade(x[: rows * 32].reshape(rows, 4, 8))
    lanes = four[0]
    for vector in vectors:
        lanes = lanes + vector
    for vector in four[1:]:
        lanes = lanes + vector
    total = _in_order([*x[x.size // 8 * 8 :], *lanes], jnp.zeros((), x.dtype))
    # XLA divides by a constant through its rounded reciprocal.
    return total / lax.optimization_barrier(jnp.asarray(max(x.size, 1), x.dtype))


def _cascade(rows: Array) -> Array:
    """The sum of rows: of sums of 16 sums of 16 rows, and so on, and of what is left over at each level."""
    power = max(4, math.ceil(math.log2(max(len(rows), 1))) // 4)
    left_over = []
    for _ in range(3):
        whole = len(rows) >> power << power
        zero = jnp.zeros(rows.shape[1:], rows.dtype)
        left_over.append(_in_order(rows[whole:], zero))
        groups = rows[:whole].reshape(-1, 1 << power, *rows.shape[1:])
        zeros = jnp.zeros((len(groups), *rows.shape[1:]), rows.dtype)
        rows = _in_order([groups[:, i] for i in range(1 << power)], zeros)
    left_over.append(_in_order(rows, jnp.zeros(rows.shape[1:], rows.dtype)))
    return _in_order(left_over[1:], left_over[0])


def _in_order(terms: Sequence[Array] | Array, start: Array) -> Array:
    for term in terms:
        start = start + term
    return start
