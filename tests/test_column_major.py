"""Weights stored column by column: the same arrays in another order."""

import dataclasses
import pickle
from typing import Any

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import in_turns, normal
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec as P

import eqquant as eqq
from eqquant import lora, testing
from eqquant.testing import LAYOUTS


FORMATS = {name: each for name, each in LAYOUTS.items() if each.packed > 1}
each_format = pytest.mark.parametrize("name", FORMATS)


def pair(name: str, *shape: int) -> tuple[Any, eqq.ColumnMajor]:
    """A weight in row-major and in column-major order."""
    rows = FORMATS[name](normal(*shape))
    return rows, eqq.column_major(rows)


@each_format
def test_it_is_the_same_array(name):
    rows, columns = pair(name, 5, 70)
    assert (columns.shape, columns.dtype) == (rows.shape, rows.dtype)
    assert columns.nbytes == rows.nbytes
    assert (columns.materialize() == rows.materialize()).all()
    assert (columns.T.materialize() == rows.materialize().T).all()
    assert isinstance(columns.T, type(rows))
    assert "ColumnMajor(float32[5,70]" in repr(columns)


@pytest.mark.parametrize(
    ("name", "inputs"), in_turns(FORMATS, [(70,), (1, 70), (3, 70)], each=2), ids=str
)
def test_products(name, inputs):
    rows, columns = pair(name, 600, 70)
    x = jax.random.normal(jax.random.key(1), inputs)
    dense = rows.materialize()

    def products(w: Any, x: Any) -> Any:
        return w @ x.T, x @ w.T, jax.grad(lambda x: jnp.sum(jnp.sin(x @ w.T)))(x)

    with eqq.strict():
        for how in (eqq.implicit(products), eqx.filter_jit(eqq.implicit(products))):
            for got, want in zip(how(columns, x), products(dense, x), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(columns @ x.T, dense @ x.T, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("name", ["ternary", "binary", "nf4", "rsr binary"])
def test_products_with_one_vector_go_by_tables(name):
    rows, columns = pair(name, 1280, 64)
    x = jnp.ones(64)
    for w, by_tables in ((rows, False), (columns, True)):
        for program in (lambda w, x: w @ x, lambda w, x: w.astype(jnp.bfloat16) @ x):
            text = jax.jit(eqq.implicit(program)).lower(w, x).as_text()
            assert ("x256xf32>" in text) == by_tables


@st.composite
def column_major_arrays(draw: Any, shape: Any, dtype: Any = jnp.float32) -> eqq.ColumnMajor:
    def packed_along_the_last(w: Any) -> bool:
        return w.packing is not None and w.packing.axis == -1

    return eqq.column_major(draw(testing.arrays(shape, dtype).filter(packed_along_the_last)))


MATRIX_LAWS = [name for name, law in testing.LAWS.items() if max(law.ranks) > 1]


@pytest.mark.parametrize("law", MATRIX_LAWS)
def test_laws(law):
    law = testing.LAWS[law]
    law = dataclasses.replace(law, ranks=tuple(rank for rank in law.ranks if rank > 1))
    testing.check_law(law, column_major_arrays, "eager", max_examples=1)


@each_format
def test_what_keeps_the_order_and_what_does_not(name):
    _, columns = pair(name, 8, 80)
    with eqq.strict():
        kept = [
            columns.astype(jnp.bfloat16),
            eqq.implicit(jax.lax.stop_gradient)(columns),
            eqx.filter_jit(eqq.implicit(lambda w: w))(columns),
            -columns,
            2 * columns,
            columns / jnp.asarray(2.0),
            columns.astype(jnp.bfloat16) * 2,
            eqq.implicit(lambda w: jax.lax.reduce_precision(w, 8, 23))(columns),
            eqq.implicit(lambda w: checkpoint_name(w, "weight"))(columns),
        ]
        rows = columns[2:6]
        views = eqq.implicit(lambda w: (w.T * 2).T)(columns)
    assert all(isinstance(w, eqq.ColumnMajor) for w in kept)
    assert kept[0].dtype == jnp.bfloat16
    assert (kept[4].materialize() == 2 * columns.materialize()).all()
    assert (views.materialize() == 2 * columns.materialize()).all()
    assert isinstance(rows, eqq.AbstractScaledArray)
    assert (rows.materialize() == columns.materialize()[2:6]).all()


@each_format
def test_stacked_layers(name):
    shape, x = (3, 24, 24), jnp.ones(24)
    dense = jax.random.normal(jax.random.key(0), shape)
    stack = jax.vmap(FORMATS[name].column_major)(dense)
    assert stack.shape == shape

    def through(stack: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, w: (jnp.tanh(w @ x), x), x, stack)[0]

    want = through(jax.vmap(lambda w: w.materialize())(stack), x)
    with eqq.strict():
        inside = eqx.filter_jit(eqq.implicit(through))(stack, x)
        outside, _ = jax.lax.scan(lambda x, w: (jnp.tanh(w @ x), x), x, stack)
        mapped = jax.vmap(lambda w: w @ x)(stack)
    np.testing.assert_allclose(inside, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outside, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mapped, stack.materialize() @ x, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="axis"):
        jax.vmap(lambda w: w @ x, in_axes=1)(stack)


def test_models_adapters_and_files(tmp_path):
    model = eqx.nn.MLP(64, 8, 640, 2, key=jax.random.key(0))
    x = jnp.linspace(-1, 1, 64)
    rows = eqq.quantize(model, eqq.ArrayNF4.quantize)
    columns = eqq.quantize(model, FORMATS["nf4"].column_major)
    adapted = lora.add(columns, rank=2, key=jax.random.key(1))
    with eqq.strict():
        want = rows(x)
        for each in (columns, eqx.filter_jit(eqq.implicit(columns)), adapted):
            np.testing.assert_allclose(each(x), want, rtol=1e-4, atol=1e-4)
    assert {row.format for row in eqq.report(model, columns).rows if row.is_quantized} == {
        "ColumnMajor"
    }
    assert eqq.report(model, columns).nbytes == eqq.report(model, rows).nbytes
    eqx.tree_serialise_leaves(tmp_path / "model", columns)
    read = eqx.tree_deserialise_leaves(tmp_path / "model", columns)
    assert eqx.tree_equal(read, columns)
    assert eqx.tree_equal(
        pickle.loads(pickle.dumps(columns.layers[0].weight)), columns.layers[0].weight
    )


def test_sharding_speaks_of_the_logical_axes():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, columns = pair("binary", 16, 64)
    sharding = NamedSharding(mesh, P("a", "b"))
    placed = columns.with_sharding(sharding)
    assert placed.is_sharded and not columns.is_sharded
    assert placed.stored.weight.sharding.spec == P("b", "a")
    for other in (
        columns.reshard(sharding),
        columns.with_mesh_and_axis((mesh, ("a", "b"))),
        eqq.implicit(lambda w: jax.device_put(w, sharding))(columns),
    ):
        assert other.sharding == placed.sharding
    x = jnp.ones((1, 64))
    product = eqx.filter_jit(eqq.implicit(lambda x, w: x @ w.T))
    np.testing.assert_allclose(product(x, placed), x @ rows.materialize().T, rtol=1e-5, atol=1e-4)
    mapped = jax.shard_map(lambda w: w @ x[0], mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    np.testing.assert_allclose(
        eqq.implicit(mapped)(columns), rows.materialize() @ x[0], rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    "array",
    [
        eqq.Array8B.quantize(jnp.ones((2, 3))),
        eqq.Array1B.quantize(jnp.ones((2, 3)), axis=0),
        eqq.Array1B.quantize(jnp.ones(3)),
    ],
    ids=["not packed", "packed along another axis", "a vector"],
)
def test_what_has_no_column_major_form(array):
    with pytest.raises(
        TypeError, match=r"column_major\(array\) needs .* packed along its last one"
    ):
        eqq.column_major(array)


def test_gradients_reach_the_scales():
    _, columns = pair("ternary", 6, 40)
    x = jnp.linspace(-1, 1, 40)

    def loss(w: Any) -> Any:
        return jnp.sum(jnp.sin(eqq.implicit(lambda w: w @ x)(w)))

    gradient = eqx.filter_grad(loss)(columns)
    dense = columns.materialize()
    by_row = jnp.cos(dense @ x) * (dense @ x)
    np.testing.assert_allclose(
        (gradient.stored.scale * columns.stored.scale)[0], by_row, rtol=1e-4, atol=1e-5
    )
    assert jtu.tree_leaves(eqx.filter(columns, eqq.trainable(columns, scales=True)))
