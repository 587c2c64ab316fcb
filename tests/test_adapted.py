"""Adapted weights in convolutions, embeddings and stacks of experts: base and factors stay apart."""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import adapted_array, ADAPTED_BASES, assert_raises, in_turns, normal
from jax import lax

import eqquant as eqq
from eqquant import lora


KEY = jax.random.key(0)


def assert_agrees(f: Callable[..., Any], w: Any, *others: Any) -> Any:
    """That a program agrees with itself on the materialized array, and makes nothing dense."""
    with eqq.strict():
        got = jax.jit(eqq.implicit(f))(w, *others)
    dense = eqq.materialize(got)
    want = f(w.materialize(), *others)
    assert (dense.shape, dense.dtype) == (want.shape, want.dtype)
    np.testing.assert_allclose(dense, want, rtol=1e-4, atol=1e-4)
    return got


# ------------------------------------------------------------------------------------ convolutions

CONVOLUTIONS: dict[str, Callable[[], Any]] = {
    "plain": lambda: eqx.nn.Conv2d(4, 6, 3, key=KEY),
    "one axis, strided and dilated": lambda: eqx.nn.Conv1d(4, 6, 3, 2, 1, 2, key=KEY),
    "grouped": lambda: eqx.nn.Conv2d(4, 6, 3, groups=2, key=KEY),
    "depthwise": lambda: eqx.nn.Conv2d(4, 8, 3, groups=4, padding="SAME", key=KEY),
    "of one point": lambda: eqx.nn.Conv2d(4, 6, 1, key=KEY),
    "three axes": lambda: eqx.nn.Conv3d(4, 6, 2, key=KEY),
    "transposed": lambda: eqx.nn.ConvTranspose2d(4, 6, 3, 2, 1, key=KEY),
    "transposed, grouped": lambda: eqx.nn.ConvTranspose2d(4, 6, 3, 2, groups=2, key=KEY),
}


def adapted_layer(layer: Any, base: str, **options: Any) -> Any:
    """With an adapter that does something."""
    layer = eqx.tree_at(lambda layer: layer.weight, layer, replace_fn=ADAPTED_BASES[base])
    layer = lora.add(layer, "weight", key=KEY, **{"rank": 2} | options)
    return eqx.tree_at(
        lambda layer: layer.weight.b, layer, replace_fn=lambda b: b + normal(*b.shape)
    )


def convolved(layer: Any, w: Any, x: Any) -> Any:
    return eqx.tree_at(lambda layer: layer.weight, layer, w)(x)


@pytest.mark.parametrize(("name", "base"), in_turns(CONVOLUTIONS, list(ADAPTED_BASES), each=1))
def test_a_convolution_keeps_base_and_adapter_apart(name: str, base: str) -> None:
    layer = adapted_layer(CONVOLUTIONS[name](), base)
    out, into, *window = layer.weight.shape
    assert layer.weight.a.shape == (2, into, *window) and layer.weight.b.shape == (out, 2)
    x = normal(4, *[7] * layer.num_spatial_dims)
    assert_agrees(partial(convolved, layer), layer.weight, x)


def test_the_factors_of_a_kernel_are_those_of_one_matrix() -> None:
    layer = lora.add(eqx.nn.Conv2d(32, 64, 3, key=KEY), rank=4, key=KEY)
    w = layer.weight
    assert w.window_axes == 2 and w.a.size + w.b.size == 4 * (32 * 9) + 64 * 4
    assert float(jnp.abs(w.a).max()) <= (32 * 9) ** -0.5
    w = w.replace(b=normal(64, 4))
    rows = w.base.reshape(64, -1) + w.scale * w.b @ w.a.reshape(4, -1)
    np.testing.assert_allclose(w.materialize(), rows.reshape(w.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["plain", "one axis, strided and dilated", "grouped", "transposed"]
)
def test_derivatives_of_a_convolution_are_those_of_the_dense_one(name: str) -> None:
    layer = adapted_layer(CONVOLUTIONS[name](), "int8")
    x = normal(4, *[7] * layer.num_spatial_dims)

    def loss(evaluate: Any, factors: Any, x: Any) -> Any:
        a, b = factors
        return jnp.sum(
            jnp.sin(evaluate(partial(convolved, layer))(layer.weight.replace(a=a, b=b), x))
        )

    def dense(f: Any) -> Any:
        return lambda w, x: f(w.materialize(), x)

    factors = layer.weight.a, layer.weight.b
    with eqq.strict():
        got = jax.jit(jax.grad(partial(loss, eqq.implicit), (0, 1)))(factors, x)
    want = jax.jit(jax.grad(partial(loss, dense), (0, 1)))(factors, x)
    for g, w in zip(*map(jtu.tree_leaves, (got, want)), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-4)


def test_the_derivative_inside_keeps_them_apart() -> None:
    layer = adapted_layer(CONVOLUTIONS["plain"](), "int8")

    def gradient(w: Any, x: Any) -> Any:
        return jax.grad(lambda x: jnp.sum(jnp.sin(convolved(layer, w, x))))(x)

    assert_agrees(gradient, layer.weight, normal(4, 7, 7))


@pytest.mark.parametrize("base", ["dense", "nf4 double"])
def test_convolutions_under_vmap_and_scan(base: str) -> None:
    layer = adapted_layer(CONVOLUTIONS["plain"](), base)
    xs = normal(5, 4, 7, 7)
    assert_agrees(lambda w, xs: jax.vmap(partial(convolved, layer, w))(xs), layer.weight, xs)
    assert_agrees(lambda w, xs: lax.map(partial(convolved, layer, w), xs), layer.weight, xs)


def test_a_stack_of_layers_is_known_by_its_layer() -> None:
    @eqx.filter_vmap
    def layers(key: Any) -> Any:
        return eqx.nn.Conv2d(4, 6, 3, key=key)

    stack = lora.add(layers(jax.random.split(KEY, 3)), "weight", rank=2, key=KEY)
    assert stack.weight.a.shape == (3, 2, 4, 3, 3) and stack.weight.b.shape == (3, 6, 2)
    stack = eqx.tree_at(lambda s: s.weight.b, stack, normal(3, 6, 2))
    x = normal(4, 7, 7)
    with eqq.strict():
        got = eqx.filter_vmap(lambda layer: eqq.implicit(layer)(x))(stack)
        _, scanned = lax.scan(lambda _, layer: (None, eqq.implicit(layer)(x)), None, stack)
    want = eqx.filter_vmap(lambda layer: layer(x))(eqq.materialize(stack))
    for each in (got, scanned):
        np.testing.assert_allclose(each, want, rtol=1e-4, atol=1e-4)

    @eqx.filter_vmap
    def matrices(key: Any) -> Any:
        return eqx.nn.MLP(4, 6, 8, 1, key=key)

    model = lora.add(matrices(jax.random.split(KEY, 3)), "layers.*.weight", rank=2, key=KEY)
    assert model.layers[0].weight.b.shape == (3, 8, 2)


def test_what_no_layer_says_has_to_be_said() -> None:
    model = {"experts": normal(3, 8, 16), "kernel": normal(8, 4, 3, 3), "matrix": normal(8, 16)}
    add = partial(lora.add, model, rank=2, key=KEY)
    adapted = add(window_axes={"kernel": 2, "*": 0})
    assert adapted["experts"].b.shape == (3, 8, 2) and adapted["experts"].window_axes == 0
    assert adapted["kernel"].a.shape == (2, 4, 3, 3) and adapted["matrix"].a.shape == (2, 16)
    kernel = lora.add({k: model[k] for k in ("kernel", "matrix")}, rank=2, key=KEY, window_axes=2)
    assert kernel["kernel"].window_axes == 2 and kernel["matrix"].window_axes == 0
    layer = eqx.nn.Conv2d(4, 6, 3, key=KEY)
    for make, words in [
        (add, ["'experts'", "(3, 8, 16)", "stack of matrices", "window_axes=0", "window_axes={'experts': 0}"]),
        (partial(add, "kernel", window_axes=3), ["two axes", "window_axes=3", "'kernel'", "(8, 4, 3, 3)"]),
        (partial(add, window_axes={"kernels": 2}), ["'kernels' matches no", "'kernel'"]),
        (
            partial(lora.add, layer, "weight", rank=2, key=KEY, window_axes={"weight": 0}),
            ["'weight'", "window of 2 axes", "says 0"],
        ),
        (
            partial(lora.add, layer, "weight", rank=37, key=KEY),
            ["both sides", "rank=37", "(6, 4, 3, 3)", "as a matrix (6, 36)"],
        ),
        (
            lambda: lora.AdaptedArray(normal(6, 4, 3), normal(2, 4), normal(6, 2), 1.0, 0.0, window_axes=1),
            ["(6, 4, 3)", "window_axes=1", "*window", "(2, 4)"],
        ),
    ]:  # fmt: skip
        assert_raises(make, ValueError, words)
    assert lora.add(layer, "weight", rank=36, key=KEY).weight.rank == 36


def test_a_kernel_in_and_out_of_files_reports_and_merging() -> None:
    layer = adapted_layer(eqx.nn.Conv2d(16, 8, 3, key=KEY), "int8")
    q = layer.weight
    assert eqq.describe(q)["facts"]["window_axes"] == 2
    skeleton = eqq.from_description(eqq.describe(q))
    assert jtu.tree_structure(skeleton) == jtu.tree_structure(q) and skeleton.shape == q.shape
    file = io.BytesIO()
    both = dict(is_leaf=eqq.is_implicit)
    eqx.tree_serialise_leaves(file, layer, eqq.serialise_filter_spec, **both)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, layer, eqq.deserialise_filter_spec, **both)
    assert eqx.tree_equal(loaded, layer)

    (row,) = (
        r for r in eqq.report(eqx.nn.Conv2d(16, 8, 3, key=KEY), layer).rows if r.path == "weight"
    )
    assert row.format == "AdaptedArray" and row.nbytes == q.base.nbytes + 4 * (2 * 16 * 9 + 8 * 2)
    merged, errors = lora.merge(layer, eqq.Array8B.quantize)
    assert merged.weight.shape == q.shape and errors.rows[0].sqnr_db > 30
    merged, errors = lora.merge(layer)
    x = normal(16, 5, 5)
    np.testing.assert_allclose(merged(x), eqq.implicit(layer)(x), rtol=1e-4, atol=1e-4)


def test_dropout_hides_whole_channels() -> None:
    layer = adapted_layer(eqx.nn.Conv2d(32, 8, 3, key=KEY), "dense", dropout=0.5)
    a = lora.dropout(layer, KEY).weight.a
    hidden = (a == 0).all((0, 2, 3))
    assert 0 < int(hidden.sum()) < 32
    np.testing.assert_allclose(a[:, ~hidden], 2 * layer.weight.a[:, ~hidden], rtol=1e-6)


# ---------------------------------------------------------------------------------------- indexing

ROW, COLUMN, ENTRY = jnp.array([3, 1, 3]), jnp.array([2, 0, 5]), jnp.array([1, 2, 0])
ROWS: dict[str, Callable[..., Any]] = {
    "index": lambda w: w[ROW],
    "take": lambda w: jnp.take(w, ROW, axis=0),
    "take, clipped": lambda w: jnp.take(w, ROW + 9, axis=0, mode="clip"),
    "outside": lambda w: jnp.take(w, 50 * ROW, axis=0, mode="fill", fill_value=7.0),
    "one": lambda w: w[ROW[1]],
    "fixed": lambda w: w[-2],
    "vmap": lambda w: jax.vmap(lambda i: w[i])(ROW),
    "many indices": lambda w: w[ROW[:, None] + ENTRY],
}
PARTS: dict[str, Callable[..., Any]] = {
    "slice": lambda w: w[2:10:3],
    "reversed": lambda w: w[::-1],
    "dynamic": lambda w: lax.dynamic_slice_in_dim(w, ROW[0], 4),
    "expanded": lambda w: w[None],
    "broadcast": lambda w: jnp.broadcast_to(w, (3, *w.shape)),
    "halves": lambda w: jnp.split(w, 2)[1],
    "no axis of length 1": lambda w: w.reshape(1, 12, 64)[0],
}
ENTRIES: dict[str, Callable[..., Any]] = {
    "index": lambda w: w[ENTRY],
    "one": lambda w: w[ENTRY[1]],
    "fixed": lambda w: w[1],
    "axes merged": lambda w: w.reshape(3, 1, 8, 64).reshape(-1, 8, 64),
    "moved": lambda w: jnp.moveaxis(w[None], 0, 1),
    "unstacked": lambda w: jnp.unstack(w)[2],
    "stacked": lambda w: jnp.stack([w[2], w[0]]),
    "joined": lambda w: jnp.concatenate([w, w[:1]]),
    "vmap": lambda w: jax.vmap(lambda i: w[i])(ENTRY),
    "select": lambda w: lax.select_n(ENTRY[0] > 0, w[0], w[1]),
}


@pytest.mark.parametrize(("name", "base"), in_turns(ROWS, list(ADAPTED_BASES), each=2))
def test_rows_are_computed_alone(name: str, base: str) -> None:
    got = assert_agrees(ROWS[name], adapted_array(12, 64, base=base))
    assert isinstance(got, jax.Array)


@pytest.mark.parametrize(("name", "base"), in_turns(PARTS, list(ADAPTED_BASES), each=2))
def test_parts_stay_adapted(name: str, base: str) -> None:
    got = assert_agrees(PARTS[name], adapted_array(12, 64, base=base))
    assert isinstance(got, lora.AdaptedArray)


@pytest.mark.parametrize(("name", "base"), in_turns(ENTRIES, list(ADAPTED_BASES), each=2))
def test_entries_of_a_stack_stay_adapted(name: str, base: str) -> None:
    w = adapted_array(3, 8, 64, base=base)
    w = w.replace(
        base=ADAPTED_BASES[base](w.base.materialize() if eqq.is_implicit(w.base) else w.base)
    )
    got = assert_agrees(ENTRIES[name], w)
    assert isinstance(got, lora.AdaptedArray)


@pytest.mark.parametrize("base", ["dense", "int8"])
def test_columns_and_elements_are_computed_alone(base: str) -> None:
    w, stack = adapted_array(12, 64, base=base), adapted_array(3, 8, 64, base=base)
    for f in (
        lambda w: w[:, ROW],
        lambda w: w[ROW, COLUMN],
        lambda w: w[:, 5],
        lambda w: w[:, COLUMN[0]],
    ):
        assert isinstance(assert_agrees(f, w), jax.Array)
    for f in (
        lambda w: w[ENTRY, ROW],
        lambda w: w[:, ROW],
        lambda w: w[ENTRY, :, COLUMN],
        lambda w: w[:, 2],
    ):
        assert isinstance(assert_agrees(f, stack), jax.Array)
    assert_agrees(lambda w: jax.vmap(lambda w, i: w[i])(w, ENTRY), stack)


@pytest.mark.parametrize("base", ["dense", "nf4 double"])
def test_experts(base: str) -> None:
    w = adapted_array(3, 8, 64, base=base)
    x, gates, sizes = normal(5, 64), normal(5, 3, seed=1), jnp.array([2, 1, 2])
    assert_agrees(lambda w, x: lax.ragged_dot(x, w.mT, sizes), w, x)
    assert_agrees(lambda w, x: lax.ragged_dot(x, w, sizes), w, x[:, :8])
    assert_agrees(lambda w, x: jnp.einsum("bi,loi->lbo", x, w), w, x)
    assert_agrees(lambda w, x, g: jnp.einsum("bl,bi,loi->bo", g, x, w), w, x, gates)
    assert_agrees(lambda w, x: jax.vmap(lambda e, x: w[e] @ x)(ENTRY, x[:3]), w, x)
    assert_agrees(lambda w, x: jnp.einsum("oi,loi->l", x[:, :64], w[:, :5]), w, x)


def test_the_derivative_of_a_lookup_is_that_of_the_dense_one() -> None:
    w = adapted_array(12, 64)

    def loss(f: Any, factors: Any) -> Any:
        return jnp.sum(jnp.sin(f(w.replace(a=factors[0], b=factors[1]))))

    got = jax.jit(jax.grad(partial(loss, eqq.implicit(lambda w: w[ROW]))))((w.a, w.b))
    want = jax.jit(jax.grad(partial(loss, lambda w: w.materialize()[ROW])))((w.a, w.b))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


def test_what_is_not_served_is_dense_and_says_so() -> None:
    kernel = adapted_array(6, 4, 3, base="int8", window_axes=1)
    for f in (lambda w: w.T, lambda w: w.reshape(8, 9), lambda w: jnp.concatenate([w, w])):
        with pytest.warns(eqq.MaterializeWarning, match="AdaptedArray"):
            got = eqq.implicit(f)(kernel)
        np.testing.assert_array_equal(got, f(kernel.materialize()))
