"""Low-rank adapters: products, derivatives, models in and out, and what is trained and saved."""

import dataclasses
import io
from functools import partial

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import adapted_array, ADAPTED_BASES as BASES, assert_raises, small_mlp, train
from jax.ad_checkpoint import checkpoint_name

import eqquant as eqq
from eqquant import lora, testing


each_base = pytest.mark.parametrize("base", BASES)


def adapted_model(base="nf4 double", **options):
    """A model whose adapters do something."""
    model = small_mlp() if base == "dense" else eqq.quantize(small_mlp(), BASES[base])
    model = lora.add(model, rank=2, key=jax.random.key(1), **options)
    return eqx.tree_at(
        lambda m: [layer.weight.b for layer in m.layers], model, replace_fn=lambda b: b + 0.1
    )


X = jnp.linspace(-1, 1, 5 * 16).reshape(5, 16)


@each_base
def test_at_first_the_model_computes_exactly_what_it_did(base):
    model = small_mlp() if base == "dense" else eqq.quantize(small_mlp(), BASES[base])
    adapted = lora.add(model, rank=2, key=jax.random.key(1))
    np.testing.assert_array_equal(adapted(X[0]), model(X[0]))


PROGRAMS = {
    "x @ w.T": lambda x, w: x @ w.T,
    "w @ x.T": lambda x, w: w @ x.T,
    "x.T[:8] @ ...": lambda x, w: x[:, :8] @ w,
    "w.T @ y": lambda x, w: w.T @ x[:, :8].T,
    "vector": lambda x, w: w @ x[0],
    "einsum": lambda x, w: jnp.einsum("bi,oi->ob", x, w),
    "vmap": lambda x, w: jax.vmap(lambda row: w @ row)(x),
    "scan": lambda x, w: jax.lax.scan(lambda c, row: (c, w @ row), 0, x)[1],
    "checkpoint": jax.checkpoint(lambda x, w: x @ w.T),
    "cast": lambda x, w: x.astype(jnp.bfloat16) @ w.T.astype(jnp.bfloat16),
}


@each_base
@pytest.mark.parametrize("program", PROGRAMS)
def test_products_keep_base_and_factors_apart(base, program):
    w, run = adapted_array(8, 16, base=base), PROGRAMS[program]
    with eqq.strict():
        got = jax.jit(eqq.implicit(run))(X, w)
    want = run(X, w.materialize())
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    tolerance = 16 * 40 * float(jnp.finfo(got.dtype).eps)
    np.testing.assert_allclose(np.float64(got), np.float64(want), rtol=tolerance, atol=tolerance)


@each_base
def test_stacks_under_scan_and_vmap(base):
    w = adapted_array(3, 8, 16, base="dense")
    if base != "dense":
        w = w.replace(base=jax.vmap(BASES[base])(w.base))
    dense = w.materialize()
    with eqq.strict():
        inside = eqq.implicit(lambda w: jax.lax.map(lambda w: X @ w.T, w))(w)
        mapped = jax.vmap(lambda w: eqq.implicit(lambda w: X @ w.T)(w))(w)
        batched = eqq.implicit(lambda w: jnp.einsum("lbi,loi->lbo", jnp.stack([X] * 3), w))(w)
    for got in (inside, mapped, batched):
        np.testing.assert_allclose(got, jnp.einsum("bi,loi->lbo", X, dense), rtol=1e-4, atol=1e-4)


@st.composite
def adapted_arrays(draw, shape, dtype=jnp.float32):
    """Over a base of any format, or a dense one: matrices, stacks of them, and kernels of convolutions."""
    window_axes = draw(st.integers(0, len(shape) - 2))
    first = len(shape) - 2 - window_axes
    batch, out, inner = shape[:first], shape[first], shape[first + 1 :]
    rng, rank = testing.generator(draw), draw(st.integers(1, 2))
    dense = jnp.asarray(rng.normal(size=shape), dtype)
    base = draw(st.one_of(st.just(dense), testing.arrays(shape, dtype)))
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((rank, *inner), (out, rank)))
    a, b = (jnp.broadcast_to(x, (*batch, *x.shape)) for x in (a, b))
    return lora.AdaptedArray(base, a, b, 0.5, 0.0, window_axes=window_axes)


MATRIX_LAWS = [name for name, law in testing.LAWS.items() if max(law.ranks) > 1]


@pytest.mark.parametrize("law", MATRIX_LAWS)
@pytest.mark.parametrize("mode", ["eager", "grad"])
def test_laws(law, mode):
    law = testing.LAWS[law]
    # Parts of the product of the factors are products of their own, which are rounded as they are compiled.
    ranks = tuple(rank for rank in law.ranks if rank > 1)
    exact = law.exact and "convert_element_type" in law.primitives
    terms = law.terms if exact else lambda x: 100 * x.size
    law = dataclasses.replace(law, ranks=ranks, exact=exact, terms=terms)
    max_examples = -(-hypothesis.settings().max_examples // 5)
    testing.check_law(law, adapted_arrays, mode, max_examples=max_examples)


@each_base
def test_a_factor_keeps_base_and_adapter_apart(base):
    w = adapted_array(8, 16, base=base)
    programs = [
        lambda w: -w, lambda w: 2 * w, lambda w: w / 3, lambda w: w.T * 0.5,
        lambda w: jax.lax.reduce_precision(w, 8, 23), lambda w: checkpoint_name(w, "weight"),
    ]  # fmt: skip
    for program in programs:
        with eqq.strict():
            got = eqq.implicit(program)(w)
        assert isinstance(got, lora.AdaptedArray)
        np.testing.assert_allclose(
            got.materialize(), program(w.materialize()), rtol=1e-5, atol=1e-6
        )


def test_what_has_no_adapted_form_is_dense_and_says_so():
    w = adapted_array(8, 16)
    with pytest.warns(eqq.MaterializeWarning, match="AdaptedArray"):
        more = eqq.implicit(lambda w: w + 1)(w)
    np.testing.assert_array_equal(more, w.materialize() + 1)


@each_base
def test_derivatives_are_those_of_the_dense_model(base):
    model = adapted_model(base)

    def loss(trained, frozen, x, evaluate):
        return jnp.sum(jnp.sin(evaluate(eqx.combine(trained, frozen))(x)))

    trained, frozen = eqx.partition(model, eqq.trainable(model))
    packed = partial(loss, evaluate=lambda m: eqq.implicit(jax.vmap(m)))
    dense = partial(loss, evaluate=lambda m: jax.vmap(eqq.materialize(m)))
    with eqq.strict():
        got = eqx.filter_jit(eqx.filter_grad(packed))(trained, frozen, X)
    want = eqx.filter_grad(dense)(trained, frozen, X)
    for g, w in zip(jtu.tree_leaves(got), jtu.tree_leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-4)


@each_base
def test_only_adapters_are_trained_and_saved(base):
    model = adapted_model(base)
    trained, frozen = eqx.partition(model, lora.adapters(model))
    assert [leaf.shape for leaf in jtu.tree_leaves(trained)] == [
        (2, 16), (32, 2), (2, 32), (32, 2), (2, 32), (4, 2)
    ]  # fmt: skip

    def loss(trained):
        return jnp.mean((jax.vmap(eqx.combine(trained, frozen))(X) - 1) ** 2)

    trained, losses = train(loss, trained, optax.adam(1e-2), steps=30)
    assert losses[-1] < losses[0] / 2
    after = eqx.combine(trained, frozen)
    for old, new in zip(lora.base(model).layers, lora.base(after).layers, strict=True):
        for a, b in zip(*map(jtu.tree_leaves, (old, new)), strict=True):
            np.testing.assert_array_equal(a, b)

    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, eqx.filter(after, lora.adapters(after)))
    assert file.tell() < 8000  # nothing but the factors
    file.seek(0)
    loaded = eqx.combine(
        eqx.tree_deserialise_leaves(file, eqx.filter(model, lora.adapters(model))), model
    )
    np.testing.assert_array_equal(jax.vmap(loaded)(X), jax.vmap(after)(X))


@each_base
def test_merging(base):
    model = adapted_model(base)
    merged, errors = lora.merge(model)
    assert not any(map(eqq.is_implicit, jtu.tree_leaves(merged, is_leaf=eqq.is_implicit)))
    np.testing.assert_allclose(jax.vmap(merged)(X), jax.vmap(model)(X), rtol=1e-4, atol=1e-4)
    assert all(row.sqnr_db is None for row in errors.rows)


def test_merging_and_quantizing_again_reports_the_error():
    model = adapted_model()
    merged, errors = lora.merge(
        model, {"layers.0.*": eqq.Array8B.quantize, "*": eqq.ArrayNF4.quantize}
    )
    assert [type(layer.weight) for layer in merged.layers] == [
        eqq.Array8B,
        eqq.ArrayNF4,
        eqq.ArrayNF4,
    ]
    assert [row.path for row in errors.rows] == [f"layers.{i}.weight" for i in range(3)]
    assert errors.rows[0].sqnr_db > 35 and 15 < errors.rows[1].sqnr_db < 25
    np.testing.assert_array_equal(merged.layers[0].bias, model.layers[0].bias)


def test_scaling():
    a, b = jnp.ones((4, 16)), jnp.ones((8, 4))
    for stabilized, scale in ((False, 16 / 4), (True, 16 / 2)):
        model = lora.add(
            {"w": jnp.zeros((8, 16))}, rank=4, rank_stabilized=stabilized, key=jax.random.key(0)
        )
        weight = model["w"].replace(a=a, b=b)
        np.testing.assert_array_equal(weight.materialize(), jnp.full((8, 16), 4 * scale))


def test_dropout_hides_inputs_from_the_adapter_alone_and_keeps_the_mean():
    model = adapted_model(dropout=0.5)
    weight = model.layers[0].weight
    seen = [lora.dropout(model, jax.random.key(i)).layers[0].weight for i in range(300)]
    for each in seen[:5]:
        zero = (each.a == 0).all(0)
        assert 0 < int(zero.sum()) < 16
        np.testing.assert_allclose(each.a[:, ~zero], 2 * weight.a[:, ~zero], rtol=1e-6)
        np.testing.assert_array_equal(each.base.packed, weight.base.packed)
    mean = jnp.stack([each.a for each in seen]).mean(0)
    np.testing.assert_allclose(mean, weight.a, atol=6 * float(jnp.abs(weight.a).max()) / 300**0.5)
    keys = jax.random.split(jax.random.key(0), 5)
    y = jax.vmap(lambda x, key: lora.dropout(model, key)(x))(X, keys)
    assert y.shape == (5, 4)
    assert lora.dropout(adapted_model(), jax.random.key(0)).layers[0].weight.a is not None


def test_tied_weights_share_an_adapter():
    w = jnp.ones((8, 16))
    model = lora.add({"in": w, "out": w}, rank=2, key=jax.random.key(0))
    assert model["in"] is model["out"]


@pytest.mark.parametrize("how", [None, eqq.Array8B.quantize], ids=["dense", "quantized again"])
def test_tied_weights_stay_tied_through_dropout_and_merging(how):
    weight = jax.random.normal(jax.random.key(0), (8, 16))
    model = {"embedding": weight, "unembedding": weight}
    adapted = lora.add(model, rank=2, dropout=0.5, key=jax.random.key(1))
    hidden = lora.dropout(adapted, jax.random.key(2))
    assert hidden["embedding"] is hidden["unembedding"]
    for each in (adapted, hidden):
        merged, errors = lora.merge(each, how)
        assert merged["embedding"] is merged["unembedding"]
        assert [row.path for row in errors.rows] == ["embedding"]
    assert lora.base(adapted)["embedding"] is lora.base(adapted)["unembedding"] is weight


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lora.add(small_mlp(), rank=0, key=jax.random.key(0)), ["rank", "rank=0"]),
        (
            lambda: lora.add({"w": jnp.ones((3, 5))}, rank=6, key=jax.random.key(0)),
            ["rank", "rank=6", "both sides", "'w'", "(3, 5)"],
        ),
        (lambda: lora.add(small_mlp(), dropout=1.0, key=jax.random.key(0)), ["dropout", "1.0"]),
        (
            lambda: lora.add(eqq.quantize(small_mlp(), BASES["nf4 double"]), "layer.*", key=jax.random.key(0)),
            ["'layer.*' matches no", "layers.0.weight"],
        ),
        (
            lambda: lora.AdaptedArray(jnp.ones((8, 16)), jnp.ones((2, 8)), jnp.ones((8, 2)), 1.0, 0.0),
            ["(8, 16)", "(2, 8)"],
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named_shown_and_answered(make, words):
    assert_raises(make, ValueError, words)
