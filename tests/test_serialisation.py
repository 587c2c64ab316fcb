"""Quantized arrays as the pytrees they are: saved, copied, split, updated, printed."""

import copy
import io
import pickle
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import normal

import eqquant as eqq


LAYOUTS = {
    "rows": {"axis": -1},
    "columns": {"axis": 0},
    "blocks": {"axis": -1, "block_size": 4},
    "partial blocks": {"axis": 0, "block_size": 5},
    "half precision": {"dtype": jnp.bfloat16},
}


@pytest.fixture(params=LAYOUTS)
def q(request: pytest.FixtureRequest) -> eqq.Array8B:
    return eqq.Array8B.quantize(normal(8, 12), **LAYOUTS[request.param])


@pytest.fixture
def model() -> Any:
    return eqq.quantize(mlp(0), eqq.Array8B.quantize)


def mlp(seed: int) -> eqx.nn.MLP:
    return eqx.nn.MLP(6, 4, 8, 2, key=jax.random.key(seed))


def zeros_like(tree: Any) -> Any:
    return jtu.tree_map(lambda leaf: jnp.zeros_like(leaf) if eqx.is_array(leaf) else leaf, tree)


def assert_same(got: Any, want: Any) -> None:
    """Equal in structure, and bit for bit in every leaf."""
    assert jtu.tree_structure(got) == jtu.tree_structure(want)
    for a, b in zip(*map(jtu.tree_leaves, (got, want)), strict=True):
        if eqx.is_array(b):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            np.testing.assert_array_equal(a, b)
        else:
            assert a is b or a == b


# -------------------------------------------------------------------------------- saved, copied


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(q, protocol):
    loaded = pickle.loads(pickle.dumps(q, protocol))
    assert_same(loaded, q)
    assert (loaded.dtype, loaded.block_size, loaded.axis) == (q.dtype, q.block_size, q.axis)
    np.testing.assert_array_equal(loaded.materialize(), q.materialize())


def test_pickle_of_a_cast_array(q):
    cast = q.astype(jnp.float16).astype(jnp.float32)
    assert_same(pickle.loads(pickle.dumps(cast)), cast)
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(cast)).materialize(), cast.materialize()
    )


def test_copies(q):
    assert_same(copy.copy(q), q)
    deep = copy.deepcopy(q)
    assert_same(deep, q)
    assert deep.weight is not q.weight
    assert deep.scale is not q.scale
    q.delete()
    assert np.isfinite(deep.materialize()).all()  # a copy has buffers of its own


def test_serialise_leaves(q):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, q)
    assert file.tell() <= q.nbytes + 2 * 128  # each leaf has a header
    file.seek(0)
    assert_same(eqx.tree_deserialise_leaves(file, zeros_like(q)), q)


def test_serialise_a_model(model, tmp_path):
    path = tmp_path / "model.eqx"
    eqx.tree_serialise_leaves(path, model)
    like = eqq.quantize(mlp(1), eqq.Array8B.quantize)
    loaded = eqx.tree_deserialise_leaves(path, like)
    assert_same(loaded, model)
    x = normal(6, seed=2)
    np.testing.assert_array_equal(eqq.implicit(loaded)(x), eqq.implicit(model)(x))


def test_serialise_onto_shapes_alone(q, tmp_path):
    eqx.tree_serialise_leaves(tmp_path / "q.eqx", q)
    like = eqx.filter_eval_shape(lambda q: q, q)
    assert_same(eqx.tree_deserialise_leaves(tmp_path / "q.eqx", like), q)


@pytest.mark.parametrize(
    "like",
    [
        lambda w: w,
        lambda w: eqq.Array8B.quantize(w, axis=0),
        lambda w: eqq.Array8B.quantize(w, block_size=3),
        lambda w: eqq.Array8B.quantize(w[:4]),
        lambda w: eqq.Array8B.quantize(w.T),
        lambda w: eqx.tree_at(lambda q: q.weight, eqq.Array8B.quantize(w), w),
    ],
    ids=["dense", "other axis", "blocks", "fewer rows", "transposed", "other dtype"],
)
def test_a_wrong_like_raises(like, tmp_path):
    w = normal(8, 12)
    eqx.tree_serialise_leaves(tmp_path / "q.eqx", eqq.Array8B.quantize(w))
    with pytest.raises((RuntimeError, ValueError)):
        eqx.tree_deserialise_leaves(tmp_path / "q.eqx", like(w))


def test_a_model_that_was_not_quantized_is_no_like(model, tmp_path):
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", model)
    with pytest.raises((RuntimeError, ValueError)):
        eqx.tree_deserialise_leaves(tmp_path / "model.eqx", mlp(0))


# --------------------------------------------------------------------------------------- leaves


def test_names_of_the_leaves(q, model):
    names = [jtu.keystr(path) for path, _ in jtu.tree_leaves_with_path(q)]
    assert names == [".scale", ".weight"]
    named = {
        jtu.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jtu.tree_leaves_with_path(model)
    }
    assert named["layers.0.weight.weight"].dtype == jnp.int8
    assert named["layers.0.weight.scale"].shape == (8, 1)
    assert named["layers.0.bias"].shape == (8,)


def test_flatten_and_unflatten(q):
    leaves, treedef = jtu.tree_flatten(q)
    assert_same(jtu.tree_unflatten(treedef, leaves), q)
    assert hash(treedef) == hash(jtu.tree_structure(q))
    assert treedef != jtu.tree_structure(q.astype(jnp.float16))
    hollow = jtu.tree_unflatten(treedef, [object(), None])  # JAX does so while it transforms
    assert jtu.tree_structure(hollow).num_leaves == 1


def test_device_get_and_put(q):
    host = jax.device_get(q)
    assert isinstance(host, eqq.Array8B)
    assert all(isinstance(leaf, np.ndarray) for leaf in jtu.tree_leaves(host))
    assert host.shape == q.shape
    back = jax.device_put(host)
    assert all(isinstance(leaf, jax.Array) for leaf in jtu.tree_leaves(back))
    assert_same(back, q)
    other = jax.devices()[1]
    moved = jax.device_put(q, other)
    assert {device for leaf in jtu.tree_leaves(moved) for device in leaf.devices()} == {other}
    np.testing.assert_array_equal(moved.materialize(), q.materialize())
    jax.block_until_ready(moved)


def test_eval_shape(q):
    shapes = jax.eval_shape(lambda q: q, q)
    assert isinstance(shapes, eqq.Array8B)
    assert (shapes.shape, shapes.dtype, shapes.ndim, shapes.size) == (q.shape, q.dtype, 2, q.size)
    assert shapes.nbytes == q.nbytes
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jtu.tree_leaves(shapes))
    assert jtu.tree_structure(shapes) == jtu.tree_structure(q)
    x = jax.ShapeDtypeStruct((12,), jnp.float32)
    assert jax.eval_shape(eqq.implicit(lambda q, x: q @ x), shapes, x).shape == (8,)
    assert jax.eval_shape(
        eqq.Array8B.quantize, jax.ShapeDtypeStruct((3, 4), jnp.float32)
    ).shape == (3, 4)


# -------------------------------------------------------------------------------------- Equinox


def test_filter_partition_and_combine(model):
    arrays, static = eqx.partition(model, eqx.is_array)
    assert_same(eqx.combine(arrays, static), model)
    floats, rest = eqx.partition(model, eqx.is_inexact_array)
    assert floats.layers[0].weight.weight is None
    assert rest.layers[0].weight.scale is None
    assert_same(eqx.combine(floats, rest), model)
    assert len(jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))) == 6  # 3 scales, 3 biases
    by_format = jtu.tree_map(eqq.is_implicit, model, is_leaf=eqq.is_implicit)
    packed, others = eqx.partition(model, by_format)
    assert len(jtu.tree_leaves(packed)) == 6  # 3 scales, 3 payloads
    assert jtu.tree_leaves(others.layers[0].weight) == []
    assert_same(eqx.combine(packed, others), model)


def test_tree_at(model):
    scale = 2 * model.layers[0].weight.scale
    doubled = eqx.tree_at(lambda m: m.layers[0].weight.scale, model, scale)
    np.testing.assert_array_equal(
        doubled.layers[0].weight.materialize(), 2 * model.layers[0].weight.materialize()
    )
    dense = eqx.tree_at(
        lambda m: m.layers[0].weight,
        model,
        replace_fn=lambda w: w.materialize(),
        is_leaf=eqq.is_implicit,
    )
    assert isinstance(dense.layers[0].weight, jax.Array)
    again = eqx.tree_at(lambda m: m.layers[0].weight, dense, model.layers[0].weight)
    assert_same(again, model)


def test_tree_equal(q):
    assert eqx.tree_equal(q, copy.deepcopy(q))
    assert not eqx.tree_equal(q, eqx.tree_at(lambda q: q.scale, q, 2 * q.scale))
    assert not eqx.tree_equal(q, eqx.tree_at(lambda q: q.weight, q, q.weight ^ 1))
    assert not eqx.tree_equal(q, q.astype(jnp.float16))
    assert not eqx.tree_equal(q, q.materialize())
    assert eqx.tree_equal(q, jax.device_get(q), typematch=False)


def test_repr_of_incomplete_arrays(model):
    q = model.layers[0].weight
    assert repr(q).startswith(
        "Array8B(float32[8,6], 13.33 bits/weight, scale=float32[8,1], weight=int8"
    )
    assert "Array8B" in repr(eqx.filter(q, eqx.is_inexact_array))
    assert "weight=None" in repr(eqx.filter(q, eqx.is_inexact_array))
    assert "Array8B" in repr(jtu.tree_map(lambda _: None, q))
    assert "Array8B" in repr(jtu.tree_map(lambda _: True, q))
    assert "Array8B" in repr(jtu.tree_structure(q))
    assert "float32[8,6]" in repr(jax.eval_shape(lambda q: q, q))
    assert "Array8B" in str(model)
    assert "Array8B" in eqx.tree_pformat(model)


# ---------------------------------------------------------------------------------------- optax


@pytest.mark.parametrize("optimizer", [optax.sgd(1e-5), optax.adam(1e-4)], ids=["sgd", "adam"])
def test_training_what_is_not_quantized(model, optimizer):
    """The usual loop of Equinox; biases and scales are trained, codes cannot be."""
    x, y = normal(32, 6, seed=3), normal(32, 4, seed=4)

    @eqx.filter_value_and_grad
    def loss_and_gradient(trained: Any, frozen: Any) -> Any:
        model = eqq.implicit(eqx.combine(trained, frozen))
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    @eqx.filter_jit
    def step(trained: Any, frozen: Any, state: Any) -> Any:
        loss, gradient = loss_and_gradient(trained, frozen)
        updates, state = optimizer.update(gradient, state, trained)
        return eqx.apply_updates(trained, updates), state, loss

    trained, frozen = eqx.partition(model, eqx.is_inexact_array)
    state = optimizer.init(trained)
    losses = []
    with eqq.strict():
        for _ in range(20):
            trained, state, loss = step(trained, frozen, state)
            losses.append(float(loss))
    assert losses[-1] < losses[0]
    after = eqx.combine(trained, frozen)
    assert jtu.tree_structure(after) == jtu.tree_structure(model)
    for old, new in zip(model.layers, after.layers, strict=True):
        np.testing.assert_array_equal(new.weight.weight, old.weight.weight)
        assert not np.array_equal(new.weight.scale, old.weight.scale)
        assert not np.array_equal(new.bias, old.bias)


def test_optimizer_state_of_biases_alone(model):
    optimizer = optax.adamw(1e-2)
    biases = jtu.tree_map(lambda _: False, model)
    biases = eqx.tree_at(lambda m: [layer.bias for layer in m.layers], biases, [True] * 3)
    trained, frozen = eqx.partition(model, biases)
    state = optimizer.init(trained)
    assert sum(leaf.size for leaf in jtu.tree_leaves(state)) == 2 * (8 + 8 + 4) + 1

    def loss(trained: Any) -> Any:
        return jnp.sum(eqq.implicit(eqx.combine(trained, frozen))(jnp.ones(6)) ** 2)

    with eqq.strict():
        gradient = eqx.filter_grad(loss)(trained)
    updates, _ = optimizer.update(gradient, state, trained)
    after = eqx.combine(eqx.apply_updates(trained, updates), frozen)
    for new, old in zip(after.layers, model.layers, strict=True):
        assert_same(new.weight, old.weight)
    assert not eqx.tree_equal(after.layers[0].bias, model.layers[0].bias)
