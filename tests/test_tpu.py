"""The kernel for TPUs: interpreted against float64, lowered, chosen where it serves. And what goes by XLA's own
form, which is everything else."""

import math
import re
from functools import partial
from typing import Any

import device_kernels
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_kernels import (
    check,
    check_stack,
    FIRST,
    LAST,
    model,
    PLATFORMS,
    stacked,
    structs,
    VECTOR,
)
from jax.experimental import mesh_utils
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

import eqquant as eqq
from eqquant.kernels import quantized_dot_general
from eqquant.kernels.matmul import reference, xla
from eqquant.kernels.matmul.axes import Axes
from eqquant.kernels.matmul.choice import choose
from eqquant.kernels.matmul.product import Product, Target
from eqquant.kernels.matmul.tpu import kernel, product as tpu
from eqquant.testing import LAYOUTS


FORMATS = {
    name: LAYOUTS[name]
    for name in ("nf4", "nf4 double", "int8", "ternary", "binary", "rsr ternary")
} | {
    "int8 in blocks": partial(LAYOUTS["int8"], block_size=32),
    "nf4 by columns": LAYOUTS["nf4"].column_major,
}
KERNEL = "tpu_custom_call"


def nf4(shape: Any, axis: int, block_size: int = 64, dtype: Any = jnp.bfloat16, **how: Any) -> Any:
    w = jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)
    return eqq.ArrayNF4.quantize(w, block_size, axis, dtype=dtype, **how)


def inputs(rows: int, w: Any, axes: Axes) -> jax.Array:
    shape = rows, w.shape[axes.w_contract[0]]
    return jnp.asarray(np.random.default_rng(rows).normal(size=shape), w.dtype)


# ------------------------------------------------------------------------------------- values

# rows, the shape of the weight, the summed axis, block size, dtype, and whether the interpreter looks for races.
CASES = {
    "several steps": (3, (5, 560), LAST, 64, jnp.float32, True),
    "several blocks of outputs": (1, (520, 70), LAST, 16, jnp.bfloat16, False),
    "a block of several steps": (2, (5, 2100), LAST, 1024, jnp.bfloat16, False),
    "many rows, one block": (300, (8, 256), LAST, 256, jnp.bfloat16, False),
    "by columns, several steps": (3, (560, 5), FIRST, 64, jnp.bfloat16, True),
    "by columns, large blocks": (2, (1030, 520), FIRST, 512, jnp.float32, False),
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, monkeypatch, capfd):
    monkeypatch.setattr(kernel, "STEP", 256)  # so that small weights take several
    rows, shape, axes, block_size, dtype, closely = CASES[name]
    w = nf4(shape, axes.w_contract[0], block_size, dtype)
    x = inputs(rows, w, axes)
    assert tpu.supports(Product(x, w, axes))
    how = closely and pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    y = tpu.compute(Product(x, w, axes), Target(), interpret=how or True)
    assert y.dtype == jnp.float32
    check(y, x, w, axes)
    assert "RACE" not in "".join(capfd.readouterr()).upper()


def test_an_output_that_is_not_finite_stays_where_it_is():
    w = nf4((40, 128), 1)
    w = eqx.tree_at(lambda w: w.absmax, w, w.absmax.at[7, 1].set(jnp.nan))
    y = tpu.compute(Product(inputs(2, w, LAST), w, LAST), Target(), interpret=True)
    assert (np.isnan(np.asarray(y)) == (np.arange(40) == 7)).all()


@pytest.fixture
def interpreted(monkeypatch):
    yield from device_kernels.interpreted(monkeypatch, "tpu", tpu.compute)


def by_kernel(x: Any, w: Any, axis: int = 1) -> Any:
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    return quantized_dot_general(x, w, contract, implementation="tpu")


def test_vmap_and_derivatives(interpreted):
    w = nf4((33, 70), 1, dtype=jnp.float32, double=True)
    x = inputs(6, w, LAST)
    y, pull_back = jax.vjp(jax.vmap(partial(by_kernel, w=w)), x.reshape(2, 3, 70))
    check(y.reshape(6, -1), x, w, LAST)
    assert interpreted == [((2, 3, 70), (1,))]
    # The backward product goes along the other axis, and so by what is the default.
    ct = jnp.asarray(np.random.default_rng(1).normal(size=(6, 33)), jnp.float32)
    check(pull_back(ct.reshape(2, 3, 33))[0].reshape(6, -1), ct, w, FIRST)
    assert len(interpreted) == 1


@pytest.mark.parametrize("axis", [0, 1])
def test_a_stack_of_matrices(interpreted, axis):
    check_stack(partial(by_kernel, axis=axis), eqq.ArrayNF4.quantize, axis)
    assert interpreted == [((3, 2, (64, 128)[axis]), (1 + axis,))]


def by_xla(platform: str | None, axes: Axes) -> Any:
    return lambda x, w: xla.compute(Product(x, w, axes), Target(platform))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("axes", [LAST, FIRST])
@pytest.mark.parametrize(
    "how",
    [
        eqq.ArrayNF4.quantize,
        partial(eqq.ArrayNF4.quantize, block_size=160),
        partial(eqq.ArrayNF4.quantize, axis=0),
        partial(eqq.Array8B.quantize, block_size=96),
        partial(eqq.Array8B.quantize, block_size=96, axis=0),
        partial(eqq.Array1B.quantize, block_size=480),
    ],
)
def test_in_the_form_for_tpus(how, axes, rows):
    w = how(jnp.asarray(np.random.default_rng(0).normal(size=(200, 500)), jnp.float32))
    x = inputs(rows, w, axes)
    check(by_xla("tpu", axes)(x, w), x, w, axes)
    usual, form = (str(jax.make_jaxpr(by_xla(platform, axes))(x, w)) for platform in (None, "tpu"))
    assert "gather" not in form and usual != form


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((96,), Axes((0,), (1,), (), ())),
        ((1, 64), FIRST),
        ((96, 1, 64), Axes((2, 0), (0, 1), (), ())),
        ((64, 96), Axes((1,), (1,), (0,), (0,))),
    ],
)
def test_a_row_beside_one_of_zeros(shape, axes):
    w = nf4((64, 96), 1, dtype=jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    y, want = by_xla("tpu", axes)(x, w), reference.compute(Product(x, w, axes), Target())
    assert y.shape == want.shape
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    products = str(jax.make_jaxpr(by_xla("tpu", axes))(x, w))
    assert ("f32[2," in products) != bool(axes.x_batch)  # where estimates are in favour


# ----------------------------------------------------------------------------------- lowering


def large(dtype: Any = jnp.bfloat16, shape: Any = (1024, 2048), **how: Any) -> Any:
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    return structs(jax.eval_shape(partial(eqq.ArrayNF4.quantize, dtype=dtype, **how), w))


lower = partial(device_kernels.lower, platforms=("tpu",))
dot = partial(device_kernels.dot, implementation="tpu")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lowering(axis, dtype):
    # Lengths that no block divides.
    w = large(dtype, (1000, 2010), axis=axis)
    x = jax.ShapeDtypeStruct((300, w.shape[axis]), dtype)
    assert lower(partial(by_kernel, axis=axis), x, w).count(KERNEL) == 1
    with jax.enable_x64(True):
        assert lower(partial(by_kernel, axis=axis), x, w).count(KERNEL) == 1


@pytest.mark.parametrize("axis", [0, 1])
def test_lowering_of_a_stack(axis):
    w = stacked(large(axis=axis))
    x = jax.ShapeDtypeStruct((8, 3, w.shape[1 + axis]), jnp.bfloat16)
    assert lower(jax.vmap(partial(by_kernel, axis=axis)), x, w).count(KERNEL) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_whole_model_by_xla(format):
    leaves, applied = model(FORMATS[format])
    text = lower(applied, leaves, VECTOR)
    assert "custom_call" not in text
    assert "gather" not in text or format == "nf4 double"  # of whose scales
    # Nothing has as many elements as a weight, except where each one is stored by itself.
    shapes = re.findall(r"tensor<([\dx]+)x[a-z]\w+>", text)
    most = max(math.prod(map(int, shape.split("x"))) for shape in shapes)
    stored = max(leaf.size for leaf in jax.tree.leaves(leaves))
    assert most == stored and (stored < 1 << 20 or format.startswith("int8"))
    exported = jax.export.export(jax.jit(applied), platforms=PLATFORMS)
    assert "custom_call" not in exported(leaves, VECTOR).mlir_module()


@pytest.mark.parametrize("format", ["nf4", "nf4 by columns"])
def test_a_whole_model_by_the_kernel(format):
    leaves, applied = model(FORMATS[format], "tpu")
    export = partial(jax.export.export, jax.jit(applied))
    for platforms in (("tpu",), PLATFORMS):
        assert lower(applied, leaves, VECTOR, platforms=platforms).count(KERNEL) == 3  # layers
        exported = export(platforms=platforms)(leaves, VECTOR)
        assert exported.mlir_module().count(KERNEL) == 3
    assert KERNEL not in lower(applied, leaves, VECTOR, platforms=("cpu", "cuda"))


def test_older_tpus_get_what_xla_makes(monkeypatch):
    older = type("Device", (), {"device_kind": "TPU v4"})
    monkeypatch.setattr(jax, "local_devices", lambda backend: [older])
    assert KERNEL not in lower(dot, jax.ShapeDtypeStruct((1, 2048), jnp.bfloat16), large())


def test_what_is_split_over_devices_goes_by_xla():
    mesh = Mesh(mesh_utils.create_device_mesh((4,), jax.devices()[:4]), ("d",))
    x, w = jax.ShapeDtypeStruct((4, 2048), jnp.bfloat16), large()
    split = jax.NamedSharding(mesh, PartitionSpec("d"))
    rows = jax.jit(dot, in_shardings=(split, None)).trace(x, w)
    assert KERNEL not in rows.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map_each_device_has_a_kernel(check_vma):
    x, w = jax.ShapeDtypeStruct((4, 2048), jnp.bfloat16), large()
    mesh = AbstractMesh((4,), ("d",), (AxisType.Auto,))
    specs = (PartitionSpec("d"), jax.tree.map(lambda _: PartitionSpec(), w))
    with jax.sharding.use_abstract_mesh(mesh):
        by_hand = jax.shard_map(
            dot, in_specs=specs, out_specs=PartitionSpec("d"), check_vma=check_vma
        )
        assert KERNEL in lower(by_hand, x, w)


# ------------------------------------------------------------------------------------- choice


def test_where_it_is_chosen():
    def chosen(
        w: Any,
        rows: int = 1,
        axes: Axes = LAST,
        preferred: Any = "tpu",
        platform: str = "tpu",
        partitioned: bool = False,
    ) -> str:
        x = jax.ShapeDtypeStruct((rows, w.shape[axes.w_contract[0]]), w.dtype)
        return choose(Product(x, w, axes), Target(platform, partitioned), preferred)

    assert chosen(large()) == chosen(large(), 256) == chosen(large(jnp.float32)) == "tpu"
    assert chosen(large(axis=0), axes=FIRST) == "tpu"
    assert chosen(large(), 257) == chosen(large(), partitioned=True) == "xla"
    assert chosen(large(), axes=FIRST) == chosen(large(shape=(64, 64))) == "xla"
    assert chosen(large(), platform="cuda") == chosen(large(), preferred=None) == "xla"


def test_what_it_does_not_compute():
    def supports(x: Any, w: Any, axes: Axes = LAST, accumulate: Any = jnp.float32) -> bool:
        return tpu.supports(Product(x, w, axes, accumulate=accumulate))

    w = nf4((4, 128), 1)
    x = inputs(2, w, LAST)
    assert supports(x, w)
    assert not supports(x, w, accumulate=jnp.float64)
    assert not supports(x.astype(jnp.float16), w)
    assert not supports(x[:0], w)
    assert not supports(x, w, Axes((0, 1), (0, 1), (), ()))
    assert not supports(x[:, :4], w, FIRST)  # packed along the outputs
    assert not supports(x, nf4((4, 128), 1, 8))  # four bytes for a scale
    assert not supports(x, nf4((4, 128), 1, 48))
    assert not supports(x, nf4((128, 4), 0, 32), FIRST)
    assert not supports(x, eqq.Array8B.quantize(jnp.ones((4, 128))))


def test_asked_for_where_it_does_not_run():
    w = nf4((4, 128), 1)
    with pytest.raises(ValueError, match="'tpu' runs on tpu, but not in a program for cpu"):
        by_kernel(inputs(2, w, LAST), w)
    ternary = eqq.Array1B.quantize(jnp.ones((4, 128)))
    with pytest.raises(ValueError, match="'tpu' does not compute .*Array1B"):
        by_kernel(jnp.ones((2, 128)), ternary)
