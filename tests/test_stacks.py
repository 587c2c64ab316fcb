"""A stack that is quantized as a whole can be taken apart leaf by leaf, in every format."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import assert_raises, normal
from jax import lax

import eqquant as eqq
from eqquant.testing import LAYOUTS


# Magnitudes differ from entry to entry: whatever they shared would show.
STACK = normal(3, 6, 128) * jnp.asarray([1.0, 1e-3, 1e3])[:, None, None]
X = normal(128, seed=1)


def assert_same_leaves(a, b):
    for x, y in zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)  # XLA may divide many by one number otherwise


@pytest.mark.parametrize("name", LAYOUTS)
def test_entries_of_a_stack(name):
    quantize = LAYOUTS[name]
    q = quantize(STACK)
    assert q.shape == STACK.shape
    dense = q.materialize()
    for i in range(3):
        entry = jax.tree.map(lambda leaf, i=i: leaf[i], q)
        np.testing.assert_array_equal(entry.materialize(), dense[i])
        assert_same_leaves(entry, quantize(STACK[i]))
        np.testing.assert_array_equal(q[i].materialize(), dense[i])
    part = jax.tree.map(lambda leaf: leaf[1:], q)
    np.testing.assert_array_equal(part.materialize(), dense[1:])
    want = jax.vmap(lambda w: w @ X)(dense)
    each = {
        "vmap": lambda: jax.vmap(lambda q: q @ X)(q),
        "vmap of implicit": lambda: jax.vmap(eqq.implicit(lambda w: w @ X))(q),
        "implicit of vmap": lambda: eqq.implicit(jax.vmap(lambda w: w @ X))(q),
        "scan": lambda: lax.scan(lambda c, q: (c, q @ X), 0, q)[1],
    }
    for how, run in each.items():
        tolerance = dict(rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))
        np.testing.assert_allclose(run(), want, err_msg=how, **tolerance)


@pytest.mark.parametrize("name", ["nf4 double", "nvfp4"])
def test_stacks_of_stacks_are_quantized_entry_by_entry(name):
    quantize = LAYOUTS[name]
    stack = STACK.reshape(3, 2, 3, 128)
    q = jax.vmap(jax.vmap(quantize))(stack)
    entry = jax.tree.map(lambda leaf: leaf[2, 1], q)
    assert_same_leaves(entry, quantize(stack[2, 1]))
    got = jax.vmap(jax.vmap(lambda q: q @ X))(q)
    np.testing.assert_allclose(got, q.materialize() @ X, rtol=1e-4, atol=1e-2)
    whole = quantize(stack)  # one level is free
    np.testing.assert_array_equal(
        jax.tree.map(lambda leaf: leaf[1], whole).materialize(), whole.materialize()[1]
    )


@pytest.mark.parametrize("name", ["nf4 double", "nvfp4"])
def test_an_array_that_is_packed_along_its_first_axis_is_no_stack(name):
    q = LAYOUTS[name](STACK, axis=0)
    small = [leaf for leaf in jtu.tree_leaves(q) if leaf.size == 1]
    assert small  # what is found once for the array
    with pytest.raises((ValueError, IndexError)):  # never wrong numbers
        jax.tree.map(lambda leaf: leaf[1], q).materialize()
    np.testing.assert_array_equal(eqq.implicit(lambda w: w.T)(q).materialize(), q.materialize().T)


@pytest.mark.parametrize("name", ["nf4 double", "nvfp4"])
def test_empty_stacks_and_numbers_that_are_not_finite(name):
    for shape in ((0, 4, 128), (2, 0, 128), (2, 4, 0)):
        assert LAYOUTS[name](jnp.ones(shape)).materialize().shape == shape
    bad = STACK.at[2, 1, 5].set(jnp.nan)
    assert_raises(lambda: LAYOUTS[name](bad), ValueError, ["array[2, 1, 5] is nan"])
    traced = jax.jit(LAYOUTS[name])(bad).materialize()
    assert bool(jnp.isfinite(traced[:2]).all()) and bool(jnp.isnan(traced[2]).any())
