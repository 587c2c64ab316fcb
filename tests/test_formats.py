"""What holds for every format: shapes, sizes, accuracy, memory, copies, and two formats in one place."""

import copy
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import in_turns, normal

import eqquant as eqq
from eqquant.testing import LAYOUTS, QUANTIZERS


each_quantizer = pytest.mark.parametrize("name", QUANTIZERS)


SHAPES = [(1,), (7,), (0,), (0, 4), (4, 0), (1, 1), (3, 5), (2, 3, 11), (8, 3, 3, 3)]


@pytest.mark.parametrize(("name", "shape"), in_turns(QUANTIZERS, SHAPES, each=5))
def test_padding_is_never_visible(name, shape):
    x = normal(*shape)
    q = QUANTIZERS[name](x)
    assert (q.shape, q.ndim, q.size, q.dtype) == (x.shape, x.ndim, x.size, x.dtype)
    assert q.materialize().shape == shape
    assert q.T.shape == x.T.shape
    assert f"{list(shape)}".replace(" ", "") in repr(q)


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if "rsr" not in name])
def test_arrays_without_axes(name):
    q = QUANTIZERS[name](jnp.asarray(2.5))
    assert q.shape == () and float(q) == 2.5
    assert float(q.reshape(1, 1)[0, 0]) == 2.5


def sqnr(x, q):
    x = np.asarray(x, np.float64)
    return 10 * np.log10((x**2).sum() / ((x - np.asarray(q.materialize(), np.float64)) ** 2).sum())


@pytest.mark.parametrize("name", [name for name, each in QUANTIZERS.items() if each.sqnr_db])
def test_accuracy_on_normal_numbers_is_the_closed_form(name):
    x = normal(1024, 4096)
    assert abs(sqnr(x, QUANTIZERS[name](x)) - QUANTIZERS[name].sqnr_db) < 0.03


def test_accuracy_of_int8_blocks_is_the_closed_form():
    x = normal(1024, 4096)
    largest = np.abs(np.asarray(x, np.float64)).reshape(1024, 64, 64).max(-1)
    # Uniform rounding of step m / 127 has variance m^2 / (12 127^2); the largest of the 64 has no error.
    expected = -10 * np.log10(63 / 64 * (largest**2).mean() / (127**2 * 12))
    assert abs(sqnr(x, QUANTIZERS["int8 blocks"](x)) - expected) < 0.03


def test_searched_scales_gain_over_half_a_decibel():
    x = normal(512, 4096)
    assert sqnr(x, QUANTIZERS["nf4 search"](x)) - sqnr(x, QUANTIZERS["nf4"](x)) >= 0.6


@each_quantizer
def test_bits_per_weight_with_all_leaves(name):
    weight = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    plan = eqq.plan({"w": weight}, QUANTIZERS[name])
    assert -0.01 < plan.rows[0].bits_per_weight - QUANTIZERS[name].bits <= 0
    small = QUANTIZERS[name](normal(64, 640))
    leaves = jtu.tree_leaves(small)
    assert small.nbytes == sum(leaf.nbytes for leaf in leaves)


@each_quantizer
def test_what_the_registry_says_of_the_tiles(name):
    quantizer = QUANTIZERS[name]
    q = quantizer(normal(2, 640))
    assert (1 if q.packing is None else q.packing.elements) == quantizer.packed
    assert q.block_size == quantizer.block_size


@each_quantizer
def test_quantize_is_jittable_and_vmappable(name):
    x = normal(3, 4, 70)
    one_by_one = [QUANTIZERS[name](each).materialize() for each in x]
    np.testing.assert_array_equal(jax.jit(QUANTIZERS[name])(x[0]).materialize(), one_by_one[0])
    mapped = jax.vmap(QUANTIZERS[name])(x)
    assert mapped.shape == x.shape
    np.testing.assert_array_equal(mapped.materialize(), jnp.stack(one_by_one))


@each_quantizer
def test_quantize_and_materialize_hold_few_dense_copies(name):
    x = jax.ShapeDtypeStruct((1024, 4096), jnp.float32)
    dense = 1024 * 4096 * 4
    compiled = jax.jit(QUANTIZERS[name]).lower(x).compile().memory_analysis()
    held = (
        compiled.argument_size_in_bytes
        + compiled.output_size_in_bytes
        + compiled.temp_size_in_bytes
    )
    assert held <= 2.5 * dense, held / dense
    q = jax.eval_shape(QUANTIZERS[name], x)
    compiled = jax.jit(lambda q: q.materialize()).lower(q).compile().memory_analysis()
    held = (
        compiled.argument_size_in_bytes
        + compiled.output_size_in_bytes
        + compiled.temp_size_in_bytes
    )
    assert held <= 2.5 * dense, held / dense


@each_quantizer
def test_copies(name, tmp_path):
    q = QUANTIZERS[name](normal(4, 70))
    path = tmp_path / "q.eqx"
    eqx.tree_serialise_leaves(path, q)
    like = jtu.tree_map(jnp.zeros_like, q)
    for again in (
        pickle.loads(pickle.dumps(q)),
        copy.deepcopy(q),
        eqx.tree_deserialise_leaves(path, like),
    ):
        assert jtu.tree_structure(again) == jtu.tree_structure(q)
        np.testing.assert_array_equal(again.materialize(), q.materialize())


@each_quantizer
def test_quantized_input_is_refused(name):
    q = QUANTIZERS[name](normal(4, 70))
    with pytest.raises(TypeError, match="dense array"):
        QUANTIZERS[name](q)


# ------------------------------------------------------------------------------- mixed company

PROGRAMS = {
    "add": lambda a, b: a + b,
    "matmul": lambda a, b: a @ b.T,
    "where": lambda a, b: jnp.where(a > b, a, b),
    "concatenate": lambda a, b: jnp.concatenate([a, b]),
    "stack": lambda a, b: jnp.stack([a, b]),
    "maximum": lambda a, b: jnp.maximum(a, b),
    "cond": lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a, lambda: b),
    "update": lambda a, b: jax.lax.dynamic_update_slice(a, b[:1], (1, 0)),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_any_two_formats_in_one_primitive(program):
    x, y = normal(4, 128), normal(4, 128, seed=1)
    run, names = PROGRAMS[program], list(LAYOUTS)
    for i, first in enumerate(names):  # each with the next ones, both ways round
        for second in (names[(i + 1) % len(names)], names[(i + 4) % len(names)]):
            a, b = QUANTIZERS[first](x), QUANTIZERS[second](y)
            with eqq.on_materialize("ignore"):
                got = eqq.materialize(eqq.implicit(run)(a, b))
            want = run(a.materialize(), b.materialize())
            np.testing.assert_allclose(
                got, want, rtol=1e-5, atol=1e-4, err_msg=f"{first}, {second}"
            )


SCALARS = [2, 2.0, True, np.float32(2), np.int64(2), np.asarray(2.0)]


@pytest.mark.parametrize(("name", "scalar"), in_turns(LAYOUTS, SCALARS, each=2))
def test_python_and_numpy_scalars(name, scalar):
    q = QUANTIZERS[name](normal(4, 70))
    dense = q.materialize()
    with eqq.on_materialize("ignore"):
        for got, want in (
            (q * scalar, dense * scalar),
            (scalar * q, scalar * dense),
            (q + scalar, dense + scalar),
            (scalar - q, scalar - dense),
            (q**2, dense**2),
            (q < scalar, dense < scalar),
        ):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(eqq.materialize(got), want)
        jitted = jax.jit(eqq.implicit(lambda q: (q * 2 + 1, 0.5 * q, q**2)))(q)
    for got, want in zip(jitted, (dense * 2 + 1, 0.5 * dense, dense**2), strict=True):
        np.testing.assert_allclose(eqq.materialize(got), want, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------- what stays packed, along which axis


@pytest.mark.parametrize("name", LAYOUTS)
def test_structural_rules_keep_the_packed_form(name):
    """Along other axes than the packed one always; along it where tiles of 320 elements stay whole."""
    q = QUANTIZERS[name](normal(4, 640))
    programs = {
        "transpose": lambda x: x.T,
        "split rows": lambda x: x.reshape(2, 2, 640),
        "new axis": lambda x: x[None],
        "broadcast": lambda x: jnp.broadcast_to(x, (3, 4, 640)),
        "rows": lambda x: x[1:3],
        "reverse rows": lambda x: x[::-1],
        "join rows": lambda x: jnp.concatenate([x, x]),
        "stack": lambda x: jnp.stack([x, x]),
        "whole tiles": lambda x: x[:, 320:],
        "join whole tiles": lambda x: jnp.concatenate([x, x], axis=1),
        "negative": lambda x: -x if x.dtype else x,
        "cast": lambda x: x.astype(jnp.bfloat16),
    }
    if name.startswith("rsr"):
        del programs["negative"]
    if QUANTIZERS[name].packed > 1 and not QUANTIZERS[name].block_size:
        del programs["join whole tiles"]  # one scale for a row: two rows have two
    for label, program in programs.items():
        with eqq.strict():
            got = eqq.implicit(program)(q)
        assert isinstance(got, type(q)), label
        np.testing.assert_array_equal(
            got.materialize().astype(jnp.float32),
            program(q.materialize()).astype(jnp.float32),
            err_msg=label,
        )


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("orientation", ["x @ w.T", "x @ w"])
def test_products_and_their_derivatives_hold_no_dense_weight(name, orientation):
    w = jax.eval_shape(QUANTIZERS[name], jax.ShapeDtypeStruct((1024, 1024), jnp.float32))
    x, dense = jax.ShapeDtypeStruct((2, 1024), jnp.float32), 1024 * 1024 * 4

    def loss(x, w):
        return jnp.sum(jnp.sin(x @ w.T if orientation == "x @ w.T" else x @ w))

    compiled = jax.jit(eqq.implicit(jax.grad(loss))).lower(x, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < dense / 10


NAMES = {
    "QuantizedArray": "commute_ops warn_on_materialize materialize dequantize delete",
    "AbstractScaledArray": "with_sharding reshard with_mesh_and_axis is_sharded sharding",
    "Array8B": "quantize scale weight axis",
    "ArrayNF4": "quantize packed absmax block_size",
    "Array1B": "quantize weight",
    "RSROperatorBinary": "from_matrix quantize dot one_hot_maps k padding org_dtype",
    "RSROperatorTernary": "from_matrix quantize dot rsr_b1 rsr_b2",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_the_reference_exist(name):
    owner = getattr(eqq, name)
    have = set(dir(owner)) | {
        field for cls in owner.__mro__ for field in vars(cls).get("__annotations__", ())
    }
    assert set(NAMES[name].split()) <= have
