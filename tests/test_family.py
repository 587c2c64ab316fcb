"""The family of formats: what a class must say, what codes mean, and how stored leaves become what products read."""

from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, UInt8

import eqquant as eqq
from eqquant.coding import bisect, Coding, FloatCoding, TernaryCoding
from eqquant.tiles import (
    combine,
    common_block_size,
    Packing,
    packing_of,
    payload_leaf,
    scale_leaf,
    Tile,
    to_elements,
    Unaligned,
)


# ------------------------------------------------------------------------- what a class must say


def test_a_format_that_redefines_its_value_is_refused_when_it_is_made():
    with pytest.raises(
        TypeError, match=r"Redefined\.materialize.*Give it a `coding`, or override `plane`"
    ):

        class Redefined(eqq.Array8B):
            def materialize(self) -> Any:
                return jnp.zeros(self.shape)


def test_a_field_that_nothing_reads_is_refused_when_the_class_is_made():
    with pytest.raises(
        TypeError, match=r"Forgetful\.minimum is stored, but nothing reads it.*summands"
    ):

        class Forgetful(eqq.AbstractScaledArray):
            codes: UInt8[Array, "..."]
            scale: Float[Array, "..."]
            minimum: Float[Array, "..."]
            dtype: np.dtype = eqx.field(static=True)
            casts: tuple[np.dtype, ...] = eqx.field(static=True, default=())

            payload: ClassVar[str] = "codes"
            coding: ClassVar[Coding] = Coding(bits=4)
            packing: ClassVar[None] = None
            block_size: ClassVar[None] = None


def test_a_scale_or_offset_of_its_own_needs_to_say_what_is_multiplied():
    with pytest.raises(TypeError, match=r"Zeroed computes.*2 \* x is right: multiplied"):

        class Zeroed(eqq.ArrayInt4):
            @property
            def offset_leaf(self) -> Any:
                return None


def test_static_facts_and_class_variables_are_no_stored_fields():
    class Fine(eqq.AbstractScaledArray):
        codes: UInt8[Array, "..."]
        scale: Float[Array, "..."]
        note: str = eqx.field(static=True)
        dtype: np.dtype = eqx.field(static=True)
        casts: tuple[np.dtype, ...] = eqx.field(static=True, default=())
        unit: "ClassVar[str]" = "m"

        payload: ClassVar[str] = "codes"
        coding: ClassVar[Coding] = Coding(bits=4)
        packing: ClassVar[None] = None
        block_size: ClassVar[None] = None

    codes = jnp.arange(6, dtype=jnp.uint8).reshape(2, 3)
    q = Fine(codes, jnp.ones((2, 1)), "a", np.dtype(np.float32))
    assert q.leaves().keys() == {"codes", "scale"}
    np.testing.assert_array_equal(q.materialize(), codes)


def test_a_scale_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="offset has 3 entries along axis 1"):
        eqq.ArrayInt4(
            jnp.zeros((2, 4), jnp.uint8), jnp.ones((2, 1)), jnp.ones((2, 3)), Packing(-1, 8, Tile(8, 4)), 8, "affine"
        )  # fmt: skip


# --------------------------------------------------------------------------------- codes as data

CODINGS = {
    "int8": Coding(bits=8, signed=True),
    "int4": Coding(bits=4, low=-8),
    "uint3": Coding(bits=3),
    "signs": Coding(bits=1, low=-1, step=2),
    "codebook": Coding(bits=2, levels=(-1.0, -0.25, 0.0, 1.5), first="high"),
    "unsorted": eqq.ArrayNVFP4.coding,
    "ternary": TernaryCoding(),
    "e4m3": FloatCoding(kind="float8_e4m3fn"),
    "e5m2": FloatCoding(kind="float8_e5m2"),
}


@pytest.mark.parametrize("name", CODINGS)
def test_every_value_is_its_own_nearest(name):
    coding = CODINGS[name]
    count = 3 if name == "ternary" else 2**coding.bits
    codes = jnp.arange(count).astype(jnp.uint8)
    if coding.signed:
        codes = jnp.arange(-127, 128).astype(jnp.int8)
    values = coding.value(codes, jnp.float32)
    kept = jnp.isfinite(values)
    np.testing.assert_array_equal(
        coding.value(coding.nearest(values), jnp.float32)[kept], values[kept]
    )
    np.testing.assert_array_equal(coding.nearest_value(values)[kept], values[kept])
    assert coding.largest == float(jnp.max(jnp.abs(values[kept])))
    zero = coding.zero_code
    assert (zero is None) == (name == "signs")
    if zero is not None:
        assert coding.value(jnp.asarray(zero, codes.dtype), jnp.float32) == 0


@pytest.mark.parametrize("name", CODINGS)
def test_no_value_is_nearer_than_the_nearest(name):
    coding = CODINGS[name]
    count = 3 if name == "ternary" else 2**coding.bits
    dtype = jnp.int8 if coding.signed else jnp.uint8
    values = np.asarray(coding.value(jnp.arange(count).astype(dtype), jnp.float32))
    values = values[np.isfinite(values) & (np.abs(values) <= coding.largest)]
    x = jax.random.normal(jax.random.key(0), (500,)) * coding.largest / 2
    got = np.asarray(coding.value(coding.nearest(x), jnp.float32))
    least = np.abs(np.asarray(x)[:, None] - values).min(-1)
    np.testing.assert_allclose(
        np.abs(np.asarray(x) - got), least, rtol=1e-5, atol=1e-6 * coding.largest
    )


@pytest.mark.parametrize("name", CODINGS)
def test_unpack_inverts_pack(name):
    coding = CODINGS[name]
    elements = {"ternary": 5, "int8": 1, "e4m3": 1, "e5m2": 1}.get(name, 8 // coding.bits)
    rng = np.random.default_rng(0)
    top = 3 if name == "ternary" else 2**coding.bits
    planes = [jnp.asarray(rng.integers(0, top, 20), jnp.uint8) for _ in range(elements)]
    if coding.signed:
        planes = [planes[0].astype(jnp.int8)]
    stored = coding.pack(planes)
    for i, plane in enumerate(planes):
        np.testing.assert_array_equal(coding.unpack(stored, i, elements), plane)
    if coding.zero_code is not None:
        filler = jnp.asarray(coding.filler(elements), stored.dtype)
        zeros = [
            coding.value(coding.unpack(filler, i, elements), jnp.float32) for i in range(elements)
        ]
        assert all(zero == 0 for zero in zeros)


def test_ties_go_to_the_even_code_where_the_format_says_so():
    x = jnp.asarray([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -2.5, -5.0])
    got = eqq.ArrayNVFP4.coding.nearest_value(x)
    np.testing.assert_array_equal(got, [0, 1, 1, 2, 2, 4, 4, 0, -1, -2, -4])


def test_a_codebook_has_as_many_levels_as_codes():
    with pytest.raises(
        ValueError, match="2 bits are codes of 4 levels; Coding\\(levels=...\\) has 3"
    ):
        Coding(bits=2, levels=(0.0, 1.0, 2.0))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 15, 16, 255])
def test_bisection_counts_what_is_below(count):
    midpoints = np.sort(np.random.default_rng(0).normal(size=count)).astype(np.float32)
    x = jnp.concatenate([jnp.linspace(-4, 4, 101), jnp.asarray(midpoints)])
    want = (np.asarray(x)[:, None] > midpoints).sum(-1)
    np.testing.assert_array_equal(bisect(x, [*midpoints]), want)


# ------------------------------------------------------------------------------- tiles with slack


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 128])
def test_a_tile_may_have_slack(length):
    packing = Packing(-1, length, Tile(64, 13))
    assert packing.elements == 5 and packing.stored == -(-length // 64) * 13
    x = jax.random.normal(jax.random.key(0), (3, length))
    planes = packing.split(x)
    assert [plane.shape for plane in planes] == [(3, packing.stored)] * 5
    np.testing.assert_array_equal(packing.merge(planes), x)


@pytest.mark.parametrize("levels", ["ternary", "binary"])
def test_tiles_of_packed_numbers_can_be_cut_and_multiplied(levels):
    w = jax.random.normal(jax.random.key(0), (8, 300))
    q = eqq.Array1B.quantize(w, levels=levels, tile=64)
    np.testing.assert_array_equal(
        q.materialize(), eqq.Array1B.quantize(w, levels=levels).materialize()
    )
    with eqq.strict():
        cut = q[:, 64:192]
        left, right = jnp.ones((2, 8)), jnp.linspace(-1, 1, 600).reshape(2, 300)
        products = eqq.implicit(lambda q, x, y: (x @ q, y @ q.T))(q, left, right)
    assert isinstance(cut, eqq.Array1B) and cut.shape == (8, 128)
    dense = q.materialize()
    np.testing.assert_array_equal(cut.materialize(), dense[:, 64:192])
    np.testing.assert_allclose(products[0], left @ dense, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(products[1], right @ dense.T, rtol=1e-4, atol=1e-4)


def test_ternary_numbers_in_tiles_of_64_take_an_eighth_of_13_bits():
    q = eqq.Array1B.quantize(jnp.ones((1, 4096)), tile=64)
    assert q.weight.nbytes * 8 / 4096 == 1.625
    with pytest.raises(ValueError, match=r"tile must be positive; Array1B.quantize\(..., tile=0\)"):
        eqq.Array1B.quantize(jnp.ones((2, 3)), tile=0)


# ----------------------------------------------------------------------- blocks that differ by axis


@pytest.mark.parametrize("quantize", [
    partial(eqq.Array8B.quantize, axis=(0, 1), block_size=(16, 24)),
    partial(eqq.ArrayFP8.quantize, axis=(0, 1), block_size=(16, 24)),
])  # fmt: skip
def test_blocks_of_matrices_stay_packed(quantize):
    w = jax.random.normal(jax.random.key(0), (3, 40, 60))
    each = [quantize(x) for x in w]
    assert each[0].scale.shape == (3, 3) and each[0].block_size == (16, 24)
    q = jax.vmap(quantize)(w)
    np.testing.assert_array_equal(q.materialize(), jnp.stack([x.materialize() for x in each]))
    x = jnp.linspace(-1, 1, 120).reshape(2, 60)
    with eqq.strict():
        moved = (q.mT, q[1], q[:, 16:32], q[:, :, 24:48].mT, q.swapaxes(0, 2))
        y = eqq.implicit(lambda x, w: x @ w.T)(x, each[0])
    dense = q.materialize()
    wanted = (dense.mT, dense[1], dense[:, 16:32], dense[:, :, 24:48].mT, dense.swapaxes(0, 2))
    for got, want in zip(moved, wanted, strict=True):
        assert type(got) is type(q)
        np.testing.assert_array_equal(got.materialize(), want)
    assert moved[0].block_size == (24, 16) and moved[-1].block_size == (24, 16, 1)
    np.testing.assert_allclose(y, x @ each[0].materialize().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("quantize", [eqq.Array8B.quantize, eqq.ArrayFP8.quantize])
def test_block_sizes_go_with_the_axes_as_they_are_named(quantize):
    w = jax.random.normal(jax.random.key(0), (32, 64))
    q = quantize(w, axis=(1, 0), block_size=(16, 8))
    np.testing.assert_array_equal(
        q.materialize(), quantize(w, axis=(0, 1), block_size=(8, 16)).materialize()
    )
    assert q.scale.shape == (4, 4) and quantize(w, axis=(-1, 0), block_size=(16, 8)).block_size == (
        8,
        16,
    )
    for sizes in ((16,), (16, 0), 16):
        with pytest.raises(ValueError, match=r"block_size=\.\.\.\) must be positive.*given .*16"):
            quantize(w, axis=(0, 1), block_size=sizes)


def test_block_sizes_are_read_back_from_leaves():
    leaf = scale_leaf(jnp.ones((3, 4, 1)), (5, 8, 7), (2, 2, 9))
    assert common_block_size([leaf]) == 2
    assert common_block_size([scale_leaf(jnp.ones((3, 8, 4)), (5, 8, 7), (2, 1, 2))]) == 2
    assert common_block_size([scale_leaf(jnp.ones((2, 4, 1)), (5, 8, 7), (3, 2, 1))]) == (3, 2, 1)
    other = scale_leaf(jnp.ones((2, 1, 1)), (5, 8, 7), 4)
    with pytest.raises(Unaligned):
        common_block_size([leaf, other])


@pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 2), (3, 2), (1, 6), (None, 3), (12, 12)])
def test_two_leaves_of_numbers_are_combined_on_common_tiles(first, second):
    def leaf(size, key):
        stored = 1 if size is None else -(-12 // size)
        return scale_leaf(jax.random.normal(jax.random.key(key), (2, stored)), (2, 12), size)

    a, b = leaf(first, 0), leaf(second, 1)
    both = combine(jnp.multiply, a, b)
    np.testing.assert_array_equal(
        to_elements(both, [0, 1]), to_elements(a, [0, 1]) * to_elements(b, [0, 1])
    )
    sizes = {size for size in (first, second) if size}
    if len(sizes) == 1 or max(sizes) % min(sizes) == 0:
        assert both.array.shape[1] == -(-12 // min(sizes))


# --------------------------------------------------------------------------------- codes and signs


def test_high_bits_have_the_tiles_of_the_low_ones():
    packing = Packing(-1, 100, Tile(32, 16))
    wide = packing.of_high_bits(4, 1)
    assert wide.tile == Tile(32, 4) and wide.elements == 8 and wide.stored == 16
    assert packing_of(payload_leaf(jnp.zeros((2, 16), jnp.uint8), wide)) == wide
    with pytest.raises(Unaligned):
        Packing(-1, 100, Tile(4, 2)).of_high_bits(4, 1)


@pytest.mark.parametrize("zero", ["symmetric", "affine"])
def test_a_scalar_multiplies_what_the_format_names(zero):
    w = jax.random.normal(jax.random.key(0), (4, 64)) + 1
    q = eqq.ArrayInt4.quantize(w, 16, zero=zero, scale_dtype=jnp.float16)
    with eqq.strict():
        products = (2 * q, -q, q / 4, q * 0.3)
    for got, factor in zip(products, (2, -1, 0.25, 0.3), strict=True):
        assert isinstance(got, eqq.ArrayInt4)
        want = q.materialize() * np.float32(factor)
        np.testing.assert_allclose(got.materialize(), want, rtol=1e-6, atol=1e-6)
    assert (-q).scale.dtype == jnp.float16 and (0.3 * q).scale.dtype == jnp.float32


def test_arrays_that_mean_something_else_are_not_joined():
    w = jax.random.normal(jax.random.key(0), (4, 64)) + 1
    pairs = [
        (eqq.ArrayInt4.quantize(w, 16), eqq.ArrayInt4.quantize(w, 16, zero="affine")),
        (eqq.ArrayFP8.quantize(w), eqq.ArrayFP8.quantize(w, kind="e5m2")),
        (eqq.Array1B.quantize(w, tile=40), eqq.Array1B.quantize(w, levels="binary", tile=40)),
        (eqq.Array8B.quantize(w), eqq.Array8B.quantize(w, activations="int8")),
        (eqq.ArrayNF4.quantize(w), eqq.ArrayNF4.quantize(w, double=True)),
    ]
    for a, b in [*pairs, *(pair[::-1] for pair in pairs)]:
        for program in (
            lambda a, b: jnp.concatenate([a, b]),
            lambda a, b: a.at[0:1].set(b[0:1]),
            lambda a, b: jax.lax.dynamic_update_slice(a, b[0:1], (1, 0)),
        ):
            with eqq.on_materialize("ignore"):
                got = eqq.materialize(eqq.implicit(program)(a, b))
            want = program(a.materialize(), b.materialize())
            np.testing.assert_array_equal(got, want)
    mixed = eqq.implicit(lambda a, b: jnp.concatenate([a, b]))(*pairs[-1])
    assert isinstance(mixed, eqq.ArrayNF4)  # with the scales of both expanded


def test_what_is_encoded_again_is_the_same():
    w = jax.random.normal(jax.random.key(0), (6, 70))
    for quantize in (
        eqq.Array8B.quantize,
        eqq.ArrayNF4.quantize,
        partial(eqq.ArrayNF4.quantize, double=True),
        eqq.Array1B.quantize,
        partial(eqq.ArrayInt4.quantize, zero="affine"),
        eqq.ArrayNVFP4.quantize,
        eqq.ArrayFP8.quantize,
        eqq.RSROperatorTernary.quantize,
    ):
        q = quantize(w)
        np.testing.assert_array_equal(q.encode(q.materialize()).materialize(), q.materialize())
    with pytest.raises(ValueError, match=r"encode\(array\) takes an array of shape \(6, 70\)"):
        q.encode(w[:3])
    with pytest.raises(ValueError, match="encode.array. takes finite numbers"):
        q.encode(w.at[0, 0].set(jnp.nan))
    columns = eqq.column_major(eqq.ArrayNF4.quantize(w))
    np.testing.assert_array_equal(columns.encode(w).materialize(), columns.materialize())


# ------------------------------------------------------------------------------------- new formats


@pytest.mark.parametrize(("quantize", "decibels"), [
    (eqq.ArrayInt4.quantize, 20.4),
    (partial(eqq.ArrayInt4.quantize, scale="search"), 20.95),
    (partial(eqq.ArrayInt4.quantize, zero="affine"), 20.9),
    (partial(eqq.ArrayInt4.quantize, zero="affine", scale="search"), 21.45),
    (eqq.ArrayNVFP4.quantize, 20.4),
    (eqq.ArrayFP8.quantize, 31.5),
    (partial(eqq.ArrayFP8.quantize, kind="e5m2"), 25.5),
])  # fmt: skip
def test_accuracy_of_the_new_formats(quantize, decibels):
    w = jax.random.normal(jax.random.key(0), (256, 512))
    got = eqq.report(w, quantize(w)).rows[0].sqnr_db
    assert decibels - 0.1 < got < decibels + 0.2


def test_int4_has_the_values_of_gguf():
    """Q4_0 and Q4_1 of llama.cpp, computed here as their reference quantizers do, with float32 scales."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (50, 32)), np.float32)
    i = np.abs(x).argmax(-1)
    d = x[np.arange(50), i] / np.float32(-8)
    q = np.clip(np.floor(x / d[:, None] + np.float32(8.5)), 0, 15)
    symmetric = eqq.ArrayInt4.quantize(jnp.asarray(x), 32)
    np.testing.assert_array_equal(symmetric.scale[:, 0], d)
    halves = np.split(q.astype(np.uint8), 2, axis=-1)
    assert (np.asarray(symmetric.codes) == halves[0] | halves[1] << 4).mean() > 0.999  # ties aside
    affine = eqq.ArrayInt4.quantize(jnp.asarray(x), 32, zero="affine")
    np.testing.assert_array_equal(affine.offset[:, 0], x.min(-1))
    np.testing.assert_allclose(affine.scale[:, 0], (x.max(-1) - x.min(-1)) / 15, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, -3.5, 1e30])
def test_a_block_of_equal_numbers_is_exact_with_an_offset(value):
    x = jnp.full((2, 10), value)
    q = eqq.ArrayInt4.quantize(x, zero="affine")
    np.testing.assert_array_equal(q.materialize(), x)
    assert (eqq.ArrayInt4.quantize(jnp.zeros((2, 10))).materialize() == 0).all()


def test_float16_scales_that_overflow_are_refused():
    x = jnp.full((2, 10), 1e6).at[0, 0].set(-1e7)
    with pytest.raises(ValueError, match="overflow a float16 scale"):
        eqq.ArrayInt4.quantize(x, scale_dtype=jnp.float16)
    with pytest.raises(ValueError, match="overflow a float16 scale"):  # the offset does
        eqq.ArrayInt4.quantize(jnp.full((2, 10), 1e5), zero="affine", scale_dtype=jnp.float16)


def test_bit_patterns_and_coded_scales_are_never_differentiated():
    w = jax.random.normal(jax.random.key(0), (32, 64))
    for quantize, moving in ((eqq.ArrayFP8.quantize, 1), (eqq.ArrayNVFP4.quantize, 1)):
        q = quantize(w)
        gradient = eqx.filter_grad(lambda q: jnp.sum(q.materialize() ** 2))(q)
        assert len(jax.tree.leaves(gradient)) == moving
        marked = jax.tree.leaves(eqq.trainable(q, scales=True))
        assert sum(marked) == moving
    assert isinstance(jax.tree.leaves(eqq.trainable(q)), list) and not any(
        jax.tree.leaves(eqq.trainable(q))
    )


def test_two_level_scales_stay_packed_through_structural_rules():
    q = eqq.ArrayNVFP4.quantize(jax.random.normal(jax.random.key(0), (32, 64)))
    other = eqq.ArrayNVFP4.quantize(5 * jax.random.normal(jax.random.key(1), (32, 64)))
    programs = (
        lambda a, b: a.T,
        lambda a, b: a[3:9, 16:48],
        lambda a, b: jnp.concatenate([a, b]),
        lambda a, b: jnp.concatenate([a, b], axis=1),
        lambda a, b: jnp.stack([a, b])[1].T,
        lambda a, b: a.reshape(4, 8, 64),
        lambda a, b: -a * 2,
    )
    for program in programs:
        with eqq.strict():
            got = eqq.implicit(program)(q, other)
        assert isinstance(got, eqq.ArrayNVFP4) and got.scale.codes.dtype == jnp.uint8
        np.testing.assert_array_equal(
            got.materialize(), program(q.materialize(), other.materialize())
        )
