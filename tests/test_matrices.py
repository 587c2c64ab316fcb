"""Products of any rank, as products of matrices."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import in_turns
from jax import lax

import eqquant as eqq
from eqquant.kernels.matmul import reference
from eqquant.kernels.matmul.as_matrices import by_matrices, holds_for_matrices
from eqquant.kernels.matmul.axes import Axes
from eqquant.kernels.matmul.product import Product, Target
from eqquant.testing import LAYOUTS
from eqquant.tiles import broadcastable, Unaligned


# Merged axes need scales of blocks, and whole tiles in 8 elements.
FORMATS = {name: each.with_blocks(8) for name, each in LAYOUTS.items() if each.takes("block_size")}
FORMATS = {name: each for name, each in FORMATS.items() if 8 % each.tile == 0}
# The shapes of x, of w, those that are summed over, those of the batch; and into how many matrices w is taken apart.
PRODUCTS = {
    "matrix": ((3, 32), (5, 32), ((1, 1),), (), 1),
    "vector": ((32,), (5, 32), ((0, 1),), (), 1),
    "rows of any rank": ((2, 32, 3), (32, 6), ((1, 0),), (), 1),
    "outputs of any rank": ((3, 32), (2, 5, 32), ((1, 2),), (), 1),
    "heads": ((3, 32), (32, 4, 8), ((1, 0),), (), 1),
    "from heads": ((3, 4, 8), (4, 8, 6), ((1, 0), (2, 1)), (), 1),
    "in another order": ((3, 8, 4), (4, 8, 6), ((1, 1), (2, 0)), (), 1),
    "batch": ((4, 3, 32), (4, 5, 32), ((2, 2),), ((0, 0),), 4),
    "batch of two axes": ((3, 2, 32, 4), (2, 4, 5, 32), ((2, 3),), ((1, 0), (3, 1)), 8),
    "batch of x elsewhere": ((3, 32, 4), (4, 32, 6), ((1, 1),), ((2, 0),), 4),
    "one input, many weights": ((3, 32), (4, 32, 6), ((1, 1),), (), 4),
    "batch, many weights": ((2, 3, 32), (2, 4, 32, 6), ((2, 2),), ((0, 0),), 8),
}


def operands(case: str, how: Any) -> tuple[Any, Any, Axes]:
    x_shape, w_shape, summed, batch, _ = PRODUCTS[case]
    axes = Axes(*(tuple(pair[i] for pair in pairs) for pairs in (summed, batch) for i in (0, 1)))
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x_shape, w_shape))
    return x, how(w, axis=max(axes.w_contract)), axes


@pytest.mark.parametrize(("case", "format"), in_turns(PRODUCTS, [*FORMATS], each=2))
def test_by_matrices(case, format):
    x, w, axes = operands(case, FORMATS[format])
    sizes = []

    def product(x: Any, w: Any, scale: Any, axis: int) -> Any:
        sizes.append(w.size)
        assert w.shape[axis] == x.shape[1]
        values = w.values(jnp.float32) * (1 if scale is None else broadcastable(scale))
        return lax.dot_general(x, values, (((1,), (axis,)), ((), ())))

    y = by_matrices(product, x, w, axes)
    want = reference.compute(Product(x, w, axes), Target())
    assert y.shape == want.shape
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    assert sizes == [w.size // PRODUCTS[case][-1]]
    assert holds_for_matrices(lambda *matrix: True, Product(x, w, axes), [jnp.float32])
    assert not holds_for_matrices(lambda *matrix: False, Product(x, w, axes), [jnp.float32])


OF_STACK = Axes((2,), (2,), (0,), (0,))
NO_MATRICES = {
    "packed along the batch": ((4, 2, 32), (4, 5, 32), 0, OF_STACK),
    "packed along what is mapped": ((2, 6), (4, 6, 5), 0, Axes((1,), (1,), (), ())),
    "outputs in between": ((4, 32), (4, 6, 32), 2, Axes((0, 1), (0, 2), (), ())),
    "tiles that would be torn": ((3, 4, 8), (4, 8, 6), 1, Axes((1, 2), (0, 1), (), ())),
    "no outputs": ((2, 32), (32,), 0, Axes((1,), (0,), (), ())),
    "nothing": ((0, 2, 32), (0, 5, 32), 2, OF_STACK),
}


@pytest.mark.parametrize("case", NO_MATRICES)
def test_no_matrices(case):
    x_shape, w_shape, axis, axes = NO_MATRICES[case]
    x, w = jnp.ones(x_shape), eqq.Array1B.quantize(jnp.ones(w_shape), axis=axis)
    assert not holds_for_matrices(lambda *matrix: True, Product(x, w, axes), [jnp.float32])
    if w.size:
        with pytest.raises(Unaligned):
            by_matrices(lambda *matrix: pytest.fail("no matrix"), x, w, axes)


def test_blocks_along_the_batch():
    w = eqq.Array8B.quantize(jnp.ones((4, 5, 32)), axis=0, block_size=2)
    product = Product(jnp.ones((4, 2, 32)), w, OF_STACK)
    assert not holds_for_matrices(lambda *matrix: True, product, [jnp.float32])
