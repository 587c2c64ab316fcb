"""Every format split over the eight virtual devices: all stored leaves together, values unchanged."""

import pickle
from dataclasses import replace
from functools import cache, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import in_turns
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import eqquant as eqq
from eqquant.formats.nested import NestedScale
from eqquant.testing import LAYOUTS


# `int8`, which has no tiles, is that of test_sharding.
FORMATS = {name: each.with_blocks(8) for name, each in LAYOUTS.items() if name != "int8"}
FORMATS |= {
    "nf4 of columns": replace(FORMATS["nf4"], options={"block_size": 2, "axis": 0}, block_size=2),
    "ternary": replace(FORMATS["ternary"], options={"block_size": 40}),
    "rsr ternary": replace(FORMATS["rsr ternary"], options={"k": 10}, packed=10),
}
each_format = pytest.mark.parametrize("name", FORMATS)


def packed_axis(name: str) -> int:
    return FORMATS[name].options.get("axis", 1)


ROWS, COLUMNS = 16, 640  # whole tiles of every format on each of eight devices
SPECS = [("a", "b"), (None, ("b", "a"))]
each_spec = pytest.mark.parametrize("names", SPECS, ids=["both", "columns"])


def make_mesh(kind: AxisType) -> Mesh:
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))


AUTO, EXPLICIT = make_mesh(AxisType.Auto), make_mesh(AxisType.Explicit)


@pytest.fixture(params=[AUTO, EXPLICIT], ids=["auto", "explicit"])
def mesh(request: pytest.FixtureRequest) -> Mesh:
    return request.param


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def each_format_on_a_mesh(turn: int) -> pytest.MarkDecorator:
    """The kinds of meshes take turns: over the tests, each format meets both."""
    kinds = [("auto", AUTO), ("explicit", EXPLICIT)]
    pairs = in_turns(FORMATS, kinds[turn:] + kinds[:turn], each=1)
    return pytest.mark.parametrize(
        ("name", "mesh"),
        [pytest.param(name, mesh, id=f"{name}-{kind}") for name, (kind, mesh) in pairs],
    )


@cache
def weight() -> np.ndarray:
    return normal(ROWS, COLUMNS)


@cache
def quantized(name: str) -> Any:
    return FORMATS[name](weight())


@cache
def dense(name: str) -> np.ndarray:
    return np.asarray(quantized(name).materialize())


@cache
def stacked(name: str) -> Any:
    return jax.jit(jax.vmap(FORMATS[name]))(normal(2, ROWS, COLUMNS))


@cache
def dense_stack(name: str) -> np.ndarray:
    return np.asarray(stacked(name).materialize())


def split(name: str, mesh: Mesh, names: Any) -> Any:
    return quantized(name).with_sharding(NamedSharding(mesh, P(*names)))


def spec(array: jax.Array) -> tuple[Any, ...]:
    """The spec of an array, as long as its rank."""
    axes = tuple(array.sharding.spec)
    return axes + (None,) * (array.ndim - len(axes))


def specs(q: Any) -> dict[str, Any]:
    paths = jtu.tree_leaves_with_path(q)
    return {jtu.keystr(path, simple=True, separator="."): spec(leaf) for path, leaf in paths}


def want(q: Any, names: Any) -> dict[str, Any]:
    """The specs of all leaves: that of the array, except where one value serves an axis."""
    found = {}
    for path, leaf in jtu.tree_leaves_with_path(q):
        key = jtu.keystr(path, simple=True, separator=".")
        axes = (*names[: leaf.ndim - 1], None) if key == "absmax.absmax" else names
        found[key] = tuple(
            None if n == 1 else axis for n, axis in zip(leaf.shape, axes, strict=False)
        )
    return found


def assert_same(got: Any, expected: Any) -> None:
    np.testing.assert_array_equal(eqq.materialize(got), eqq.materialize(expected))


def assert_close(got: Any, expected: Any, terms: int = COLUMNS, magnitude: float = 20.0) -> None:
    got, expected = np.asarray(eqq.materialize(got)), np.asarray(eqq.materialize(expected))
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= terms * np.finfo(np.float32).eps * magnitude


# ------------------------------------------------------------------------------ placing leaves


@each_spec
@each_format
def test_all_leaves_are_split_together(mesh, name, names):
    q = split(name, mesh, names)
    assert specs(q) == want(q, names)
    assert q.is_sharded
    assert q.sharding.is_equivalent_to(NamedSharding(mesh, P(*names)), 2)
    # Nothing of the mesh is in the tree.
    assert jtu.tree_structure(q) == jtu.tree_structure(quantized(name))
    assert hash(jtu.tree_structure(q)) == hash(jtu.tree_structure(quantized(name)))


@each_format_on_a_mesh(0)
def test_values_do_not_depend_on_the_sharding(mesh, name):
    q = split(name, mesh, ("a", "b"))
    assert_same(q.materialize(), dense(name))
    assert spec(q.materialize()) == ("a", "b")


@pytest.mark.parametrize(
    "quantize",
    [
        partial(eqq.Array8B.quantize, block_size=64),
        partial(eqq.RSROperatorBinary.quantize, k=1),
    ],
    ids=["one block", "packed one by one"],
)
def test_what_a_field_says_needlessly_is_kept(mesh, quantize):
    q = quantize(jnp.ones((8, 16)))
    placed = q.with_mesh_and_axis((mesh, ("a", "b")))
    assert jtu.tree_structure(placed) == jtu.tree_structure(q)
    assert specs(placed) == want(q, ("a", "b"))


@each_format_on_a_mesh(1)
def test_ways_to_say_it(mesh, name):
    q, names = quantized(name), ("a", "b")
    sharding, expected = NamedSharding(mesh, P(*names)), want(q, names)
    assert specs(q.reshard(sharding)) == expected
    assert specs(q.with_mesh_and_axis((mesh, names))) == expected
    assert specs(jax.jit(lambda q: q.with_sharding(sharding))(q)) == expected
    with jax.set_mesh(mesh):
        assert specs(q.with_sharding(P(*names))) == expected
        assert specs(jax.jit(lambda q: q.with_sharding(P(*names)))(q)) == expected
    assert q.with_sharding(None) is q


@each_format_on_a_mesh(0)
def test_resharding_moves_the_data(mesh, name):
    q = split(name, mesh, ("a", "b"))
    for names in [("b", "a"), (None, "b")]:
        moved = q.reshard(NamedSharding(mesh, P(*names)))
        assert specs(moved) == want(q, names)
        payload = moved.payload_leaf.array
        parts = np.prod(payload.shape) // np.prod(payload.addressable_shards[0].data.shape)
        assert parts == (8 if names[0] else 4)
    everywhere = q.with_mesh_and_axis((mesh, None))
    for leaf in jtu.tree_leaves(everywhere):
        assert leaf.sharding.is_fully_replicated
        assert [shard.data.shape for shard in leaf.addressable_shards] == [leaf.shape] * 8
    assert_same(everywhere.materialize(), dense(name))


@each_format
def test_values_in_the_context_of_an_explicit_mesh(name):
    with jax.set_mesh(EXPLICIT):
        q = FORMATS[name](weight()).with_sharding(P("a", "b"))
        assert_same(jax.jit(lambda q: q.materialize())(q), dense(name))


# ---------------------------------------------------------------------------------- what raises


@pytest.mark.parametrize("name", [name for name, each in FORMATS.items() if each.tile > 1])
def test_a_tile_that_would_be_cut_raises(mesh, name):
    quantize, tile, axis = FORMATS[name], FORMATS[name].tile, packed_axis(name)
    x, names = normal(12, 248), (None, "b") if axis else ("b", None)
    sharding = NamedSharding(mesh, P(*names))
    q = quantize(x)
    tiles = rf"tiles of {tile}\..*divisible by {4 * tile}\."
    message = rf"Axis {axis} of length {x.shape[axis]} .* 4 devices of mesh axis 'b' \(mesh "
    message += rf"{{'a': 2, 'b': 4}}\): .*{tiles}"
    with pytest.raises(ValueError, match=message):
        q.with_sharding(sharding)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda q: q.with_sharding(sharding))(q)
    if mesh is EXPLICIT:  # the type says how the array is split
        for each in (quantize, jax.jit(quantize)):
            with pytest.raises(ValueError, match=message):
                each(jax.device_put(x, sharding))
    mapped = jax.shard_map(lambda q: -q, mesh=AUTO, in_specs=P(*names), out_specs=P(*names))
    with pytest.raises(ValueError, match=message):
        eqq.implicit(mapped)(q)


@pytest.mark.parametrize("name", ["int8 blocks", "nf4 of columns", "rsr ternary"])
def test_a_mesh_axis_of_one_device_cuts_nothing(name):
    mesh = jax.make_mesh((4, 1), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    names = ("rows", "columns") if packed_axis(name) else ("columns", "rows")
    x = normal(*((12, 247) if packed_axis(name) else (15, 248)))  # the last tile is partial
    q = FORMATS[name](x)
    placed = q.with_mesh_and_axis((mesh, names))
    assert specs(placed) == want(q, names)
    assert_same(placed.materialize(), q.materialize())


# ------------------------------------------------------------------------------------- quantize


@each_format_on_a_mesh(1)
def test_quantize_takes_the_sharding_over(mesh, name):
    q = FORMATS[name](jax.device_put(weight(), NamedSharding(mesh, P("b", "a"))))
    assert specs(q) == want(q, ("b", "a"))
    assert jtu.tree_structure(q) == jtu.tree_structure(quantized(name))
    assert_close(q.materialize(), dense(name), terms=4, magnitude=4)


@each_format
def test_quantize_inside_jit_keeps_the_sharding(name):
    sharded = jax.device_put(weight(), NamedSharding(AUTO, P("a", "b")))
    q = jax.jit(FORMATS[name])(sharded)
    assert specs(q) == want(q, ("a", "b"))
    assert_close(q.materialize(), dense(name), terms=4, magnitude=4)


def test_the_search_for_scales_takes_the_sharding_over(mesh):
    quantize = partial(eqq.ArrayNF4.quantize, block_size=8, scale="search")
    sharded = jax.device_put(weight(), NamedSharding(mesh, P("a", "b")))
    q = quantize(sharded)
    assert specs(q) == want(q, ("a", "b"))
    assert_close(q.materialize(), quantize(weight()).materialize(), terms=4, magnitude=4)
    if mesh is EXPLICIT:
        inside = jax.jit(quantize)(sharded)
        assert specs(inside) == want(inside, ("a", "b"))


@pytest.mark.parametrize(
    ("quantize", "lowest"),
    [
        (eqq.Array1B.quantize, -1),
        (eqq.RSROperatorBinary.quantize, 0),
        (eqq.RSROperatorTernary.quantize, -1),
        (eqq.RSROperatorBinary.from_matrix, 0),
        (eqq.RSROperatorTernary.from_matrix, -1),
    ],
)
def test_integers_give_their_sharding_to_the_codes(quantize, lowest):
    x = np.random.default_rng(0).integers(lowest, 2, (ROWS, COLUMNS), np.int8)
    q = quantize(jax.device_put(x, NamedSharding(AUTO, P("a", "b"))))
    assert specs(q) == want(q, ("a", "b"))
    assert_same(q.materialize(), x)
    cut = jax.device_put(x[:, :12], NamedSharding(AUTO, P(None, "b")))
    with pytest.raises(ValueError, match=r"Axis 1 of length 12 .*'b'.*tiles of (5|8)\."):
        quantize(cut)


# ------------------------------------------------------------------------------------- storage


@each_format_on_a_mesh(0)
def test_a_sharded_array_is_pickled_and_saved(mesh, name, tmp_path):
    q = split(name, mesh, ("a", "b"))
    eqx.tree_serialise_leaves(tmp_path / "q.eqx", q)
    saved = [eqx.tree_deserialise_leaves(tmp_path / "q.eqx", like) for like in (q, quantized(name))]
    for loaded in (pickle.loads(pickle.dumps(q)), *saved):
        assert jtu.tree_structure(loaded) == jtu.tree_structure(q)
        for got, expected in zip(jtu.tree_leaves(loaded), jtu.tree_leaves(q), strict=True):
            assert_same(got, expected)


# ------------------------------------------------------------------------------- transformations


@each_format_on_a_mesh(1)
def test_transpose_permutes_the_sharding(mesh, name):
    q = split(name, mesh, ("a", "b"))
    transposed, values = jax.jit(lambda q: (q.T, q.T.materialize()))(q)
    assert specs(transposed) == want(transposed, ("b", "a"))
    assert_same(values, dense(name).T)


@each_format_on_a_mesh(0)
def test_jit_keeps_the_sharding(mesh, name):
    q = split(name, mesh, ("a", "b"))
    halves = jax.jit(eqq.implicit(lambda q: q / 2))(q)
    assert specs(halves) == want(halves, ("a", "b"))
    assert_same(halves.materialize(), dense(name) / 2)


@pytest.mark.parametrize(
    ("mesh", "names", "x_names"),
    [(EXPLICIT, ("b", None), ("a", None)), (AUTO, (None, "b"), ("a", "b"))],
    ids=["outputs", "contraction"],
)
@each_format
def test_products(name, mesh, names, x_names):
    q = split(name, mesh, names)
    host = normal(8, COLUMNS, seed=1)
    x = jax.device_put(host, NamedSharding(mesh, P(*x_names)))
    with eqq.strict():
        y = jax.jit(eqq.implicit(lambda q, x: x @ q.T))(q, x)
    assert_close(y, host @ dense(name).T)


@pytest.mark.parametrize(
    ("mesh", "names"),
    [(EXPLICIT, ("a", None, None)), (AUTO, (None, "a", "b"))],
    ids=["stack", "matrix"],
)
@each_format
def test_vmap_and_scan_over_a_stack(name, mesh, names):
    q = stacked(name).with_sharding(NamedSharding(mesh, P(*names)))
    assert specs(q) == want(q, names)
    x = jax.device_put(normal(2, COLUMNS, seed=2), NamedSharding(mesh, P(names[0])))

    @jax.jit
    def run(q: Any, x: Any) -> Any:
        if names[0] is None:
            return lax.scan(lambda i, layer: (i, eqq.implicit(jnp.matmul)(layer, x[0])), 0, q)[1]
        return jax.vmap(eqq.implicit(jnp.matmul))(q, x)

    with eqq.strict():
        y = run(q, x)
    inputs = np.asarray(x) if names[0] else np.asarray(x)[[0, 0]]
    assert_close(y, np.einsum("kij,kj->ki", dense_stack(name), inputs))


@each_format
def test_quantize_under_vmap(name):
    mesh, names = EXPLICIT, (None, "a", "b")
    x = jax.device_put(normal(2, ROWS, COLUMNS), NamedSharding(mesh, P(*names)))

    @jax.jit
    def run(x: Any) -> Any:
        q = jax.vmap(FORMATS[name])(x)
        return q, q.materialize()

    q, values = run(x)
    assert spec(q.payload_leaf.array) == names
    assert_close(values, dense_stack(name), terms=4, magnitude=4)


# ------------------------------------------------------------------------------------ shard_map


@pytest.mark.parametrize(
    ("mesh", "cut", "check_vma"), [(EXPLICIT, "outputs", False), (AUTO, "contraction", True)]
)
@each_format
def test_shard_map(name, mesh, cut, check_vma):
    q_spec, x_spec, y_spec = {
        "outputs": (P("b", None), P("a", None), P("a", "b")),
        "contraction": (P(None, "b"), P("a", "b"), P("a", None)),
    }[cut]
    shapes = []

    def local(q: Any, x: Any) -> Any:
        shapes.append(q.shape)
        y = x @ q.T
        return lax.psum(y, "b") if cut == "contraction" else y

    mapped = partial(
        jax.shard_map, mesh=mesh, in_specs=(q_spec, x_spec), out_specs=y_spec, check_vma=check_vma
    )
    q = split(name, mesh, q_spec)
    host = normal(8, COLUMNS, seed=1)
    x = jax.device_put(host, NamedSharding(mesh, x_spec))

    @jax.jit
    def value_and_gradient(q: Any, x: Any) -> Any:
        y, pull_back = jax.vjp(lambda x: eqq.implicit(lambda q, x: mapped(local)(q, x))(q, x), x)
        return y, pull_back(y)[0]

    with eqq.strict():
        y, gradient = value_and_gradient(q, x)
    assert set(shapes) == {(4, COLUMNS) if cut == "outputs" else (ROWS, COLUMNS // 4)}
    expected = host @ dense(name).T
    assert_close(y, expected)
    assert_close(gradient, expected @ dense(name), ROWS * COLUMNS, 100.0)


@each_format
def test_a_device_decodes_its_shard_by_itself(name):
    """Codes and scales of a shard lie on the device that holds it: nothing is sent."""
    names = ("a", "b")
    mapped = jax.shard_map(jnp.negative, mesh=AUTO, in_specs=P(*names), out_specs=P(*names))
    # The scales of a nested one are expanded outside.
    q = split(name, AUTO, names).expanded()
    with eqq.on_materialize("ignore"):
        compiled = jax.jit(lambda q: eqq.materialize(eqq.implicit(mapped)(q))).lower(q).compile()
    assert_same(compiled(q), -dense(name))
    assert not [op for op in ("all-", "collective-") if op in compiled.as_text()]


@pytest.mark.parametrize("axis", [0, 1])
@each_format
def test_a_shard_mapped_output_stays_packed_where_its_tiles_are_not_split(name, axis):
    names = ("b", None) if axis == 0 else (None, "b")
    mapped = jax.shard_map(lambda q: q * 2.0, mesh=AUTO, in_specs=P(*names), out_specs=P(*names))
    with eqq.on_materialize("ignore"):
        y = jax.jit(eqq.implicit(mapped))(split(name, AUTO, names))
    packed_there = axis == packed_axis(name) and FORMATS[name].packed > 1
    assert eqq.is_implicit(y) is not packed_there
    assert_same(eqq.materialize(y), 2 * dense(name))


def test_shard_map_outside_implicit_splits_rows_but_not_packed_axes():
    q = quantized("ternary")

    def mapped(names: Any) -> Any:
        of_leaves = jtu.tree_map(lambda leaf: P(*(names if leaf.shape[1] > 1 else names[:1])), q)
        materialize = jax.shard_map(
            lambda q: q.materialize(), mesh=AUTO, in_specs=(of_leaves,), out_specs=P(*names)
        )
        return jax.jit(materialize)(q)

    assert_same(mapped(("b", None)), dense("ternary"))
    with pytest.raises(
        ValueError, match="packed axis -1 .*should have 128 stored elements.*16, 32"
    ):
        mapped((None, "b"))


# -------------------------------------------------------------------------------- nested scales


@each_spec
def test_nested_scales_stay_nested(mesh, names):
    q = split("nf4 double", mesh, names)
    nested = q.absmax
    assert isinstance(nested, NestedScale)
    assert spec(nested.codes) == names
    assert nested.absmax.shape == (5,)  # groups of 256 scales reach over devices
    for leaf in (nested.absmax, nested.offset):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == 8
    scales = jax.jit(lambda nested: nested.materialize())(nested)
    assert spec(scales) == names
    assert_same(scales, quantized("nf4 double").absmax.materialize())


def test_nested_scales_that_shard_map_has_cut_raise():
    q = quantized("nf4 double")
    of_leaves = jtu.tree_unflatten(jtu.tree_structure(q), [P("b"), P("b"), P(), P()])
    mapped = jax.shard_map(
        lambda q: q.materialize(), mesh=AUTO, in_specs=(of_leaves,), out_specs=P("b")
    )
    with pytest.raises(ValueError, match=r"shape \(4, 80\) are not in 5 groups of 256.*shard_map"):
        mapped(q)
