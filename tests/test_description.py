"""Quantized arrays as plain data and back; and files that say what their numbers are."""

import dataclasses
import io
import json
import textwrap
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import assert_raises, normal
from hypothesis import given
from test_extending import ArraySmallFloat, int5_arrays, small_floats

import eqquant as eqq
from eqquant import _description, _facts, lora, testing
from eqquant.coding import Coding
from eqquant.testing import QUANTIZERS
from eqquant.tiles import Packing


def write(tree: Any) -> io.BytesIO:
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, tree, eqq.serialise_filter_spec, is_leaf=eqq.is_implicit)
    file.seek(0)
    return file


def read(file: Any, like: Any) -> Any:
    return eqx.tree_deserialise_leaves(
        file, like, eqq.deserialise_filter_spec, is_leaf=eqq.is_implicit
    )


def assert_same(got: Any, want: Any) -> None:
    assert jtu.tree_structure(got) == jtu.tree_structure(want)
    for a, b in zip(*map(jtu.tree_leaves, (got, want)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(a, b)


def complaint(make: Callable[[], Any]) -> str:
    """The sentence behind the error in which Equinox names the path."""
    with pytest.raises(RuntimeError, match="Error at leaf with path") as caught:
        make()
    cause: BaseException | None = caught.value
    while isinstance(cause, RuntimeError):
        cause = cause.__cause__
    assert isinstance(cause, ValueError)
    return str(cause)


def hollow(tree: Any) -> Any:
    return eqx.filter_eval_shape(lambda: tree)


def adapted(base: Any, **options: Any) -> Any:
    """With an adapter, whose factors are 2 by its columns and its rows by 2."""
    return lora.add(base, key=jax.random.key(1), **{"rank": 2, "alpha": 4, **options})


ARRAYS: dict[str, Callable[[Any], Any]] = {
    **QUANTIZERS,
    "small blocks": lambda w: eqq.Array8B.quantize(w, block_size=(2, 5), axis=(0, 1)),
    "cast": lambda w: eqq.Array8B.quantize(w).astype(jnp.bfloat16).astype(jnp.float32),
    "double, cut": lambda w: eqq.ArrayNF4.quantize(jnp.tile(w, (2, 40)), double=True)[:2],
    "column-major": QUANTIZERS["binary"].column_major,
    "adapted": lambda w: adapted(eqq.ArrayNF4.quantize(w)),
    "adapted, dense": adapted,
    "adapted, column-major": lambda w: adapted(QUANTIZERS["ternary"].column_major(w)),
    "somebody else's": ArraySmallFloat.quantize,
    "under vmap": jax.vmap(eqq.ArrayNF4.quantize),
}
each_array = pytest.mark.parametrize("name", ARRAYS)


def example(name: str) -> Any:
    return ARRAYS[name](normal(*((2, 4, 70) if name == "under vmap" else (4, 70))))


# ---------------------------------------------------------------------------------- descriptions


def assert_round_trip(q: Any) -> None:
    description = eqq.describe(q)
    text = json.dumps(description, allow_nan=False)
    assert json.loads(text) == description
    again = eqq.from_description(json.loads(text))
    assert jtu.tree_structure(again) == jtu.tree_structure(q)
    assert eqq.describe(again) == description
    for a, b in zip(*map(jtu.tree_leaves, (again, q)), strict=True):
        assert isinstance(a, jax.ShapeDtypeStruct)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@each_array
def test_what_is_described_is_made_again(name: str) -> None:
    assert_round_trip(example(name))


@given(st.data())
@pytest.mark.parametrize("strategy", [testing.arrays, small_floats, int5_arrays])
def test_every_legal_array_is_made_again(strategy: Any, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([s for group in testing.SHAPES.values() for s in group]))
    hypothesis.assume(not (strategy is int5_arrays and len(shape) < 2))
    q = data.draw(strategy(shape, data.draw(st.sampled_from(testing.DTYPES))))
    assert_round_trip(q)
    assert eqq.describe(q)["shape"] == list(shape)


@given(st.data())
def test_a_file_is_read_by_what_is_alike_and_by_nothing_else(data: st.DataObject) -> None:
    strategies = [*testing.FORMATS.values(), small_floats]
    strategy = data.draw(st.sampled_from(strategies))
    saved, like = (
        data.draw(strategy((4, 6), data.draw(st.sampled_from(testing.DTYPES[:2]))))
        for _ in range(2)
    )

    def kind(q: Any) -> Any:
        return jtu.tree_structure(q), [(x.shape, x.dtype) for x in jtu.tree_leaves(q)]

    if kind(saved) == kind(like):
        assert_same(read(write(saved), like), saved)
    else:
        assert "The file has " in complaint(lambda: read(write(saved), like))


def test_what_a_description_says() -> None:
    q = eqq.ArrayNF4.quantize(normal(4, 70), block_size=20)
    assert eqq.describe(q) == {
        "class": "ArrayNF4",
        "version": 1,
        "shape": [4, 70],
        "dtype": "float32",
        "facts": {
            "packing": {
                "Packing": {
                    "axis": -1,
                    "length": 70,
                    "tile": {"Tile": {"size": 20, "stored": 10}},
                }
            },
            "block_size": 20,
            "dtype": {"dtype": "float32"},
            "casts": [],
        },
        "leaves": {
            "packed": {"dtype": "uint8", "shape": [4, 40]},
            "absmax": {"dtype": "float32", "shape": [4, 4]},
        },
    }


def test_shapes_alone_are_described_as_arrays_are() -> None:
    for q in map(example, ("nvfp4", "adapted", "column-major")):
        assert eqq.describe(hollow(q)) == eqq.describe(q) == eqq.describe(jax.device_get(q))
    assert jax.jit(lambda q: eqq.describe(q)["shape"])(example("fp8")) == [4, 70]


def test_leaves_that_were_taken_away() -> None:
    q = example("adapted")
    part = eqx.filter(q, lora.adapters(q))
    assert eqq.describe(part)["shape"] is None
    assert eqq.describe(part)["leaves"]["base"]["leaves"] == {"packed": None, "absmax": None}
    assert_round_trip(part)


def test_numbers_that_json_does_not_have() -> None:
    coding = Coding(bits=1, levels=(-np.inf, 0.1))
    q = eqq.CodedScale(jnp.zeros((1, 1), jnp.uint8), coding)
    facts = _description._describe(q)["facts"]
    json.dumps(facts, allow_nan=False)
    assert _facts.decoded(facts["coding"], "") == coding
    assert json.dumps(_facts.encoded((np.int64(4), np.float32(0.5)), "")) == "[4, 0.5]"


def test_names_of_our_classes_are_their_own() -> None:
    found, waiting = [], [eqx.Module]
    while waiting:
        waiting += (cls := waiting.pop()).__subclasses__()
        found += [cls.__name__] * cls.__module__.startswith("eqquant.")
    assert len(set(found)) == len(found) > 10


@dataclasses.dataclass(frozen=True)
class OddCoding(Coding):
    """Somebody else's codes, with a fact of their own."""

    bits: int = 3
    shift: float = 0.5


class ArrayWithFact(eqq.QuantizedArray):
    """A number, as often as a fact says."""

    number: Any
    fact: Any = eqx.field(static=True)

    description_version: ClassVar[int] = 3
    shape = (2,)
    dtype = np.dtype(np.float32)

    def materialize(self) -> jax.Array:
        return jnp.full(2, self.number)


@pytest.mark.parametrize(
    "fact", [None, True, -3, 0.1, "x", (), ((1,), ("y", None)), OddCoding(low=2)]
)
def test_facts(fact: Any) -> None:
    q = ArrayWithFact(jnp.ones(()), fact)
    assert eqq.describe(q)["class"] == f"{__name__}:ArrayWithFact"
    assert eqq.describe(q)["version"] == 3
    assert_round_trip(q)


def test_what_a_description_cannot_say() -> None:
    for fact, kind in ((object(), "object"), (jnp.float32, "_ScalarMeta"), ({"a": 1}, "dict")):
        q = ArrayWithFact(jnp.ones(()), (1, fact))
        words = ("ArrayWithFact.fact", kind, "np.dtype, Packing", "property")
        assert_raises(lambda q=q: eqq.describe(q), TypeError, words)
    words = ("ArrayWithFact.number", "[1, 2]", "static=True")
    assert_raises(lambda: eqq.describe(ArrayWithFact([1, 2], None)), TypeError, words)
    for x in (np.ones(3), {"w": example("int8")}):
        words = ("takes a quantized array", f"given {type(x).__name__}.", "is_leaf=eqq.is_implicit")
        assert_raises(lambda x=x: eqq.describe(x), TypeError, words)


def test_descriptions_of_nothing_that_is_known() -> None:
    good = eqq.describe(example("nf4"))
    facts, leaves = good["facts"], good["leaves"]
    for changes, words in (
        ({"class": "ArrayNF3"}, ["'ArrayNF3'", "later version of eqquant"]),
        ({"class": "pack.age:Their"}, ["'pack.age:Their'", "import pack.age"]),
        ({"version": 2}, ["ArrayNF4", "version 2", "version 1", "quantize again"]),
        ({"shape": [4, 71]}, ["[4, 71]", "[4, 70]"]),
        ({"dtype": "float16"}, ["'float16'", "'float32'"]),
        ({"facts": facts | {"colour": 1}}, ["ArrayNF4.colour", "class does not"]),
        ({"leaves": {"packed": leaves["packed"]}}, ["ArrayNF4.absmax", "does not have"]),
        ({"facts": facts | {"packing": {"Bag": {}}}}, ["ArrayNF4.packing", "'Bag'"]),
    ):
        made = lambda c=changes: eqq.from_description(good | c)  # noqa: E731
        assert_raises(made, ValueError, words)
    for bad in ({}, {"class": "ArrayNF4"}, {k: v for k, v in good.items() if k != "facts"}):
        assert_raises(lambda bad=bad: eqq.from_description(bad), ValueError, ["eqq.describe"])


def test_nothing_is_imported() -> None:
    code = """
        import eqquant as eqq
        try:
            eqq.from_description({"class": "antigravity:X", "version": 1})
        except ValueError:
            import sys
            assert "antigravity" not in sys.modules
        else:
            raise AssertionError
    """
    exec(textwrap.dedent(code))


# ----------------------------------------------------------------------------------------- files


@each_array
def test_files(name: str) -> None:
    q = example(name)
    for like in (
        q,
        hollow(q),
        jtu.tree_map(jnp.zeros_like, q),
        eqq.from_description(eqq.describe(q)),
    ):
        assert_same(read(write(q), like), q)
    host = jax.device_get(q)
    loaded = read(write(host), host)
    assert all(isinstance(leaf, np.ndarray) for leaf in jtu.tree_leaves(loaded))
    assert_same(loaded, host)
    assert len(write(q).getvalue()) < q.nbytes + 4000


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_files_of_small_dtypes(dtype: Any) -> None:
    q = example("int8")
    q = q.replace(scale=q.scale.astype(dtype))
    for saved, like in ((q, q), (q, hollow(q)), (jax.device_get(q), q), (q, jax.device_get(q))):
        loaded = read(write(saved), like)
        assert isinstance(loaded.scale, np.ndarray) == isinstance(like.scale, np.ndarray)
        assert_same(loaded, q)


def test_files_of_a_state_of_training() -> None:
    tree = (model(), optax.adam(1e-3).init(eqx.filter(model(), eqx.is_inexact_array)))
    assert eqx.tree_equal(read(write(tree), hollow(tree)), tree)
    masks = jtu.tree_map(lambda _: True, model())
    with pytest.raises(RuntimeError) as caught:
        write(masks)
    assert "ArrayNF4.packed is True" in str(caught.value.__cause__.__cause__)  # pyright: ignore[reportOptionalMemberAccess]


def model(seed: int = 0, how: Any = eqq.ArrayNF4.quantize) -> Any:
    return eqq.quantize(eqx.nn.MLP(64, 8, 70, 2, key=jax.random.key(seed)), how)


def test_a_model(tmp_path: Any) -> None:
    saved = model(
        how={"layers.0.*": eqq.ArrayNVFP4.quantize, "*": QUANTIZERS["ternary"].column_major}
    )
    saved = adapted(saved, paths="layers.1.weight")
    path = tmp_path / "model.eqx"
    eqx.tree_serialise_leaves(path, saved, eqq.serialise_filter_spec, is_leaf=eqq.is_implicit)
    loaded = read(path, hollow(saved))
    assert eqx.tree_equal(loaded, saved)
    x = normal(64)
    np.testing.assert_array_equal(loaded(x), saved(x))


def test_adapters_alone() -> None:
    full = adapted(model(), paths="layers.1.weight")
    part = eqx.filter(full, lora.adapters(full))
    assert_same(read(write(part), part), part)
    assert len(write(part).getvalue()) < 4 * 2 * (70 + 70) + 1024  # nothing about the other two
    other = adapted(model(), paths="layers.1.weight", alpha=8)
    said = complaint(lambda: read(write(part), eqx.filter(other, lora.adapters(other))))
    assert said.startswith("The file has scale 2.0, this AdaptedArray 4.0")


W = normal(4, 64)
NF4, INT8, ONE_BIT = eqq.ArrayNF4.quantize, eqq.Array8B.quantize, eqq.Array1B.quantize
DIFFERENT: dict[str, tuple[Any, Any, str]] = {
    "length": (NF4(W[:, :63]), NF4(W), "shape (4, 63), this ArrayNF4 (4, 64)"),
    "block size": (NF4(W, block_size=20), NF4(W, block_size=24), "block_size 20, this ArrayNF4 24"),
    "block size, int8": (INT8(W, block_size=20), INT8(W, block_size=16 + 5), "block_size 20, this Array8B 21"),
    "levels": (ONE_BIT(W[:, :5]), ONE_BIT(W[:, :5], levels="binary"), "levels ternary, this Array1B binary"),
    "class": (QUANTIZERS["rsr binary"](W), ONE_BIT(W, levels="binary"), "class RSROperatorBinary, the skeleton Array1B"),
    "order": (eqq.column_major(NF4(W)), NF4(W), "class ColumnMajor, the skeleton ArrayNF4"),
    "other order": (NF4(W), eqq.column_major(NF4(W)), "class ArrayNF4, the skeleton ColumnMajor"),
    "order inside": (adapted(eqq.column_major(NF4(W))), adapted(NF4(W)), "base.class ColumnMajor, the skeleton ArrayNF4"),
    "dtype": (INT8(W, dtype=jnp.bfloat16), INT8(W), "dtype bfloat16, this Array8B float32"),
    "casts": (INT8(W).astype(jnp.bfloat16).astype(jnp.float32), INT8(W), "casts (bfloat16,), this Array8B ()"),
    "activations": (INT8(W, activations="int8"), INT8(W), "activations int8, this Array8B float"),
    "alpha": (adapted(NF4(W), alpha=8), adapted(NF4(W)), "scale 4.0, this AdaptedArray 2.0"),
    "base": (adapted(NF4(W)), adapted(W), "base ArrayNF4, this AdaptedArray float32[4,64]"),
    "block size of base": (adapted(INT8(W, block_size=20)), adapted(INT8(W, block_size=21)), "base.block_size 20, this Array8B 21"),
    "kind": (eqq.ArrayFP8.quantize(W), eqq.ArrayFP8.quantize(W, kind="e5m2"), "kind e4m3, this ArrayFP8 e5m2"),
    "zero": (QUANTIZERS["int4"](W), QUANTIZERS["int4 affine"](W), "zero symmetric, this ArrayInt4 affine"),
    "double": (NF4(W, double=True), NF4(W), "absmax NestedScale, this ArrayNF4 float32[4,1]"),
}  # fmt: skip


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_means_something_else_is_refused(what: str) -> None:
    saved, like, words = DIFFERENT[what]
    for other in (like, hollow(like)):
        said = complaint(lambda other=other: read(write({"w": saved}), {"w": other}))
        assert said.startswith(f"The file has {words}")
        assert "Build the skeleton the way the saved model was quantized." in said
    read(write(saved), saved)


def test_the_path_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"name='layers'.*idx=2.*name='weight'"):
        read(write(model()), model(how={"layers.2.*": INT8, "*": NF4}))


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(NF4(W))
    monkeypatch.setattr(eqq.ArrayNF4, "description_version", 2)
    said = complaint(lambda: read(file, NF4(W)))
    assert said.startswith("The file has version 1, this ArrayNF4 2")


def test_fields_may_change_places() -> None:
    q = INT8(W)
    description = eqq.describe(q)
    leaves = {name: description["leaves"][name] for name in ("weight", "scale")}
    text = json.dumps(description | {"leaves": leaves}).encode()
    file = io.BytesIO()
    file.write(_description._MAGIC + len(text).to_bytes(8, "little") + text)
    for name in leaves:
        jnp.save(file, getattr(q, name))
    file.seek(0)
    assert_same(read(file, hollow(q)), q)


def test_dense_and_quantized_do_not_stand_for_each_other() -> None:
    said = complaint(lambda: read(write(NF4(W)), W))
    assert "an ArrayNF4 of shape (4, 64) here" in said
    assert "dense there" in complaint(lambda: read(write(W), NF4(W)))


def test_files_without_descriptions() -> None:
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, NF4(W))
    file.seek(0)
    assert_same(eqx.tree_deserialise_leaves(file, hollow(NF4(W))), NF4(W))
    file.seek(0)
    said = complaint(lambda: read(file, NF4(W)))
    assert "no description" in said and "eqx.tree_deserialise_leaves(path, like) loads it" in said


def test_is_leaf_forgotten() -> None:
    def forgetful(file: Any, like: Any) -> Any:
        return eqx.tree_deserialise_leaves(file, like, eqq.deserialise_filter_spec)

    said = complaint(lambda: forgetful(write(NF4(W)), NF4(W)))
    assert "is_leaf=eqq.is_implicit" in said
    with pytest.raises(RuntimeError):
        eqx.tree_deserialise_leaves(write(NF4(W)), NF4(W))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, NF4(W), eqq.serialise_filter_spec)
    file.seek(0)
    assert "is_leaf=eqq.is_implicit" in complaint(lambda: read(file, NF4(W)))


@pytest.mark.parametrize("on_disk", [False, True])
def test_files_that_were_cut_short(on_disk: bool, tmp_path: Any) -> None:
    tree = {"bias": jnp.ones(5), "n": 3, "weight": NF4(W)}
    whole = write(tree).getvalue()
    for length in (0, 3, 20, 130, 160, *range(200, len(whole), 37), len(whole) - 1):
        file: Any = io.BytesIO(whole[:length])
        if on_disk:
            file = tmp_path / "cut.eqx"
            file.write_bytes(whole[:length])
        said = complaint(lambda file=file: read(file, tree))
        assert "cut short" in said, length


def test_foreign_and_damaged_files() -> None:
    for like in (NF4(W), W):
        said = complaint(lambda like=like: read(io.BytesIO(b"PK\3\4" + bytes(100)), like))
        assert "no description" in said or "no array here, but b'PK" in said
    whole = bytearray(write(NF4(W)).getvalue())
    for place, word in ((15, "cut short"), (16, "damaged"), (20, "damaged")):
        changed = whole.copy()
        changed[place] = 0xFF
        assert word in complaint(lambda c=changed: read(io.BytesIO(bytes(c)), NF4(W)))
    listed = _description._MAGIC + (2).to_bytes(8, "little") + b"[]"
    assert "eqq.describe" in complaint(lambda: read(io.BytesIO(listed), NF4(W)))
    changed = bytes(whole).replace(b"|u1", b"|i1")
    assert "damaged: it says that packed is" in complaint(lambda: read(io.BytesIO(changed), NF4(W)))


def test_a_format_of_somebody_elses() -> None:
    q = ArraySmallFloat.quantize(W)
    assert eqq.describe(q)["class"] == "test_extending:ArraySmallFloat"
    cut = q.replace(packing=Packing(-1, 63, q.packing.tile))  # pyright: ignore[reportOptionalMemberAccess]
    said = complaint(lambda: read(write(cut), q))
    assert said.startswith("The file has shape (4, 63), this ArraySmallFloat (4, 64)")
