"""`RSROperatorBinary` and `RSROperatorTernary`: exact codes, the product, its derivative, complaints."""

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_raises

import eqquant as eqq


BINARY, TERNARY = eqq.RSROperatorBinary, eqq.RSROperatorTernary
each_operator = pytest.mark.parametrize("operator", [BINARY, TERNARY])


def matrix(operator, n=24, m=19, seed=0, dtype=np.int32):
    low = 0 if operator is BINARY else -1
    return np.random.default_rng(seed).integers(low, 2, (n, m)).astype(dtype)


@each_operator
@hypothesis.given(
    k=st.integers(1, 16),
    shape=st.sampled_from([(1, 1), (3, 7), (5, 16), (4, 33), (2, 3, 9), (0, 4), (4, 0), (6,)]),
    dtype=st.sampled_from([np.int8, np.int32]),
)
def test_any_k_and_any_number_of_columns_is_exact(operator, k, shape, dtype):
    a = np.random.default_rng(k).integers(0 if operator is BINARY else -1, 2, shape).astype(dtype)
    op = operator.from_matrix(jnp.asarray(a), k)
    assert (op.shape, op.dtype) == (shape, jnp.float32)
    np.testing.assert_array_equal(op.materialize(), a)


def test_the_attributes_of_the_reference():
    a = matrix(BINARY)
    op = BINARY.from_matrix(a, k=5, org_dtype=jnp.bfloat16)
    assert (op.k, op.padding, op.org_dtype, op.dtype) == (5, 1, jnp.bfloat16, jnp.bfloat16)
    assert op.codes.shape == (24, 4) and op.codes.dtype == jnp.uint8
    assert BINARY.from_matrix(a, k=9).codes.dtype == jnp.uint16
    maps = op.one_hot_maps
    assert maps.shape == (4, 24, 2**5)
    # Block by block: the sums of entries that meet equal codes, times the bits of the codes.
    v = np.arange(24.0, dtype=np.float32)
    bits = (np.arange(2**5)[:, None] >> np.arange(5)) & 1
    blocks = [v @ one_hot @ bits for one_hot in np.asarray(maps)]
    np.testing.assert_array_equal(np.concatenate(blocks)[:19], v @ a)
    ternary = TERNARY.from_matrix(matrix(TERNARY), k=5)
    np.testing.assert_array_equal(
        ternary.rsr_b1.materialize() - ternary.rsr_b2.materialize(), matrix(TERNARY)
    )


@pytest.mark.parametrize(
    ("a", "k", "codes"),
    [([[0, 1, 1, 0], [1, 0, 0, 1]], 4, [[6], [9]]), ([[1, 0, 1]], 2, [[1, 1]])],
)
def test_bit_j_of_a_code_is_column_j_of_its_block(a, k, codes):
    assert BINARY.from_matrix(jnp.asarray(a), k).codes.tolist() == codes


@each_operator
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_dot_of_vectors_and_stacks(operator, shape, dtype):
    a = matrix(operator)
    op = operator.from_matrix(a, k=6)
    v = jnp.asarray(np.random.default_rng(1).integers(-3, 4, shape), dtype)
    with eqq.on_materialize("ignore" if dtype == jnp.int32 else "error"):
        got = op.dot(v)
    want = v @ jnp.asarray(a, jnp.float32)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    np.testing.assert_array_equal(got, want)


@each_operator
def test_dot_is_differentiable_and_keeps_fractions(operator):
    a = matrix(operator)
    op, v = operator.from_matrix(a), jnp.linspace(0.1, 0.9, 24)
    np.testing.assert_allclose(op.dot(v), v @ a, rtol=1e-5, atol=1e-5)
    weights = jnp.arange(19.0)
    got = jax.grad(lambda v: op.dot(v) @ weights)(v)
    np.testing.assert_allclose(got, a @ weights, rtol=1e-6)
    _, tangent = jax.jvp(op.dot, (v,), (jnp.ones(24),))
    np.testing.assert_allclose(tangent, a.sum(0), rtol=1e-6)


@each_operator
def test_full_citizens_of_dispatch(operator):
    a = matrix(operator).astype(np.float32)
    op, x = operator.from_matrix(a.astype(np.int8)), jnp.linspace(-1, 1, 5 * 24).reshape(5, 24)
    programs = {
        "x @ op": lambda x, a: x @ a,
        "jnp.dot": lambda x, a: jnp.dot(x, a),
        "einsum": lambda x, a: jnp.einsum("bn,nm->mb", x, a),
        "transposed": lambda x, a: a.T @ x.T,
        "vmap": lambda x, a: jax.vmap(lambda row: row @ a)(x),
        "scan": lambda x, a: jax.lax.scan(lambda c, row: (c, row @ a), 0, x)[1],
    }
    for name, program in programs.items():
        with eqq.strict():
            got = jax.jit(eqq.implicit(program))(x, op)
        np.testing.assert_allclose(got, program(x, a), rtol=1e-5, atol=1e-5, err_msg=name)


@each_operator
def test_stacked_operators_under_vmap_and_scan(operator):
    stack = jnp.stack([jnp.asarray(matrix(operator, seed=i)) for i in range(3)])
    ops, v = jax.vmap(operator.from_matrix)(stack), jnp.linspace(0, 1, 3 * 24).reshape(3, 24)
    assert ops.shape == (3, 24, 19)
    want = jnp.einsum("in,inm->im", v, stack)
    np.testing.assert_allclose(
        jax.vmap(lambda op, v: op.dot(v))(ops, v), want, rtol=1e-5, atol=1e-5
    )
    _, scanned = jax.lax.scan(lambda c, both: (c, both[0].dot(both[1])), 0, (ops, v))
    np.testing.assert_allclose(scanned, want, rtol=1e-5, atol=1e-5)


def test_quantize_of_integers_is_from_matrix():
    for operator in (BINARY, TERNARY):
        a = matrix(operator, dtype=np.int8)
        op = operator.quantize(a)
        assert op.scale is None and op.dtype == jnp.int8
        np.testing.assert_array_equal(op.materialize(), a)


def test_quantize_of_floats_keeps_their_size():
    x = 0.02 * jax.random.normal(jax.random.key(0), (8, 100))
    ternary = TERNARY.quantize(x)
    np.testing.assert_array_equal(ternary.materialize(), eqq.Array1B.quantize(x).materialize())
    binary = BINARY.quantize(x)
    positive = np.where(x > 0, x, 0)
    scale = positive.sum(1, keepdims=True) / (positive > 0).sum(1, keepdims=True)
    np.testing.assert_allclose(binary.materialize(), np.where(x > 0, scale, 0), rtol=1e-6)
    assert BINARY.quantize(x, axis=0).scale.shape == (1, 100)


def test_in_a_model():
    linear = eqx.nn.Linear(20, 12, key=jax.random.key(0))
    packed = eqq.quantize(linear, TERNARY.quantize)
    x = jnp.linspace(-1, 1, 20)
    with eqq.strict():
        got = packed(x)
    np.testing.assert_allclose(got, eqq.materialize(packed)(x), rtol=1e-5, atol=1e-6)


def test_delete_frees_the_leaves():
    op = TERNARY.from_matrix(matrix(TERNARY))
    op.delete()
    assert op.rsr_b1.codes.is_deleted() and op.rsr_b2.codes.is_deleted()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: BINARY.from_matrix(jnp.asarray([[0, 2]])), ValueError, ["among 0, 1", "array[0, 1] is 2"]),
        (lambda: BINARY.from_matrix(jnp.asarray([[0, -1]])), ValueError, ["is -1"]),
        (lambda: TERNARY.from_matrix(jnp.asarray([[0], [-2]])), ValueError, ["-1, 0, 1", "array[1, 0] is -2"]),
        (lambda: BINARY.from_matrix(jnp.ones((2, 2))), TypeError, ["integers", "float32", "astype"]),
        (lambda: BINARY.from_matrix(jnp.ones((2, 2), int), k=0), ValueError, ["1 to 16", "k=0"]),
        (lambda: TERNARY.from_matrix(jnp.ones((2, 2), int), k=17), ValueError, ["1 to 16", "k=17"]),
        (lambda: BINARY.from_matrix(jnp.asarray(1)), ValueError, ["takes a matrix", "without axes"]),
        (lambda: BINARY.quantize(jnp.asarray(1.0)), ValueError, ["takes a matrix", "without axes"]),
        (lambda: TERNARY.quantize(jnp.asarray([[1.0, jnp.nan]])), ValueError, ["array[0, 1] is nan"]),
        (lambda: BINARY.quantize(jnp.asarray([[-1.0, -jnp.inf]])), ValueError, ["array[0, 1] is -inf"]),
        (
            lambda: BINARY(jnp.ones((2, 3), jnp.uint8), 8, 25, shape=(2, 20)),
            ValueError,
            ["packed axis", "3"],
        ),
        (
            lambda: TERNARY(BINARY.from_matrix(matrix(BINARY)), BINARY.from_matrix(matrix(BINARY), 4)),
            ValueError,
            ["packed alike"],
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named_shown_and_answered(make, error, words):
    assert_raises(make, error, words)
