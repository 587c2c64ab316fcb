"""Tile by tile along the first axes of the weight, so that the dense matrix never exists.

On CPU a fresh temporary of the size of the matrix costs more, in page faults, than the arithmetic.
A tile that stays in the cache costs little, and decoding it about as much as the product.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from ...._scaled import AbstractScaledArray
from ....tiles import Leaf
from ...in_pieces import by_pieces
from .. import xla
from ..axes import Axes
from ..product import count, Product, Target


# Measured on two AVX-512 cores, in float32, mostly with a weight of 4096 x 4096.
TILES = 16  # 12 or 16 take the same time, 32 take 1.2 to 3 times as long
MAX_TILE_BYTES = 4 << 20  # 2 to 4 MiB are as fast as any, 1 MiB up to 1.7 times slower
SMALL_BYTES = 1 << 20  # it stays in the cache as a whole, and loops are slow to compile
MAX_ROWS_OF_WEIGHT_FIRST = 64  # takes 0.7 to 0.8 times as long; from 128 rows on the same
MIN_ROWS_OF_HALF = (
    2  # one row takes the same time in bfloat16, 4 to 16 are 1.4 to 2.4 times as fast
)
LANES = 32  # 384 x 384 by tiles of 12 columns takes twice as long as by tiles of 12 rows


def compute(product: Product, target: Target) -> Array:
    """As `reference`, with temporaries of less than a tenth of the dense weight.

    One axis of `w` is cut, and another one inside each piece until that is small enough: a free or
    batch axis gives the outputs piece by piece, a contracted one is summed up.
    """
    x, w, axes, rows = product.x, product.w, product.axes, product.rows
    # XLA for CPU multiplies bfloat16 as the product of two matrices in their plain layout, or not at all.
    half = (
        jnp.finfo(x.dtype).bits == 16
        and rows >= MIN_ROWS_OF_HALF
        and w.ndim == 2
        and len(axes.w_contract) == 1
        and not axes.w_batch
    )
    if half and (x.ndim != 2 or axes.x_contract != (1,)):
        x = jnp.moveaxis(x, axes.x_contract[0], -1)
        rows_of_x, plain = x.reshape(-1, x.shape[-1]), Axes((1,), axes.w_contract, (), ())
        y = compute(product.replace(x=rows_of_x, axes=plain), target)
        return y.reshape(*x.shape[:-1], -1)
    itemsize = jnp.dtype(product.accumulate).itemsize
    sums = count(product.shape)
    limit = min(w.size // TILES, MAX_TILE_BYTES // itemsize)
    # A tile and the outputs take less than a tenth of the dense weight, if not the outputs alone do.
    room = w.size * jnp.dtype(w.dtype).itemsize * 2 // 21 // itemsize - sums
    if room > w.size // (2 * TILES):
        limit = min(limit, room)
    limit = max(limit, 1)
    order = list(range(w.ndim)) if w.size * itemsize > SMALL_BYTES else []  # contiguous tiles first
    order.sort(key=lambda axis: limit * w.shape[axis] < w.size)  # then those too short for one cut
    if w.packing is not None and w.packing.axis % w.ndim in axes.w_contract:
        sums *= w.packing.elements  # one for each plane
    if sums >= 2 * limit:
        # Partial sums larger than a tile cost more than reading tiles that are not contiguous.
        wide = [axis for axis in order if limit * w.shape[axis] >= LANES * w.size]
        order.sort(key=lambda axis: axis in axes.w_contract or axis not in (*wide, *axes.w_batch))
    weight_first = axes.w_contract == (w.ndim - 1,) and rows <= MAX_ROWS_OF_WEIGHT_FIRST
    form = xla.Form(half=half, weight_first=weight_first, isolated=half)
    if not order and product.inputs and not target.partitioned:
        product = product.replace(w=_decoded_after(x, w))
    return _cut(order, product, limit, form)


def _decoded_after(x: Array, w: AbstractScaledArray) -> AbstractScaledArray:
    """`w`, which is not decoded before `x` is there.

    XLA for CPU puts first what depends on nothing: of a program of many small weights, all would be dense at once. 48
    layers of 512 x 512 in NF4 take 1 MB of temporaries in place of 50, and a fifth to a third of the time. A barrier is
    taken away before operations are put in order. So that they have to wait, codes follow from a number of `x`, by a
    condition that is never true; XLA does not know that no number has more bits set than it has, but LLVM does, and
    leaves it out.
    """
    first = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())
    bits = jnp.finfo(x.dtype).bits
    never = lax.population_count(lax.bitcast_convert_type(first, f"uint{bits}")) > bits

    def tied(leaf: Leaf) -> Leaf:
        if not leaf.holds_codes:
            return leaf
        return leaf._replace(array=jnp.where(never, jnp.zeros_like(leaf.array), leaf.array))

    return w.moved(tied)


def _cut(order: Sequence[int], product: Product, limit: int, form: xla.Form) -> Array:
    """The product, with the axes of `w` cut in this order, into tiles of at most `limit` elements."""
    x, w, axes = product.x, product.w, product.axes
    if not order or w.size <= limit:
        return xla.in_form(product, form)
    axis, *later = order
    return by_pieces(
        lambda x, w: _cut(later, product.replace(x=x, w=w), limit, form),
        x,
        w,
        axis=axis,
        limit=limit,
        x_axis=axes.x_axis(axis),
        y_axis=axes.y_axis(axis, x.ndim, w.ndim),
        shape=product.shape,
        dtype=product.accumulate,
    )
