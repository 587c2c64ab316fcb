"""Indices of few bits: axes longer than the largest number of their dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from jax import lax

import eqquant as eqq


ARRAYS = {
    "scales of rows": eqq.Array8B.quantize(normal(300, 8)),
    "scales of blocks of rows": eqq.Array8B.quantize(normal(300, 8), axis=0, block_size=16),
    "packed": eqq.ArrayNF4.quantize(normal(300, 64)),
}
PROGRAMS = {
    "take": lambda x, i: jnp.take(x, i, axis=0),
    "take, clipped": lambda x, i: jnp.take(x, i, axis=0, mode="clip"),
    "slice": lambda x, i: lax.dynamic_slice_in_dim(x, i[1], 3, 0),
    "row": lambda x, i: lax.dynamic_index_in_dim(x, i[1], 0),
    "slices": lambda x, i: jax.vmap(lambda j: lax.dynamic_slice_in_dim(x, j, 2, 0))(i),
}


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int16, jnp.uint32], ids=jnp.dtype)
@pytest.mark.parametrize("array", ARRAYS)
def test_limits_are_not_cast_to_the_dtype_of_an_index(array, dtype):
    x, indices = ARRAYS[array], jnp.asarray([0, 90, 120], dtype)
    dense = x.materialize()
    for name, program in PROGRAMS.items():
        with eqq.on_materialize("ignore"):
            got = eqq.materialize(eqq.implicit(program)(x, indices))
        np.testing.assert_array_equal(got, program(dense, indices), err_msg=name)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int16, jnp.uint32], ids=jnp.dtype)
def test_updates_start_at_indices_of_few_bits(dtype):
    x = ARRAYS["scales of rows"]

    def program(x, start):
        return lax.dynamic_update_slice_in_dim(x, x[:1], start, 0)

    with eqq.strict():
        got = eqq.implicit(program)(x, jnp.asarray(90, dtype))
    assert isinstance(got, eqq.Array8B)
    # XLA's own update of a dense array casts the limit to 8 bits: compare with a wide index.
    np.testing.assert_array_equal(got.materialize(), program(x.materialize(), jnp.asarray(90)))


def test_sizes_of_groups_of_few_bits():
    x, w = normal(300, 8), eqq.Array8B.quantize(normal(3, 8, 4), axis=1)
    sizes = jnp.asarray([100, 120, 80])
    got = eqq.implicit(lax.ragged_dot)(x, w, sizes.astype(jnp.int8))
    np.testing.assert_allclose(got, lax.ragged_dot(x, w.materialize(), sizes), atol=1e-4)
