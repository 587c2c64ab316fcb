"""Quantized scales: the double quantization of QLoRA."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, UInt8

from .._sharding import look_up, whole
from ..tiles import repeat


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


class NestedScale(eqx.Module):
    r"""Scales $s_i \approx o + m_g \, d_{c_i}$, with 8-bit codes $c_i$ into the dynamic map $d$.

    $o$ is the mean of all scales, and $m_g$ the largest magnitude of $s - o$ in a group of 256 scales,
    which are counted in row-major order. Under `vmap`, each slice is nested by itself.
    """

    codes: UInt8[Array, "..."]
    """Of the shape of the scales."""
    absmax: Float[Array, "... groups"]
    """One for each group."""
    offset: Float[Array, "..."]
    """The mean; its axes, if any, come from `vmap`."""

    @property
    def dtype(self) -> np.dtype:
        """What `materialize` gives."""
        return self.absmax.dtype

    def materialize(self) -> Float[Array, "..."]:
        """The scales in float32, split over devices as the codes are.

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
        centred = jnp.where(centred == centred, centred, jnp.nan)
        return centred + lax.expand_dims(self.offset, range(batch, len(shape)))

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
    codes = _nearest((scales - offset) * _each(inverse, scales.shape))
    return NestedScale(codes, absmax, offset)


def _each(groups: Float[Array, "... groups"], shape: Sequence[int]) -> Float[Array, "..."]:
    """What each scale of an array of `shape` gets of its group. The trailing axes are grouped."""
    return repeat(groups, GROUP, -1, math.prod(shape[groups.ndim - 1 :])).reshape(shape)


def _nearest(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """The numbers of the values of the dynamic map that are nearest, by bisection: element by element,
    so that the codes are split over devices as `x` is."""
    midpoints, codes = jnp.asarray(_MIDPOINTS), jnp.zeros_like(x, jnp.int32)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        codes = jnp.where(x > look_up(midpoints, codes + (step - 1)), codes + step, codes)
    return codes.astype(jnp.uint8)


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
