"""The kernel for GPUs: interpreted against float64, lowered for CUDA, chosen where it serves."""

import contextlib
import re
from functools import partial
from typing import Any

import device_kernels
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
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
from helpers import ON_CPU
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, PartitionSpec

import eqquant as eqq
from eqquant.coding import Coding
from eqquant.kernels import quantized_dot_general
from eqquant.kernels.matmul.axes import Axes
from eqquant.kernels.matmul.choice import choose
from eqquant.kernels.matmul.gpu import blocks, kernel, product as gpu
from eqquant.kernels.matmul.gpu.blocks import Blocks, blocks_for, Case
from eqquant.kernels.matmul.product import Product, Target
from eqquant.testing import LAYOUTS
from eqquant.tiles import Packing, Tile


FORMATS = {
    "nf4": LAYOUTS["nf4"],
    "nf4 double": LAYOUTS["nf4 double"],
    "nf4 along the first axis": partial(LAYOUTS["nf4"], axis=0, block_size=32),
    "nf4 in odd blocks": partial(LAYOUTS["nf4"], block_size=50),
    "int4": LAYOUTS["int4"],
    "nvfp4": LAYOUTS["nvfp4"],
    "int8": LAYOUTS["int8"],
    "int8 in blocks": partial(LAYOUTS["int8"], block_size=32),
    "int8 in odd blocks": partial(LAYOUTS["int8"], block_size=10, axis=0),
    "ternary": LAYOUTS["ternary"],
    "ternary in blocks": partial(LAYOUTS["ternary"], block_size=16),
    "binary": LAYOUTS["binary"],
    "binary in blocks": partial(LAYOUTS["binary"], block_size=32),
    "rsr binary": LAYOUTS["rsr binary"],
    "rsr ternary": partial(LAYOUTS["rsr ternary"], k=11),
}
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
# rows, then the axes of the weight: of one block, of several that fit, of several that do not.
SHAPES = [(1, 3, 7), (16, 128, 256), (5, 33, 70), (20, 70, 300)]
each_format = pytest.mark.parametrize("format", FORMATS)
each_orientation = pytest.mark.parametrize("axes", [LAST, FIRST], ids=["last", "first"])


def operands(format: str, shape: Any, axes: Axes, dtype: Any) -> tuple[jax.Array, Any]:
    rng = np.random.default_rng(sum(shape))
    rows, *weight = shape
    w = FORMATS[format](jnp.asarray(rng.normal(size=weight), jnp.float32), dtype=dtype)
    return jnp.asarray(rng.normal(size=(rows, weight[axes.w_contract[0]])), dtype), w


def run(x: Any, w: Any, axes: Axes, blocks: Blocks | None = None) -> Any:
    return gpu.compute(Product(x, w, axes), Target(), blocks=blocks, interpret=True)


# ------------------------------------------------------------------------------------- values


@each_format
@each_orientation
def test_interpreted(format, axes):
    # The shapes and dtypes take turns.
    number = list(FORMATS).index(format) + 5 * (axes == FIRST)
    shape, dtype = SHAPES[number % len(SHAPES)], FLOATS[number % len(FLOATS)]
    x, w = operands(format, shape, axes, dtype)
    assert gpu.supports(Product(x, w, axes))
    y = run(x, w, axes)
    assert y.dtype == jnp.float32
    check(y, x, w, axes)


@pytest.mark.parametrize("split", [1, 3, 8])
def test_partial_sums(monkeypatch, split):
    monkeypatch.setattr(gpu, "splits_for", lambda *sizes: split)
    x, w = operands("nf4", (5, 33, 500), LAST, jnp.bfloat16)
    y = run(x, w, LAST)
    check(y, x, w, LAST)


@pytest.mark.parametrize("sizes", [(16, 16, 16), (32, 64, 16), (16, 128, 64)], ids=str)
@each_orientation
def test_any_block_sizes(sizes, axes):
    x, w = operands("nf4", (20, 70, 140), axes, jnp.bfloat16)
    check(run(x, w, axes, Blocks(*sizes)), x, w, axes)


def test_float16_is_not_scaled_out_of_its_range():
    x, w = operands("int8", (2, 64, 32), FIRST, jnp.float16)
    tiny = eqx.tree_at(lambda w: w.scale, w, w.scale * 1e-6)
    y = run(x, tiny, FIRST)
    want = np.asarray(x, np.float64) @ (np.asarray(tiny.scale) * np.asarray(tiny.weight))
    np.testing.assert_allclose(y, want, rtol=0.01, atol=1e-3 * np.abs(want).max())


def test_a_block_that_is_not_finite_stays_where_it_is():
    x, w = operands("nf4", (2, 40, 128), LAST, jnp.bfloat16)
    w = eqx.tree_at(lambda w: w.absmax, w, w.absmax.at[7, 1].set(jnp.nan))
    y = run(x, w, LAST)
    assert (np.isnan(np.asarray(y)) == (np.arange(40) == 7)).all()


class Registers(dict):
    """Runs the few instructions of PTX that decoding takes, on words."""

    def value(self, name: str) -> int:
        return int(name, 16) if name.startswith("0x") else self[name] if name in self else int(name)

    def run(self, asm: str) -> None:
        for line in asm.strip("{}").split(";"):
            operation, _, operands = line.strip().partition(" ")
            if operation in ("", ".reg"):
                continue
            to, *names = (name.strip() for name in operands.split(","))
            a, b, *more = map(self.value, names)
            if operation == "prmt.b32":
                which = [more[0] >> 4 * i & 15 for i in range(4)]
                assert max(which) < 8  # the fourth bit copies a sign
                self[to] = sum(((b << 32 | a) >> 8 * n & 255) << 8 * i for i, n in enumerate(which))
            else:
                c, *table = more or [0]
                assert table in ([], [(0xF0 & 0xCC) | 0xAA])
                self[to] = {"and.b32": a & b, "shr.u32": a >> b, "lop3.b32": a & b | c}[operation]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_levels_by_permutation(dtype):
    # The interpreter has no assembly: here are all bytes through it, four at a time.
    levels = np.asarray(eqq.ArrayNF4.coding.levels, np.float32).astype(dtype)
    words = np.asarray(kernel._words(eqq.ArrayNF4.coding.levels, dtype)).view(np.uint32)
    stored = np.random.default_rng(0).permutation(np.repeat(np.arange(256, dtype=np.uint8), 4))
    names = [f"${5 + 4 * i}" for i in range(8)]
    for four in stored.reshape(-1, 4):
        registers = Registers(zip(names, map(int, words), strict=True))
        registers["$4"] = int(four.view(np.uint32)[0])
        registers.run(kernel.permutation(names))
        pairs = (
            np.array([registers[f"${i}"] for i in range(4)], np.uint32).view(dtype).reshape(4, 2)
        )
        np.testing.assert_array_equal(pairs, levels[np.stack([four & 15, four >> 4], 1)])


@pytest.fixture
def interpreted(monkeypatch):
    yield from device_kernels.interpreted(monkeypatch, "gpu", gpu.compute)


def by_kernel(x: Any, w: Any) -> Any:
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return quantized_dot_general(x, w, contract, implementation="gpu")


def test_vmap_folds_the_batch_into_the_rows(interpreted):
    x, w = operands("ternary", (6, 33, 70), LAST, jnp.float32)
    y = jax.vmap(jax.vmap(by_kernel, (0, None)), (1, None), 1)(x.reshape(2, 3, 70), w)
    check(y.reshape(6, -1), x, w, LAST)
    assert interpreted == [((3, 2, 70), (1,))]


@pytest.mark.parametrize("format", ["nf4", "nf4 double", "int8", "binary"])
def test_a_stack_of_matrices(interpreted, format):
    check_stack(by_kernel, FORMATS[format])
    assert interpreted == [((3, 2, 128), (2,)), ((3, 2, 64), (1,))]


def test_a_weight_of_three_axes(interpreted):
    x, heads = operands("nf4", (2, 32, 64), LAST, jnp.float32)
    y = jax.vmap(by_kernel, (None, 0), 1)(x, heads.reshape(4, 8, 64))
    check(y.reshape(2, 32), x, heads, LAST)
    assert interpreted == [((2, 64), (2,))]


def test_the_backward_pass_goes_by_the_kernel(interpreted):
    x, w = operands("nf4", (2, 33, 70), LAST, jnp.float32)
    ct = jnp.asarray(np.random.default_rng(1).normal(size=(2, 33)), jnp.float32)
    y, pull_back = jax.vjp(partial(by_kernel, w=w), x)
    check(y, x, w, LAST)
    check(pull_back(ct)[0], ct, w, FIRST)
    assert [contract for _, contract in interpreted] == [(1,), (0,)]


# ----------------------------------------------------------------------------------- lowering


H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")


@pytest.fixture
def h200():
    """As if an H200 were here; JAX before 0.11 assumes one."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext
    mesh = AbstractMesh((), (), abstract_device=H200)
    return lambda: jax.sharding.use_abstract_mesh(mesh)


KERNEL = "__gpu$xla.gpu.triton"


def large(format: str, dtype: Any, shape: Any = (1024, 2048), **how: Any) -> Any:
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    return structs(jax.eval_shape(partial(FORMATS[format], dtype=dtype, **how), w))


lower = partial(device_kernels.lower, platforms=("cuda",))
dot = partial(device_kernels.dot, implementation="gpu")


@each_format
@each_orientation
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lowering_for_cuda(h200, format, axes, dtype):
    # Lengths that no block divides: masks are lowered, too.
    w = large(format, dtype, (1000, 2010))
    x = jax.ShapeDtypeStruct((3, w.shape[axes.w_contract[0]]), dtype)
    contract = ((axes.x_contract, axes.w_contract), ((), ()))
    with h200():
        assert KERNEL in lower(
            lambda x, w: quantized_dot_general(x, w, contract, implementation="gpu"), x, w
        )


@each_orientation
def test_lowering_of_a_stack(h200, axes):
    w = stacked(large("nf4", jnp.bfloat16))
    x = jax.ShapeDtypeStruct((8, 3, w.shape[1 + axes.w_contract[0]]), jnp.bfloat16)
    contract = ((axes.x_contract, axes.w_contract), ((), ()))
    with h200():
        products = eqq.implicit(
            jax.vmap(partial(jax.lax.dot_general, dimension_numbers=contract)), implementation="gpu"
        )
        assert lower(products, x, w).count(KERNEL) == 1


@pytest.mark.parametrize(
    ("sum_of", "shape", "axis", "inputs"),
    [
        ("td,dhk->thk", (2048, 16, 64), 0, (3, 2048)),
        ("td,hkd->thk", (16, 64, 2048), 2, (3, 2048)),
        ("td,edf->etf", (4, 2048, 512), 1, (3, 2048)),
        ("etd,efd->etf", (4, 512, 2048), 2, (4, 3, 2048)),
        ("thk,hkd->td", (16, 64, 1024), 1, (3, 16, 64)),
    ],
)
def test_einsum(h200, sum_of, shape, axis, inputs):
    w = large("nf4", jnp.bfloat16, shape, axis=axis)
    product = eqq.implicit(partial(jnp.einsum, sum_of), implementation="gpu")
    with h200():
        assert lower(product, jax.ShapeDtypeStruct(inputs, jnp.bfloat16), w).count(KERNEL) == 1


@pytest.mark.parametrize("rows", [16, 17, 200])
def test_lowering_of_many_rows(h200, rows):
    x = jax.ShapeDtypeStruct((rows, 2048), jnp.bfloat16)
    with h200():
        assert KERNEL in lower(dot, x, large("nf4", jnp.bfloat16))


def test_a_whole_model_for_every_platform(h200):
    leaves, applied = model(eqq.ArrayNF4.quantize, "gpu")
    with h200():
        for_all = lower(applied, leaves, VECTOR, platforms=PLATFORMS)
        assert for_all.count(KERNEL) == 3  # one for each layer
        assert lower(applied, leaves, VECTOR).count(KERNEL) == 3

        def loss(leaves: Any, x: Any) -> Any:
            return jnp.sum(applied(leaves, x).astype(jnp.float32))

        forward_and_backward = lower(jax.grad(loss, argnums=1), leaves, VECTOR)
        assert forward_and_backward.count(KERNEL) in (5, 6)  # the last result is not needed
    for platform in ("cpu", "tpu"):
        assert KERNEL not in lower(applied, leaves, VECTOR, platforms=(platform,))


def test_exported_models_hold_no_kernel_unless_asked(h200):
    # Triton's programs are not promised to run with later versions: JAX refuses to export them.
    leaves, applied = model(eqq.ArrayNF4.quantize, "gpu")
    export = partial(jax.export.export, jax.jit(applied), platforms=PLATFORMS)
    with h200():
        exported = export()(leaves, VECTOR)
        assert KERNEL not in exported.mlir_module()
        allowed = jax.export.DisabledSafetyCheck.custom_call(KERNEL)
        with ignore_forward_compatibility():
            exported = export(disabled_checks=[allowed])(leaves, VECTOR)
        assert exported.mlir_module().count(KERNEL) == 3


@contextlib.contextmanager
def ignore_forward_compatibility():
    jax.config.update("jax_export_ignore_forward_compatibility", True)
    yield
    jax.config.update("jax_export_ignore_forward_compatibility", False)


def test_what_is_split_over_devices_goes_by_xla(h200):
    mesh = Mesh(mesh_utils.create_device_mesh((4,), jax.devices()[:4]), ("d",))
    x, w = jax.ShapeDtypeStruct((4, 2048), jnp.bfloat16), large("nf4", jnp.bfloat16)
    split = jax.NamedSharding(mesh, PartitionSpec("d"))
    rows = jax.jit(dot, in_shardings=(split, None)).trace(x, w)
    assert KERNEL not in rows.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map_each_device_has_a_kernel(check_vma):
    x, w = jax.ShapeDtypeStruct((4, 2048), jnp.bfloat16), large("nf4", jnp.bfloat16)
    device = None if jax.__version_info__ < (0, 11) else H200
    mesh = AbstractMesh((4,), ("d",), (AxisType.Auto,), abstract_device=device)
    specs = (PartitionSpec("d"), jtu.tree_map(lambda _: PartitionSpec(), w))
    with jax.sharding.use_abstract_mesh(mesh):
        by_hand = jax.shard_map(
            dot, in_specs=specs, out_specs=PartitionSpec("d"), check_vma=check_vma
        )
        assert KERNEL in lower(by_hand, x, w)


def test_an_unknown_gpu_gets_what_xla_makes():
    if jax.__version_info__ < (0, 11):
        pytest.skip("JAX before 0.11 takes every GPU for a Hopper")
    x, w = jax.ShapeDtypeStruct((4, 2048), jnp.bfloat16), large("nf4", jnp.bfloat16)
    assert KERNEL not in lower(dot, x, w)
    device = AbstractDevice(device_kind="Tesla T4", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        assert KERNEL not in lower(dot, x, w)


# ------------------------------------------------------------------------------------- choice


def test_where_it_is_chosen():
    def chosen(
        format: str,
        rows: int,
        axes: Axes = LAST,
        dtype: Any = jnp.bfloat16,
        preferred: Any = "gpu",
        partitioned: bool = False,
    ) -> str:
        w = large(format, dtype)
        x = jax.ShapeDtypeStruct((rows, w.shape[axes.w_contract[0]]), dtype)
        return choose(Product(x, w, axes), Target("cuda", partitioned), preferred)

    assert {chosen("nf4", rows) for rows in (1, 16, 200)} == {"gpu"}
    assert {chosen(format, 1, axes) for format in ("ternary", "nf4") for axes in (LAST, FIRST)} == {
        "gpu"
    }
    assert chosen("int8 in blocks", 1) == "gpu"
    assert chosen("int8", 1) == chosen("int8", 1, FIRST) == "xla"  # XLA reads it as it is
    assert chosen("nf4", 1000) == "xla"
    assert chosen("nf4", 16, dtype=jnp.float32) == "gpu"
    assert chosen("nf4", 17, dtype=jnp.float32) == "xla"
    assert chosen("nf4", 1, partitioned=True) == "xla"
    x, w = jnp.ones((1, 8)), eqq.ArrayNF4.quantize(jnp.ones((4, 8)))
    assert choose(Product(x, w, LAST), Target("cuda"), "gpu") == "xla"  # small
    assert chosen("nf4", 1, preferred=None) == "xla"
    assert chosen("nf4", 1, preferred="tiled") == "tiled"
    assert chosen("nf4", 1, preferred="int8_digits") == chosen("nf4", 1, preferred="tpu") == "xla"


class Nibbles(eqq.AbstractScaledArray):
    """A format of somebody else's: integers of four bits, from -8."""

    codes: jax.Array
    scale: Any
    packing: Any = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    block_size: Any = eqx.field(static=True, default=None)
    casts: Any = eqx.field(static=True, default=())
    payload = "codes"
    coding = Coding(bits=4, low=-8)


class Sorted(Nibbles):
    """Its planes are more than arithmetic on one number at a time."""

    def plane(self, i: int, dtype: Any) -> jax.Array:
        return jnp.sort(super().plane(i, dtype))


def nibbles(kind: Any, shape: Any) -> Any:
    codes = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] // 2))
    packing = Packing(-1, shape[1], Tile(8, 4))
    return kind(jnp.asarray(codes, jnp.uint8), None, packing, jnp.dtype(jnp.float32))


@each_orientation
def test_a_format_of_somebody_elses(axes):
    w = nibbles(Nibbles, (24, 40))
    x = jnp.asarray(
        np.random.default_rng(1).normal(size=(3, w.shape[axes.w_contract[0]])), jnp.float32
    )
    assert gpu.supports(Product(x, w, axes))
    check(run(x, w, axes), x, w, axes)


def test_what_it_does_not_compute():
    def supports(x: Any, w: Any, axes: Axes = LAST, accumulate: Any = jnp.float32) -> bool:
        return gpu.supports(Product(x, w, axes, accumulate=accumulate))

    x, w = jnp.ones((2, 8), jnp.float32), eqq.ArrayNF4.quantize(jnp.ones((4, 8)))
    assert supports(x, w)
    assert not supports(x, w, accumulate=jnp.float64)
    assert not supports(x, w, Axes((0, 1), (0, 1), (), ()))
    assert not supports(jnp.ones((4, 8)), w, Axes((1,), (1,), (0,), (0,)))
    assert not supports(x[:0], w)
    assert not supports(x[0], eqq.ArrayNF4.quantize(jnp.ones(8)), Axes((0,), (0,), (), ()))
    assert not supports(x, nibbles(Sorted, (4, 8)))


def test_block_sizes_measured_on_a_device_come_first(monkeypatch):
    case = Case(16, 16, 2, "inputs", True)
    best = Blocks(16, 64, 16, warps=2)
    monkeypatch.setattr(blocks, "TUNED", {"NVIDIA H200": {case: best}})
    assert blocks_for(case, "NVIDIA H200") == best
    assert blocks_for(case, "NVIDIA A100") == blocks_for(case) != best


# ----------------------------------------------------------------------------------- override


def test_an_implementation_by_name():
    x, w = operands("nf4", (2, 33, 70), LAST, jnp.float32)
    contract = (((1,), (1,)), ((), ()))

    @partial(jax.jit, static_argnums=2)
    def run(x: Any, w: Any, implementation: Any = None) -> Any:
        return quantized_dot_general(x, w, contract, implementation=implementation)

    for name in ("reference", "xla", "fused", "tiled", None):
        check(run(x, w, name), x, w, LAST)
    assert "quantized_dot_general_xla" in run.lower(x, w, "fused").as_text(debug_info=True)
    ints = eqq.Array8B.quantize(jnp.ones((33, 70)))
    check(run(x, ints, "int8_digits"), x, ints, LAST)
    # The backward product is not one of those that it computes.
    gradient = jax.grad(lambda x: run(x, ints, "integer").sum())(x)
    np.testing.assert_allclose(gradient, jnp.broadcast_to(33.0, x.shape), rtol=1e-5)


def by_scan(x: Any, ws: Any) -> Any:
    return jax.lax.scan(lambda x, w: (jax.jit(jnp.matmul)(w, x), None), x, ws)[0]


@pytest.mark.parametrize(
    ("preferred", "chosen"), {"reference": "reference", "gpu": ON_CPU, "tables": ON_CPU}.items()
)
def test_a_preferred_implementation(preferred, chosen):
    # Inside of loops and compiled functions, and in derivatives.
    ws = eqq.ArrayNF4.quantize(jnp.asarray(np.random.default_rng(0).normal(size=(3, 32, 32))))
    x = jnp.ones(32)

    @partial(jax.jit, static_argnums=0)
    def gradient(name: Any, x: Any, ws: Any) -> Any:
        return jax.grad(lambda x: eqq.implicit(by_scan, implementation=name)(x, ws).sum())(x)

    usual, text = gradient(None, x, ws), gradient.lower(preferred, x, ws).as_text(debug_info=True)
    assert {chosen} == set(re.findall(r"quantized_dot_general_(\w+)", text))
    np.testing.assert_allclose(
        gradient(preferred, x, ws), usual, rtol=1e-4, atol=1e-6 * jnp.abs(usual).max()
    )


def test_a_preference_goes_with_the_weights():
    x, w = operands("nf4", (2, 33, 70), LAST, jnp.float32)

    def kernels(f: Any) -> list[str]:
        return [row.kernel for row in eqq.audit(f).rows if row.kernel]

    inner = partial(device_kernels.dot, x, implementation="xla")
    assert kernels(lambda: inner(w)) == ["xla"]
    assert kernels(lambda: eqq.implicit(inner, implementation="reference")(w)) == ["reference"]
    assert kernels(lambda: eqq.implicit(inner)(w)) == [ON_CPU]  # `inner` sees no quantized array
    with pytest.raises(ValueError, match="implementation must be 'reference', .*it is 'quick'"):
        device_kernels.dot(x, w, "quick")


def test_an_implementation_that_does_not_serve():
    x, w = operands("nf4", (2, 33, 70), LAST, jnp.float32)
    run = partial(quantized_dot_general, x, w, (((1,), (1,)), ((), ())))
    with pytest.raises(
        ValueError, match="implementation must be 'reference', 'xla'.*'gpu', 'tpu'; it is 'quick'"
    ):
        run(implementation="quick")
    with pytest.raises(
        ValueError, match=r"'int8_digits' does not compute .*ArrayNF4 .*'gpu', 'tpu' would"
    ):
        run(implementation="int8_digits")
    stack = eqq.Array8B.quantize(jnp.ones((2, 33, 70)))  # vmap adds an axis
    by_integers = partial(run.func, dimension_numbers=run.args[2], implementation="int8_digits")
    with pytest.raises(ValueError, match=r"'int8_digits' does not compute .*\[2, 33, 70\]"):
        jax.vmap(by_integers)(jnp.stack([x, x]), stack)
    with pytest.raises(ValueError, match="'gpu' runs on cuda, but not in a program for cpu"):
        run(implementation="gpu")


def test_the_audit_names_the_kernel():
    linear = eqq.quantize(eqx.nn.Linear(1024, 1024, key=jax.random.key(0)), eqq.ArrayNF4.quantize)
    x = jnp.ones(1024)
    by_default = {None: ON_CPU, "cpu": ON_CPU, "cuda": "xla", "tpu": "xla"}
    for preferred, kernels in {
        None: by_default,
        "gpu": by_default | {"cuda": "gpu"},
        "tpu": by_default | {"tpu": "tpu"},
        "reference": dict.fromkeys(by_default, "reference"),
    }.items():
        for platform, name in kernels.items():
            model = eqq.implicit(linear, implementation=preferred)
            found = eqq.audit(model, x, platform=platform)
            assert [row.kernel for row in found.rows] == [name]
            assert name in str(found)
    found = eqq.audit(lambda x: linear.weight.T, x)
    assert [row.kernel for row in found.rows] == [""]
