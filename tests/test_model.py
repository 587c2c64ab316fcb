"""`quantize`, `materialize`, `plan` and `report` on trees."""

import copy
import dataclasses
import json
import math
import pickle
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import eqquant as eqq


INT8 = eqq.Array8B.quantize


class Tied(eqx.Module):
    embedding: eqx.nn.Embedding
    layers: list[eqx.nn.Linear]
    unembed: jax.Array
    ids: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(10, 8, key=keys[0])
        self.layers = [eqx.nn.Linear(8, 8, key=k) for k in keys[1:]]
        self.unembed = self.embedding.weight
        self.ids = jnp.arange(12).reshape(3, 4)


@pytest.fixture
def model():
    return Tied(jax.random.key(0))


def formats(tree):
    leaves = jtu.tree_leaves_with_path(tree, is_leaf=eqq.is_implicit)
    return {
        jtu.keystr(path, simple=True, separator="."): type(leaf).__name__ for path, leaf in leaves
    }


def test_one_format_for_every_float_matrix(model):
    q = eqq.quantize(model, INT8)
    kinds = formats(q)
    assert {name for name, kind in kinds.items() if kind == "Array8B"} == {
        "embedding.weight", "layers.0.weight", "layers.1.weight", "unembed",
    }  # fmt: skip
    assert eqx.tree_equal(q.ids, model.ids) and q.layers[0].bias is model.layers[0].bias
    assert isinstance(model.layers[0].weight, jax.Array)  # the original is untouched


def test_the_bias_of_a_convolution_is_a_vector():
    conv = eqx.nn.Conv2d(3, 4, 3, key=jax.random.key(0))
    q = eqq.quantize(conv, partial(INT8, axis=(1, 2, 3)))
    assert isinstance(q.weight, eqq.Array8B) and isinstance(q.bias, jax.Array)


def test_first_pattern_wins_and_none_stays_dense(model):
    column = partial(INT8, axis=0)
    q = eqq.quantize(model, {"layers.0.*": None, "*.layers.*": column, "*": INT8})
    assert isinstance(q.layers[0].weight, jax.Array)
    assert q.layers[1].weight.axis == (-2,)
    assert q.embedding.weight.axis == (-1,)


def test_a_path_in_full_is_taken_at_its_word(model):
    q = eqq.quantize(model, {"layers.0.bias": INT8})
    assert isinstance(q.layers[0].bias, eqq.Array8B) and isinstance(q.unembed, jax.Array)


def test_patterns_leave_the_rest_dense(model):
    kinds = formats(eqq.quantize(model, {"*.layers.*": INT8}))
    assert kinds["layers.1.weight"] == "Array8B" and kinds["embedding.weight"] == "ArrayImpl"


def test_tied_weights_are_quantized_once(model):
    q = eqq.quantize(model, INT8)
    assert q.embedding.weight is q.unembed
    assert [row.path for row in eqq.report(model, q).rows].count("unembed") == 0


def test_tied_weights_stay_tied(model):
    q = eqq.quantize(model, {"embedding.weight": INT8, "unembed": eqq.Array8B.quantize})
    assert q.embedding.weight is q.unembed  # a method that was looked up twice
    rebuilt = eqx.combine(*eqx.partition(q, eqx.is_inexact_array))
    for each in (q, rebuilt):
        dense = eqq.materialize(each)
        assert dense.embedding.weight is dense.unembed
        assert "unembed" not in [row.path for row in eqq.report(model, each).rows]


def test_quantizing_twice_and_materializing_give_the_model_back(model):
    q = eqq.quantize(model, INT8)
    assert eqx.tree_equal(eqq.quantize(q, INT8), q)
    dense = eqq.materialize(q)
    assert jtu.tree_structure(dense) == jtu.tree_structure(model)
    np.testing.assert_array_equal(dense.unembed, q.unembed.materialize())


def test_a_single_array_is_quantized_whatever_its_rank():
    assert isinstance(eqq.quantize(jnp.ones(3), INT8), eqq.Array8B)
    assert isinstance(eqq.quantize({"w": np.ones((2, 3), np.float32)}, INT8)["w"], eqq.Array8B)


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"*.layer.*": INT8}, ValueError, ["'*.layer.*' matches no", "'layers.0.weight'"]),
        ({"*": INT8, "*.attn.*": INT8}, ValueError, ["'*.attn.*'", "nearest of 4 paths"]),
        (
            {"*.bias": INT8},
            ValueError,
            ["'layers.0.bias', which is float32[8]; write its path in full"],
        ),
    ],
)
def test_mistakes_in_patterns_are_reported(model, how, error, words):
    for call in (eqq.quantize, eqq.plan):
        with pytest.raises(error) as caught:
            call(model, how)
        for word in words:
            assert word in str(caught.value)


def test_errors_say_which_weight(model):
    bad = eqx.tree_at(lambda m: m.layers[1].weight, model, jnp.full((8, 8), jnp.nan))
    with pytest.raises(ValueError, match=r"'layers.1.weight' holds nan at \[0, 0\] \(64 such"):
        eqq.quantize(bad, INT8)
    with pytest.raises(ValueError, match="axis 5 is out of range") as caught:
        eqq.quantize(model, {"layers.1.*": partial(INT8, axis=5)})
    assert "while quantizing 'layers.1.weight'" in caught.value.__notes__


def test_report_measures_what_quantization_did(model):
    q = eqq.quantize(model, {"*.layers.*": INT8})
    report = eqq.report(model, q)
    rows = {row.path: row for row in report.rows}
    row = rows["layers.0.weight"]
    error = np.asarray(model.layers[0].weight) - q.layers[0].weight.materialize()
    signal = (np.asarray(model.layers[0].weight) ** 2).sum()
    assert row.sqnr_db == pytest.approx(10 * math.log10(signal / (error**2).sum()), abs=1e-2)
    assert (row.format, row.shape, row.nbytes) == ("Array8B", (8, 8), 64 + 32)
    assert row.bits_per_weight == report.bits_per_weight == 12.0
    assert rows["embedding.weight"].sqnr_db is None
    assert report.nbytes == sum(r.nbytes for r in report.rows)
    assert report.dense_nbytes - report.nbytes == 2 * (256 - 96)
    json.dumps(report.as_dicts())
    table = str(report)
    assert "layers.0.weight" in table and "SQNR dB" in table and "12.00 bits/weight" in table


def test_report_of_exact_and_of_mismatched_models(model):
    exact = {"w": jnp.asarray([[127.0, 1.0], [-127.0, 0.0]])}
    assert eqq.report(exact, eqq.quantize(exact, INT8)).rows[0].sqnr_db == math.inf
    with pytest.raises(ValueError, match="same arrays"):
        eqq.report(model, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="shape"):
        eqq.report({"w": jnp.ones((2, 3))}, eqq.quantize({"w": jnp.ones((3, 2))}, INT8))


def test_plan_says_the_same_and_allocates_nothing(model):
    how = {"*.layers.*": partial(INT8, block_size=4), "*": INT8}
    planned, done = eqq.plan(model, how), eqq.report(model, eqq.quantize(model, how))
    for a, b in zip(planned.rows, done.rows, strict=True):
        assert (a.path, a.format, a.nbytes, a.dense_nbytes) == (
            b.path,
            b.format,
            b.nbytes,
            b.dense_nbytes,
        )
        assert a.sqnr_db is None
    huge = eqx.filter_eval_shape(eqx.nn.Linear, 10**6, 10**6, key=jax.random.key(0))
    assert eqq.plan(huge, INT8).rows[0].nbytes == 10**12 + 4 * 10**6


def test_keys_of_random_numbers_are_arrays_of_a_model():
    keys = jax.random.split(jax.random.key(0), (2, 3))
    model = {"w": jnp.ones((4, 8)), "key": jax.random.key(0), "keys": keys}
    q = eqq.quantize(model, INT8)
    for report in (eqq.plan(model, INT8), eqq.report(model, q)):
        rows = {row.path: row for row in report.rows}
        assert (rows["keys"].format, rows["keys"].nbytes) == ("key<fry>", 6 * 8)
        assert "key<fry>" in str(report)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float4_e2m1fn])
def test_numbers_of_few_bits_are_left_alone_but_where_named(dtype):
    model = {"w": jnp.ones((4, 8)), "few": jnp.ones((4, 8), dtype)}
    q = eqq.quantize(model, INT8)
    assert q["few"] is model["few"] and isinstance(q["w"], eqq.Array8B)
    assert [row.format for row in eqq.plan(model, INT8).rows] == [jnp.dtype(dtype).name, "Array8B"]
    named = eqq.quantize(model, {"few": partial(INT8, dtype=jnp.float32)})
    np.testing.assert_array_equal(named["few"].materialize(), 1)
    with pytest.raises(TypeError, match="must be float16"):
        eqq.quantize(model, {"few": INT8})


def test_shapes_give_the_skeleton_of_what_would_be(model, tmp_path):
    how = {"embedding.weight": None, "*.layers.*": eqq.ArrayNF4.quantize, "*": INT8}
    shapes = eqx.filter_eval_shape(lambda model: model, model)
    skeleton, q = eqq.quantize(shapes, how), eqq.quantize(model, how)
    leaves, treedef = jtu.tree_flatten(skeleton)
    assert treedef == jtu.tree_structure(q)
    for shape, leaf in zip(leaves, jtu.tree_leaves(q), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
    assert skeleton.layers[0].weight.nbytes == q.layers[0].weight.nbytes
    eqx.tree_serialise_leaves(tmp_path / "model", q)
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(tmp_path / "model", skeleton), q)
    one = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    assert isinstance(eqq.quantize(one, INT8), eqq.Array8B)
    assert eqq.plan(one, INT8).rows[0].nbytes == 4 * 8 + 4 * 4
    with pytest.raises(ValueError, match="axis 5 is out of range") as caught:
        eqq.quantize({"w": one}, partial(INT8, axis=5))
    assert "while quantizing 'w'" in caught.value.__notes__


@pytest.mark.parametrize("how", [INT8, eqq.ArrayNF4.quantize, eqq.ArrayFP8.quantize])
def test_arrays_of_numpy(how):
    w = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    assert eqx.tree_equal(eqq.quantize({"w": w}, how)["w"], how(jnp.asarray(w)))


class Decoder(eqx.Module):
    """A model with more than one method, as libraries of language models have them."""

    layer: eqx.nn.Linear
    size: int = eqx.field(static=True)

    def init_cache(self, batch: int) -> jax.Array:
        return jnp.zeros((batch, self.size))

    def decode(
        self, x: jax.Array, cache: jax.Array, scale: float = 1.0
    ) -> tuple[jax.Array, jax.Array]:
        y = jnp.einsum("bi,oi->bo", x, self.layer.weight) * scale
        return y, cache + y

    @property
    def width(self) -> int:
        return self.layer.weight.shape[1]

    @classmethod
    def make(cls) -> "Decoder":
        return cls(eqx.nn.Linear(8, 4, key=jax.random.key(0)), 4)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(x, self.init_cache(x.shape[0]))[0]


def test_methods_of_an_implicit_model_are_implicit():
    model = eqq.quantize(Decoder.make(), eqq.Array8B.quantize)
    run, x = eqq.implicit(model, implementation="reference"), jnp.ones((2, 8))

    def generate(model: Any, x: jax.Array) -> jax.Array:  # knows nothing of quantized arrays
        cache = model.init_cache(x.shape[0])
        for _ in range(2):
            y, cache = model.decode(x, cache, scale=0.5)
        return y + cache

    dense = eqq.materialize(model)
    with eqq.strict():
        for each in (
            run,
            copy.copy(run),
            pickle.loads(pickle.dumps(run)),
            jax.tree.map(lambda x: x, run),
        ):
            for how in (generate, eqx.filter_jit(generate)):
                np.testing.assert_allclose(how(each, x), generate(dense, x), rtol=1e-5)
        np.testing.assert_allclose(run(x), dense(x), rtol=1e-5)
    assert run.decode.implementation == "reference"
    assert run.layer is model.layer and (run.size, run.width) == (4, 8)
    assert eqx.tree_equal(run.make(), Decoder.make())
    assert [field.name for field in dataclasses.fields(run)] == [
        "wrapped", "implementation", "activations",
    ]  # fmt: skip
    for missing in (run, eqq.implicit(generate)):
        with pytest.raises(AttributeError, match="has no attribute 'missing'"):
            missing.missing  # noqa: B018
    assert not hasattr(eqq.implicit(generate), "__jax_array__")
