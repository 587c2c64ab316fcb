"""Functions that visit the stored leaves, as `jax.tree.map` and optimizers do: zeros are zero in every format."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal

import eqquant as eqq
from eqquant.testing import QUANTIZERS


W, X = normal(6, 64), normal(64, seed=1)
TRITS = jnp.sign(W).astype(jnp.int8)
BITS = (W > 0).astype(jnp.int8)
ARRAYS = {name: (lambda each=each: each(W)) for name, each in QUANTIZERS.items()} | {
    "ternary integers": lambda: eqq.Array1B.quantize(TRITS),
    "ternary integers as floats": lambda: eqq.Array1B.quantize(TRITS, jnp.bfloat16),
    "ternary integers in tiles": lambda: eqq.Array1B.quantize(TRITS, tile=32),
    "ternary integers, by hand": lambda: eqq.Array1B(
        eqq.Array1B.quantize(TRITS).weight, shape=(6, 64)
    ),
    "ternary integers, no axes": lambda: eqq.Array1B.quantize(TRITS[0, 0]),
    "binary integers": lambda: eqq.Array1B.quantize(TRITS, levels="binary"),
    "rsr binary integers": lambda: eqq.RSROperatorBinary.quantize(BITS),
    "rsr ternary integers": lambda: eqq.RSROperatorTernary.quantize(TRITS),
    "column by column": lambda: eqq.column_major(eqq.Array1B.quantize(TRITS)),
    "all zero": lambda: eqq.Array8B.quantize(jnp.zeros((6, 64))),
}
ZEROS = {
    "zeros_like": jnp.zeros_like,
    "zeros_like of NumPy": lambda leaf: np.zeros(leaf.shape, leaf.dtype),
    "times 0": lambda leaf: leaf * leaf.dtype.type(0),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_zeros_are_zero(name):
    q = ARRAYS[name]()
    for how, zero in ZEROS.items():
        zeros = jax.tree.map(zero, q)
        assert (zeros.shape, zeros.dtype) == (q.shape, q.dtype)
        np.testing.assert_array_equal(zeros.materialize(), 0, err_msg=how)
    made = jax.jit(lambda q: jax.tree.map(jnp.zeros_like, q))(q)
    np.testing.assert_array_equal(made.materialize(), 0)
    if q.ndim == 2:
        np.testing.assert_array_equal(eqq.implicit(lambda w: w.astype(jnp.float32) @ X)(made), 0)
        np.testing.assert_array_equal(eqq.implicit(lambda w: w[1:3].T)(made).materialize(), 0)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_states_of_optimizers_begin_at_zero(name):
    state = optax.adam(1e-3).init(eqx.filter({"w": QUANTIZERS[name](W)}, eqx.is_array))
    np.testing.assert_array_equal(state[0].mu["w"].materialize(), 0)


def test_integers_are_exact_although_they_have_a_scale():
    for levels in ("ternary", "binary"):
        trits = jnp.where(W > 0, 1, -1).astype(jnp.int8) if levels == "binary" else TRITS
        q = eqq.Array1B.quantize(trits, jnp.float32, levels=levels)
        assert q.scale.nbytes == 1 and not eqx.is_inexact_array(q.scale)
        np.testing.assert_array_equal(q @ jnp.arange(64.0), trits @ jnp.arange(64.0))
        doubled = 200 * q  # more than 8 bits hold
        assert isinstance(doubled, eqq.Array1B)
        np.testing.assert_array_equal(doubled.materialize(), 200.0 * trits)
        assert isinstance(eqq.implicit(jnp.concatenate)([q, q]), eqq.Array1B)
        scaled = eqq.Array1B.quantize(W, levels=levels)
        with eqq.on_materialize("ignore"):  # an int8 scale does not meet a float32 one
            mixed = eqq.implicit(jnp.concatenate)([q, scaled])
        np.testing.assert_array_equal(mixed, jnp.concatenate([trits, scaled.materialize()]))
