"""Arrays split over the eight virtual devices: codes and scales together, values unchanged.

In depth for one format; `test_sharding_formats.py` goes through all of them.
"""

import pickle
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import eqquant as eqq
import eqquant.kernels.convolution as convolution
from eqquant.kernels.matmul.cpu import tiled


ROWS, COLUMNS = 16, 32
LAYOUTS = {
    "scale of a row": {"axis": -1},
    "scale of a column": {"axis": 0},
    "one scale": {"axis": (0, 1)},
    "blocks": {"axis": -1, "block_size": 8},
    "blocks of rows": {"axis": 0, "block_size": 8},
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def auto_mesh(shape: Any = (2, 4), names: Any = ("a", "b")) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


@pytest.fixture(params=["auto", "explicit"])
def mesh(request: pytest.FixtureRequest) -> jax.sharding.Mesh:
    """Two by four devices; `jax.make_mesh` gives explicit axes unless told otherwise."""
    return auto_mesh() if request.param == "auto" else jax.make_mesh((2, 4), ("a", "b"))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.fixture(scope="module")
def w() -> jax.Array:
    return normal(ROWS, COLUMNS)


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return normal(8, COLUMNS, seed=1)


def spec(array: Any, ndim: int = 2) -> tuple[Any, ...]:
    """The spec of an array, as long as its rank."""
    axes = tuple(array.sharding.spec)
    return axes + (None,) * (ndim - len(axes))


def specs(q: eqq.Array8B) -> tuple[Any, Any]:
    return spec(q.weight, q.ndim), spec(q.scale, q.ndim)


def scale_spec(q: eqq.Array8B, names: Any) -> tuple[Any, ...]:
    """What the scale has to get: the spec of the array, except where one value serves the axis."""
    return tuple(None if n == 1 else name for n, name in zip(q.scale.shape, names, strict=True))


def assert_close(got: Any, want: Any, terms: int = COLUMNS, magnitude: float = 20.0) -> None:
    got, want = np.asarray(eqq.materialize(got)), np.asarray(eqq.materialize(want))
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= terms * np.finfo(np.float32).eps * magnitude


# ------------------------------------------------------------------------------ placing leaves


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        *((layout, ("a", "b")) for layout in LAYOUTS),
        *((layout, (None, ("b", "a"))) for layout in LAYOUTS if layout != "blocks"),
        *((layout, ("b", None)) for layout in LAYOUTS if layout != "blocks of rows"),
    ],
)
def test_every_device_holds_the_codes_and_the_scales_of_its_shard(w, layout, names):
    mesh = auto_mesh()
    whole = eqq.Array8B.quantize(w, **LAYOUTS[layout])
    q = whole.with_sharding(NamedSharding(mesh, P(*names)))
    assert specs(q) == (names, scale_spec(q, names))
    dense = np.asarray(whole.materialize())
    scales = {shard.device: shard.data for shard in q.scale.addressable_shards}
    assert len(q.weight.addressable_shards) == 8
    for shard in q.weight.addressable_shards:
        here = eqq.Array8B(scales[shard.device], shard.data, block_size=whole.block_size)
        np.testing.assert_array_equal(here.materialize(), dense[shard.index])


@each_layout
def test_values_do_not_depend_on_the_sharding(mesh, w, layout):
    whole = eqq.Array8B.quantize(w, **LAYOUTS[layout])
    q = whole.with_sharding(NamedSharding(mesh, P("a")))
    np.testing.assert_array_equal(q.materialize(), whole.materialize())
    assert spec(q.materialize()) == ("a", None)


def test_ways_to_say_it(mesh, w):
    q = eqq.Array8B.quantize(w)
    want = (("a", "b"), ("a", None))
    assert specs(q.with_sharding(NamedSharding(mesh, P("a", "b")))) == want
    assert specs(q.reshard(NamedSharding(mesh, P("a", "b")))) == want
    with jax.set_mesh(mesh):
        assert specs(q.with_sharding(P("a", "b"))) == want
        assert specs(q.reshard(P("a", "b"))) == want
        assert specs(jax.jit(lambda q: q.with_sharding(P("a", "b")))(q)) == want
    built = eqq.Array8B(q.scale, q.weight, sharding=NamedSharding(mesh, P("a", "b")))
    assert specs(built) == want
    assert q.with_sharding(None) is q
    assert q.reshard(None) is q


@pytest.mark.parametrize(
    ("axis", "want"),
    [
        (None, (None, None)),
        ("b", ("b", None)),
        (("a", "b"), ("a", "b")),
        (["a", None], ("a", None)),
        ((None, "b"), (None, "b")),
        ((("a", "b"), None), (("a", "b"), None)),
        (P("a", "b"), ("a", "b")),
    ],
)
def test_with_mesh_and_axis(mesh, w, axis, want):
    q = eqq.Array8B.quantize(w).with_mesh_and_axis((mesh, axis))
    assert specs(q) == (want, scale_spec(q, want))


def test_resharding_moves_the_data(mesh, w):
    q = eqq.Array8B.quantize(w)
    split = q.with_sharding(NamedSharding(mesh, P("a", "b")))
    assert {s.data.shape for s in split.weight.addressable_shards} == {(ROWS // 2, COLUMNS // 4)}
    other = split.reshard(NamedSharding(mesh, P("b", None)))
    assert {s.data.shape for s in other.weight.addressable_shards} == {(ROWS // 4, COLUMNS)}
    assert {s.data.shape for s in other.scale.addressable_shards} == {(ROWS // 4, 1)}
    everywhere = other.with_mesh_and_axis((mesh, None))
    for leaf in (everywhere.weight, everywhere.scale):
        assert leaf.sharding.is_fully_replicated
        assert [s.data.shape for s in leaf.addressable_shards] == [leaf.shape] * 8
    np.testing.assert_array_equal(everywhere.materialize(), q.materialize())


def test_sharding_and_is_sharded(mesh, w):
    q = eqq.Array8B.quantize(w)
    assert not q.is_sharded
    split = q.with_sharding(NamedSharding(mesh, P("a", "b")))
    assert split.is_sharded
    assert split.sharding.is_equivalent_to(NamedSharding(mesh, P("a", "b")), 2)
    assert split.sharding.mesh == mesh
    seen = []
    jax.jit(lambda q: seen.append((q.sharding, q.is_sharded)))(split)
    assert seen == [(None, False)]  # unknown while tracing


def test_unconstrained_axes_are_left_to_the_compiler(w):
    q = eqq.Array8B.quantize(w)
    sharding = NamedSharding(auto_mesh(), P(P.UNCONSTRAINED, "b"))
    assert spec(jax.jit(lambda q: q.with_sharding(sharding))(q).weight)[1] == "b"


# ---------------------------------------------------------------------------------- what raises


@pytest.mark.parametrize(
    ("make", "names", "message"),
    [
        (
            lambda: eqq.Array8B.quantize(jnp.ones((9, 32))),
            ("a", None),
            "Axis 0 of length 9 cannot be split over 2 devices of mesh axis 'a' .*tiles of 1",
        ),
        (
            lambda: eqq.Array8B.quantize(jnp.ones((16, 32)), block_size=16),
            (None, "b"),
            r"Axis 1 of length 32 .* 4 devices of mesh axis 'b' \(mesh {'a': 2, 'b': 4}\).*"
            "'scale' has tiles of 16.*divisible by 64",
        ),
        (
            lambda: eqq.Array8B.quantize(jnp.ones((16, 32)), block_size=8),
            (None, ("a", "b")),
            r"over 8 devices of mesh axis \('a', 'b'\).*tiles of 8",
        ),
        (
            lambda: eqq.Array8B.quantize(jnp.ones((16, 36)), block_size=8),
            (None, "b"),
            "Axis 1 of length 36 .*tiles of 8",
        ),
        (
            lambda: eqq.Array8B.quantize(jnp.ones((16, 32))),
            ("a", None, "b"),
            r"more axes than the array of shape \(16, 32\)",
        ),
    ],
    ids=["length", "block", "two mesh axes", "partial block", "rank"],
)
def test_a_spec_that_cannot_be_honoured_raises(mesh, make, names, message):
    q = make()
    with pytest.raises(ValueError, match=message):
        q.with_sharding(NamedSharding(mesh, P(*names)))
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda q: q.with_sharding(NamedSharding(mesh, P(*names))))(q)
    with pytest.raises(ValueError, match=message):
        q.with_mesh_and_axis((mesh, names))
    assert not q.is_sharded


def test_unknown_mesh_axis_and_missing_mesh(mesh, w):
    q = eqq.Array8B.quantize(w)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"'model'.*\{'a': 2, 'b': 4\}"):
        q.with_sharding(P("model"))
    with pytest.raises(ValueError, match=r"P\('a',\).*needs a mesh.*jax.set_mesh"):
        q.with_sharding(P("a"))


# ------------------------------------------------------------------------------------- quantize


@each_layout
@pytest.mark.parametrize("names", [("a", "b"), (None, "b")])
def test_quantize_takes_the_sharding_over(mesh, w, layout, names):
    sharded = jax.device_put(w, NamedSharding(mesh, P(*names)))
    q = eqq.Array8B.quantize(sharded, **LAYOUTS[layout])
    assert specs(q) == (names, scale_spec(q, names))
    for got, want in zip(
        *map(jtu.tree_leaves, (q, eqq.Array8B.quantize(w, **LAYOUTS[layout]))), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_quantize_refuses_blocks_cut_by_the_sharding(mesh, w):
    sharded = jax.device_put(w, NamedSharding(mesh, P(None, "b")))
    with pytest.raises(ValueError, match=r"Axis 1 of length 32 .*'b'.*tiles of 16"):
        eqq.Array8B.quantize(sharded, block_size=16)


@each_layout
def test_quantize_inside_jit_keeps_the_sharding(mesh, w, layout):
    sharded = jax.device_put(w, NamedSharding(mesh, P("a", "b")))
    q = jax.jit(partial(eqq.Array8B.quantize, **LAYOUTS[layout]))(sharded)
    assert spec(q.weight) == ("a", "b")
    assert spec(q.scale) == scale_spec(q, ("a", "b"))


# ------------------------------------------------------------------------- structure and storage


def test_nothing_of_the_mesh_is_in_the_tree(mesh, w):
    q = eqq.Array8B.quantize(w)
    split = q.with_sharding(NamedSharding(mesh, P("a", "b")))
    before, after = jtu.tree_structure(q), jtu.tree_structure(split)
    assert before == after
    assert hash(before) == hash(after)
    static = jtu.tree_leaves(eqx.partition(split, eqx.is_array)[1])
    assert not [leaf for leaf in static if isinstance(leaf, (NamedSharding, jax.sharding.Mesh))]
    assert "mesh" not in str(after).lower()


def test_a_sharded_array_pickles(mesh, w):
    q = eqq.Array8B.quantize(w).with_sharding(NamedSharding(mesh, P("a", "b")))
    loaded = pickle.loads(pickle.dumps(q))
    assert jtu.tree_structure(loaded) == jtu.tree_structure(q)
    np.testing.assert_array_equal(loaded.materialize(), q.materialize())


def test_a_sharded_array_is_saved_and_loaded(mesh, w, tmp_path):
    q = eqq.Array8B.quantize(w).with_sharding(NamedSharding(mesh, P("a", "b")))
    eqx.tree_serialise_leaves(tmp_path / "q.eqx", q)
    like = eqq.Array8B.quantize(jnp.zeros_like(w))
    for template in (like, q):
        loaded = eqx.tree_deserialise_leaves(tmp_path / "q.eqx", template)
        np.testing.assert_array_equal(loaded.materialize(), q.materialize())


# ------------------------------------------------------------------------------- transformations


def test_transpose_permutes_the_sharding(mesh, w):
    q = eqq.Array8B.quantize(w).with_sharding(NamedSharding(mesh, P("a", "b")))
    for transposed in (q.T, q.swapaxes(0, 1), jax.jit(lambda q: q.T)(q)):
        assert specs(transposed) == (("b", "a"), (None, "a"))
        np.testing.assert_array_equal(transposed.materialize(), q.materialize().T)
    assert specs(q.T.T) == specs(q)


def test_transpose_of_three_axes_permutes_the_sharding(mesh):
    q = eqq.Array8B.quantize(normal(2, 4, 6), axis=1)
    q = q.with_sharding(NamedSharding(mesh, P("a", "b", None)))
    assert specs(q.transpose(1, 2, 0)) == (("b", None, "a"), (None, None, "a"))


def test_jit_keeps_the_sharding(mesh, w):
    q = eqq.Array8B.quantize(w).with_sharding(NamedSharding(mesh, P("a", "b")))
    assert specs(jax.jit(lambda q: q)(q)) == specs(q)
    assert specs(jax.jit(eqq.implicit(lambda q: q * 2.0))(q)) == specs(q)


def test_in_and_out_shardings(mesh, w, x):
    q = eqq.Array8B.quantize(w)
    split = q.with_sharding(NamedSharding(mesh, P("a", None)))
    of_leaves = jtu.tree_map(lambda leaf: leaf.sharding, split)
    project = jax.jit(
        eqq.implicit(lambda q, x: x @ q.T),
        in_shardings=(of_leaves, None),
        out_shardings=NamedSharding(mesh, P(None, "a")),
    )
    with eqq.strict():
        y = project(q, x)
    assert spec(y) == (None, "a")
    assert_close(y, x @ q.materialize().T)
    assert specs(jax.jit(lambda q: q, out_shardings=of_leaves)(q)) == specs(split)


def test_shardings_of_an_inner_jit(mesh, w):
    inner_in = jax.jit(lambda q: q.T, in_shardings=NamedSharding(mesh, P("b", None)))
    inner_out = jax.jit(lambda q: q.T, out_shardings=NamedSharding(mesh, P(None, "b")))
    for inner in (inner_in, inner_out):
        with eqq.strict():
            q = eqq.implicit(lambda q, inner=inner: inner(q))(eqq.Array8B.quantize(w))
        assert specs(q) == ((None, "b"), (None, "b"))


@pytest.mark.xfail(strict=True, reason="the function sees the sharding of the scale")
def test_the_function_sees_how_the_array_is_sharded(w):
    mesh = jax.make_mesh((2, 4), ("a", "b"))  # explicit: the sharding is a part of the type
    q = eqq.Array8B.quantize(w).with_sharding(NamedSharding(mesh, P("a", "b")))
    seen = []
    eqq.implicit(lambda w: seen.append(jax.typeof(w).sharding.spec))(q)
    assert seen == [P("a", "b")]


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_constraints_inside_implicit(mesh, w, transform):
    q = eqq.Array8B.quantize(w).with_sharding(NamedSharding(mesh, P("a", None)))
    to, want = NamedSharding(mesh, P("b", None)), (("b", None), ("b", None))

    def moved(move: Any) -> Any:
        with eqq.strict():
            return specs(transform(eqq.implicit(move))(q))

    assert moved(lambda q: jax.device_put(q, to)) == want
    assert moved(lambda q: jax.device_put(q.T, to)) == (("b", None), (None, None))
    if mesh.axis_types[0] == AxisType.Auto:
        assert moved(lambda q: lax.with_sharding_constraint(q, to)) == want
    else:
        assert moved(lambda q: jax.sharding.reshard(q, to)) == want
    with jax.set_mesh(mesh):
        if mesh.axis_types[0] == AxisType.Auto:
            assert moved(lambda q: lax.with_sharding_constraint(q, P("b", None))) == want
        else:
            assert moved(lambda q: jax.sharding.reshard(q, P("b", None))) == want


# ------------------------------------------------------------------------------------- products


def refusal(f: Any, *args: Any) -> str | None:
    """The name of the error with which JAX refuses to trace `f`."""
    try:
        jax.eval_shape(f, *args)
    except Exception as error:
        return type(error).__name__
    return None


PRODUCTS = {
    "q @ x": (lambda q, x: q @ x.T, COLUMNS),
    "x @ q": (lambda q, x: x @ q, ROWS),
    "vmap": (lambda q, x: jax.vmap(lambda row: q @ row)(x), COLUMNS),
}


@pytest.mark.parametrize(
    ("names", "x_names"),
    [
        (("b", None), (None, None)),
        (("b", None), ("a", None)),
        ((None, "b"), (None, "b")),
        (("a", "b"), (None, "a")),
    ],
)
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_of_sharded_operands(mesh, w, product, names, x_names):
    f, length = PRODUCTS[product]
    whole = eqq.Array8B.quantize(w)
    q = whole.with_sharding(NamedSharding(mesh, P(*names)))
    host = normal(8, length, seed=2)
    x = jax.device_put(host, NamedSharding(mesh, P(*x_names)))
    dense = jax.device_put(whole.materialize(), NamedSharding(mesh, P(*names)))
    refused = refusal(f, dense, x)
    if refused:  # explicit axes: JAX asks for an out_sharding
        assert refusal(eqq.implicit(f), q, x) == refused
        assert mesh.axis_types[0] == AxisType.Explicit
        return
    of_dense = jax.jit(f)(dense, x)
    with eqq.strict():
        y = jax.jit(eqq.implicit(f))(q, x)
        gradient = jax.jit(jax.grad(lambda x: (eqq.implicit(f)(q, x) ** 2).sum()))(x)
    want, pull_back = jax.vjp(lambda x: f(whole.materialize(), x), host)
    assert_close(y, want)
    assert_close(gradient, pull_back(2 * want)[0], ROWS * COLUMNS, 100.0)
    if mesh.axis_types[0] == AxisType.Explicit:
        assert jax.typeof(y).sharding == jax.typeof(of_dense).sharding


@pytest.mark.parametrize("layout", ["scale of a row", "blocks"])
def test_columns_need_no_communication_and_rows_one_sum(w, x, layout):
    mesh = (
        auto_mesh((8,), ("model",)) if layout == "scale of a row" else auto_mesh((4,), ("model",))
    )
    q = eqq.Array8B.quantize(w, **LAYOUTS[layout])

    def compiled(*names: Any) -> str:
        split = q.with_sharding(NamedSharding(mesh, P(*names)))
        project = jax.jit(eqq.implicit(lambda q, x: x @ q.T))
        return project.lower(split, x).compile().as_text()

    outputs_split = compiled("model", None)
    assert "all-gather" not in outputs_split
    assert "all-reduce" not in outputs_split
    assert "all-to-all" not in outputs_split
    contraction_split = compiled(None, "model")
    assert contraction_split.count(" all-reduce(") == 1
    assert "all-gather" not in contraction_split


def test_a_device_gets_only_its_part_of_the_packed_weight():
    mesh = auto_mesh((8,), ("model",))
    q = eqq.Array8B.quantize(normal(512, 256)).with_sharding(NamedSharding(mesh, P("model", None)))
    x = jax.device_put(jnp.ones((1, 256)), NamedSharding(mesh, P()))
    compiled = jax.jit(eqq.implicit(lambda q, x: x @ q.T)).lower(q, x).compile()
    assert compiled.memory_analysis().argument_size_in_bytes <= q.nbytes // 8 + x.nbytes + 64


def test_scan_over_stacked_layers():
    stack = eqq.Array8B.quantize(normal(3, ROWS, ROWS) / 4)
    split = stack.with_sharding(NamedSharding(auto_mesh(), P(None, "a", None)))

    def run(stack: Any, x: Any) -> Any:
        return lax.scan(lambda h, w: (jnp.tanh(w @ h), None), x, stack)[0]

    x = normal(ROWS, seed=3)
    with eqq.strict():
        y = jax.jit(eqq.implicit(run))(split, x)
    assert_close(y, run(stack.materialize(), x))


def test_a_model_with_sharded_weights(w):
    mesh = auto_mesh()
    model = eqx.nn.MLP(16, 8, 32, 2, key=jax.random.key(0))
    quantized = eqq.quantize(model, eqq.Array8B.quantize)
    split = jtu.tree_map(
        lambda leaf: (
            leaf.with_mesh_and_axis((mesh, ("b", None))) if eqq.is_implicit(leaf) else leaf
        ),
        quantized,
        is_leaf=eqq.is_implicit,
    )
    x = normal(16, seed=4)
    with eqq.strict():
        y = eqx.filter_jit(eqq.implicit(split))(x)
    assert_close(y, eqq.materialize(quantized)(x))


@pytest.mark.parametrize("names", [("a", None), (None, "b")], ids=["outputs", "inputs"])
def test_convolution_with_a_sharded_kernel(monkeypatch, names):
    monkeypatch.setattr(convolution, "SMALL_BYTES", 0)
    kernel = eqq.Array8B.quantize(normal(8, 4, 3, 3), axis=(1, 2, 3))
    split = kernel.with_mesh_and_axis((auto_mesh(), P(*names)))

    def run(w: Any, x: Any) -> Any:
        return lax.conv_general_dilated(x, w, (1, 1), "SAME")

    x = normal(2, 4, 5, 5, seed=5)
    with eqq.strict():
        y = jax.jit(eqq.implicit(run))(split, x)
    assert_close(y, run(kernel.materialize(), x), terms=36)


# ------------------------------------------------------------------------------------ shard_map


@pytest.fixture(params=[False, True], ids=["whole", "in pieces"])
def pieces(request, monkeypatch):
    """With and without the loop over pieces, whose carry has to vary over the mesh as it should."""
    if request.param:
        monkeypatch.setattr(tiled, "SMALL_BYTES", 0)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("split", ["outputs", "contraction"])
def test_shard_map(mesh, w, x, pieces, split, check_vma):
    whole = eqq.Array8B.quantize(w, block_size=8)
    q_spec, x_spec, y_spec = {
        "outputs": (P("b", None), P("a", None), P("a", "b")),
        "contraction": (P(None, "b"), P("a", "b"), P("a", None)),
    }[split]

    def local(q: Any, x: Any) -> Any:
        y = x @ q.T
        return lax.psum(y, "b") if split == "contraction" else y

    def run(q: Any, x: Any) -> Any:
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(q_spec, x_spec), out_specs=y_spec, check_vma=check_vma
        )
        return mapped(q, x)

    q = whole.with_sharding(NamedSharding(mesh, q_spec))
    x_split = jax.device_put(x, NamedSharding(mesh, x_spec))
    with eqq.strict():
        y = jax.jit(eqq.implicit(run))(q, x_split)
        gradient = jax.jit(jax.grad(lambda x: (eqq.implicit(run)(q, x) ** 2).sum()))(x_split)
    want, pull_back = jax.vjp(lambda x: x @ whole.materialize().T, x)
    assert_close(y, want)
    assert_close(gradient, pull_back(2 * want)[0], ROWS * COLUMNS, 100.0)
    assert spec(y) == tuple(y_spec)


def test_shard_map_over_one_axis_of_the_mesh(w, x, pieces):
    mesh = auto_mesh()
    whole = eqq.Array8B.quantize(w)
    q = whole.with_sharding(NamedSharding(mesh, P("b", None)))
    mapped = partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("b", None), P()),
        out_specs=P(None, "b"),
        axis_names={"b"},
    )
    with eqq.strict():
        y = jax.jit(eqq.implicit(lambda q, x: mapped(lambda q, x: x @ q.T)(q, x)))(q, x)
    assert_close(y, x @ whole.materialize().T)


def test_shard_map_refuses_to_cut_blocks(w, x):
    q = eqq.Array8B.quantize(w, block_size=16)
    mapped = partial(
        jax.shard_map, mesh=auto_mesh(), in_specs=(P(None, "b"), P()), out_specs=P(None, "b")
    )
    with pytest.raises(ValueError, match=r"Axis 1 of length 32 .*'b'.*tiles of 16"):
        eqq.implicit(lambda q, x: mapped(lambda q, x: q * 2.0)(q, x))(q, x)
