"""`ArrayNF4`: the bits of bitsandbytes, its edges, its options and its complaints."""

import pathlib

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import assert_raises

import eqquant as eqq
from eqquant.formats.nested import DYNAMIC_MAP, NestedScale
from eqquant.formats.nf4 import LEVELS
from eqquant.tiles import Packing, Tile


GOLDEN = np.load(pathlib.Path(__file__).parent / "data" / "bnb_nf4.npz")
CASES = sorted({key.rsplit("/", 2)[0] for key in GOLDEN.files if key.count("/") == 4})


def golden_codes(case: str) -> np.ndarray:
    packed = GOLDEN[f"{case}/plain/packed"]
    return np.stack([packed >> 4, packed & 15], -1).reshape(-1)  # the first one in the high half


def golden_input(case: str) -> jax.Array:
    name, dtype, _ = case.split("/")
    return jnp.asarray(GOLDEN[f"{name}/input"], dtype)


@pytest.mark.parametrize("case", CASES)
def test_plain_arrays_have_the_bits_of_bitsandbytes(case):
    x, block_size = golden_input(case), int(case.split("/")[2])
    q = eqq.ArrayNF4.quantize(x.ravel(), block_size)
    np.testing.assert_array_equal(q.codes, golden_codes(case)[: x.size])
    np.testing.assert_array_equal(q.absmax, GOLDEN[f"{case}/plain/absmax"])
    assert_dequantized(q, x, GOLDEN[f"{case}/plain/dequant"], block_size)


@pytest.mark.parametrize("case", CASES)
def test_nested_scales_have_the_bits_of_bitsandbytes(case):
    x, block_size = golden_input(case), int(case.split("/")[2])
    q = eqq.ArrayNF4.quantize(x.ravel(), block_size, double=True)
    np.testing.assert_array_equal(q.codes, golden_codes(case)[: x.size])
    np.testing.assert_array_equal(q.absmax.codes, GOLDEN[f"{case}/nested/absmax"])
    np.testing.assert_array_equal(q.absmax.absmax, GOLDEN[f"{case}/nested/nested_absmax"])
    np.testing.assert_array_equal(q.absmax.offset, GOLDEN[f"{case}/nested/offset"])
    assert_dequantized(q, x, GOLDEN[f"{case}/nested/dequant"], block_size)


def assert_dequantized(q, x, dequantized, block_size):
    if x.ndim > 1 and x.shape[-1] % block_size and x.size > block_size and block_size > x.shape[-1]:
        # bitsandbytes counts blocks within a row here, finds none, and takes the first scale for all.
        first = np.asarray(LEVELS, np.float32)[q.codes] * np.asarray(q.scale)[0]
        want = np.asarray(jnp.asarray(first).astype(x.dtype), np.float32)
        if not np.array_equal(want, dequantized.ravel()):
            np.testing.assert_array_equal(
                np.asarray(q.materialize(), np.float32), dequantized.ravel()
            )
        return
    np.testing.assert_array_equal(np.asarray(q.materialize(), np.float32), dequantized.ravel())


def test_the_dynamic_map_is_that_of_bitsandbytes():
    np.testing.assert_array_equal(DYNAMIC_MAP, GOLDEN["nested_code"])


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("square") and "/64" in c])
def test_rows_of_whole_blocks_are_the_flattened_array(case):
    x = golden_input(case)
    q = eqq.ArrayNF4.quantize(x)
    assert q.shape == x.shape and q.absmax.shape == (64, 2)
    np.testing.assert_array_equal(q.codes.ravel(), golden_codes(case))
    np.testing.assert_array_equal(q.absmax.ravel(), GOLDEN[f"{case}/plain/absmax"])


def test_levels_are_stored_and_decoded_exactly():
    levels = jnp.asarray(LEVELS, jnp.float32)
    np.testing.assert_array_equal(eqq.ArrayNF4.quantize(levels).materialize(), levels)
    np.testing.assert_array_equal(eqq.ArrayNF4.quantize(3.5 * levels).materialize(), 3.5 * levels)


def test_a_value_between_two_levels_goes_to_the_lower_one():
    middle = np.float32((LEVELS[9] + LEVELS[10]) / 2)
    q = eqq.ArrayNF4.quantize(jnp.asarray([1.0, middle, np.nextafter(middle, np.float32(1))]))
    assert q.codes.tolist() == [15, 9, 10]


def test_half_of_each_block_is_in_the_high_nibbles():
    x = jnp.asarray(LEVELS, jnp.float32)
    packed = eqq.ArrayNF4.quantize(x, block_size=16).packed
    assert packed.tolist() == [(i << 4) | (i + 8) for i in range(8)]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("block_size", [2, 4, 6, 64])
def test_blocks_lie_along_any_axis_and_need_not_divide_it(axis, block_size):
    x = jax.random.normal(jax.random.key(1), (5, 7, 9))
    q = eqq.ArrayNF4.quantize(x, block_size, axis)
    assert q.shape == x.shape and q.dtype == x.dtype
    moved, length = jnp.moveaxis(x, axis, -1), x.shape[axis]
    for start in range(0, length, block_size):
        stop = min(start + block_size, length)
        part = eqq.ArrayNF4.quantize(moved[..., start:stop], block_size)
        got = jnp.moveaxis(q.materialize(), axis, -1)[..., start:stop]
        np.testing.assert_array_equal(got, part.materialize())


@pytest.mark.parametrize("double", [False, True])
def test_zero_blocks_are_exact_and_spoil_nothing(double):
    x = jnp.zeros((3, 128)).at[1, 64:].set(1.5)
    q = eqq.ArrayNF4.quantize(x, double=double)
    np.testing.assert_array_equal(q.materialize() == 0, x == 0)
    assert bool(jnp.isfinite(q @ jnp.ones(128)).all())


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_magnitudes_at_the_ends_of_the_dtype(dtype):
    info = jnp.finfo(dtype)
    for magnitude in (float(info.max), float(info.max) / 3, 1e-4, float(info.tiny) * 64):
        x = magnitude * jnp.asarray([[1, -1, 0, 0.5]], jnp.float32)
        y = np.asarray(eqq.ArrayNF4.quantize(x.astype(dtype)).materialize(), np.float64)
        want = magnitude * np.asarray([[1, -1, 0, LEVELS[12]]])
        np.testing.assert_allclose(y, want, rtol=float(info.eps) * 2)


def test_double_quantization_loses_little_and_saves_three_eighths_of_a_bit():
    x = jax.random.normal(jax.random.key(0), (256, 4096))
    plain, double = (eqq.ArrayNF4.quantize(x, double=double) for double in (False, True))
    assert plain.bits_per_weight == 4.5 and double.bits_per_weight < 4.128
    np.testing.assert_array_equal(plain.packed, double.packed)
    np.testing.assert_allclose(plain.absmax, double.scale, rtol=0.03)


# Groups of 256 scales: all of them, 4 rows of 64 scales, halves of rows of 512, and 28.4 rows of 9.
@pytest.mark.parametrize(("shape", "are_tiles"), [
    ((8, 128), True), ((16, 4096), True), ((8, 32768), True), ((64, 576), False),
])  # fmt: skip
def test_structural_rules_keep_nested_scales_where_groups_are_tiles(shape, are_tiles):
    q = eqq.ArrayNF4.quantize(jax.random.normal(jax.random.key(0), shape), double=True)
    for program in (
        lambda x: x.T,
        lambda x: x[4:8],
        lambda x: x[:, shape[1] // 64 // 2 * 64 :],
        lambda x: x.reshape(4, -1, shape[1]),
        lambda x: jnp.stack([x.T, x.T[::1]])[1],
        lambda x: jnp.concatenate([x, x]),
        lambda x: x.T[:, 4:8].T,
    ):
        moved = eqq.implicit(program)(q)
        assert isinstance(moved, eqq.ArrayNF4)
        assert isinstance(moved.absmax, NestedScale) == are_tiles
        np.testing.assert_array_equal(moved.materialize(), program(q.materialize()))
    assert isinstance(q.astype(jnp.bfloat16).absmax, NestedScale)
    np.testing.assert_array_equal(q.expanded().materialize(), q.materialize())


def test_each_slice_is_nested_by_itself_under_vmap():
    x = jax.random.normal(jax.random.key(0), (3, 8, 128)) * jnp.asarray([1, 10, 100])[:, None, None]
    mapped = jax.vmap(lambda x: eqq.ArrayNF4.quantize(x, double=True))(x)
    assert mapped.shape == x.shape and mapped.absmax.offset.shape == (3,)
    for i in range(3):
        alone = eqq.ArrayNF4.quantize(x[i], double=True)
        for a, b in zip(
            [leaf[i] for leaf in jtu.tree_leaves(mapped)],
            jtu.tree_leaves(alone),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        mapped.materialize(),
        jnp.stack([eqq.ArrayNF4.quantize(a, double=True).materialize() for a in x]),
    )
    np.testing.assert_allclose(
        jax.vmap(lambda w, v: w @ v)(mapped, jnp.ones((3, 128))),
        mapped.materialize().sum(-1), rtol=1e-4, atol=1e-2,
    )  # fmt: skip


def test_scanning_over_a_stack_that_was_quantized_as_a_whole():
    q = eqq.ArrayNF4.quantize(jax.random.normal(jax.random.key(0), (3, 8, 64)), double=True)
    x = jnp.ones(64)
    for run in (
        eqq.implicit(lambda q: jax.lax.map(lambda w: w @ x, q)),
        lambda q: jax.lax.map(lambda w: w @ x, q),
    ):
        np.testing.assert_allclose(run(q), q.materialize() @ x, rtol=1e-5, atol=1e-4)
    nested = NestedScale.quantize(
        q.scale
    )  # all entries share a mean: JAX alone cannot cut it, and says so
    whole = q.replace(absmax=nested)
    got = eqq.implicit(lambda q: jax.lax.map(lambda w: w @ x, q))(whole)
    np.testing.assert_allclose(got, whole.materialize() @ x, rtol=1e-5, atol=1e-4)
    with pytest.raises((ValueError, IndexError)):
        jax.lax.map(lambda w: w @ x, whole)


def test_search_has_the_same_layout():
    x = jax.random.normal(jax.random.key(0), (16, 100))
    searched, plain = eqq.ArrayNF4.quantize(x, scale="search"), eqq.ArrayNF4.quantize(x)
    assert jtu.tree_structure(searched) == jtu.tree_structure(plain)
    errors = [float(jnp.sum((x - q.materialize()) ** 2)) for q in (searched, plain)]
    assert errors[0] < errors[1]
    zeros = eqq.ArrayNF4.quantize(jnp.zeros((2, 8)), scale="search")
    np.testing.assert_array_equal(zeros.materialize(), 0)


def test_constructor_takes_the_arguments_of_the_reference():
    q = eqq.ArrayNF4.quantize(jax.random.normal(jax.random.key(0), (4, 100)), 64)
    again = eqq.ArrayNF4(q.packed, q.absmax, 64, shape=(4, 100), dtype=q.dtype)
    np.testing.assert_array_equal(again.materialize(), q.materialize())
    assert eqq.ArrayNF4(q.packed, q.absmax, 64).shape == (4, 128)


def ones(*shape):
    return jnp.ones(shape, jnp.uint8)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: eqq.ArrayNF4.quantize(jnp.ones(8), 0), ValueError, ["even", "block_size=0"]),
        (lambda: eqq.ArrayNF4.quantize(jnp.ones(8), 7), ValueError, ["even", "block_size=7"]),
        (lambda: eqq.ArrayNF4.quantize(jnp.ones((2, 8)), axis=2), ValueError, ["axis 2", "2 axes"]),
        (lambda: eqq.ArrayNF4.quantize(jnp.arange(8)), TypeError, ["floating-point", "int32", "astype"]),
        (lambda: eqq.ArrayNF4.quantize(jnp.ones(8), dtype=jnp.int8), TypeError, ["dtype", "int8"]),
        (
            lambda: eqq.ArrayNF4.quantize(jnp.ones((2, 8)).at[1, 3].set(jnp.nan)),
            ValueError,
            ["array[1, 3] is nan", "has to stay dense"],
        ),
        (
            lambda: eqq.ArrayNF4.quantize(jnp.ones((2, 8)).at[1, 3].set(-jnp.inf), double=True),
            ValueError,
            ["array[1, 3] is -inf"],
        ),
        (
            lambda: eqq.ArrayNF4(ones(4, 64), jnp.ones((4, 3)), 64),
            ValueError,
            ["absmax has 3 entries along axis 1", "128", "block_size is 64"],
        ),
        (lambda: eqq.ArrayNF4(ones(4, 64), jnp.ones(4), 64), ValueError, ["rank of the array"]),
        (
            lambda: eqq.ArrayNF4(ones(4, 64), jnp.ones((4, 2)), 64, shape=(4, 300)),
            ValueError,
            ["packed axis -1", "160", "(4, 64)"],
        ),
        (
            lambda: eqq.ArrayNF4(ones(4, 64), jnp.ones((4, 2)), 64, shape=(5, 128)),
            ValueError,
            ["shape=(5, 128)", "(4, 128)"],
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named_shown_and_answered(make, error, words):
    assert_raises(make, error, words)


def test_mapping_over_the_packed_axis_is_refused():
    q = eqq.ArrayNF4.quantize(jnp.ones((4, 128)))
    with pytest.raises(ValueError, match=r"packed axis|inconsistent sizes"):
        jax.vmap(lambda w: w @ jnp.ones(4), in_axes=1)(q)
    stale = eqq.ArrayNF4(ones(4, 8), jnp.ones((4, 1)), packing=Packing(-1, 16, Tile(16, 8)))
    moved = jtu.tree_map(lambda leaf: jnp.moveaxis(leaf, -1, 0), stale)
    with pytest.raises(ValueError, match="packed axis -1"):
        moved.materialize()


def test_non_finite_numbers_under_jit_stay_in_their_block():
    x = jnp.ones((2, 128)).at[0, 3].set(jnp.nan).at[1, 70].set(jnp.inf)
    y = jax.jit(lambda x: eqq.ArrayNF4.quantize(x).materialize())(x)
    assert bool(jnp.isnan(y[0, :64]).all()) and bool(jnp.isnan(y[1, 64:]).all())
    assert bool((y[0, 64:] == 1).all()) and bool((y[1, :64] == 1).all())
