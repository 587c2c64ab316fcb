"""A quantized array behaves as an array: operators, indexing, NumPy, jaxtyping, tree utilities."""

import io
import operator

import beartype
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import in_turns
from jaxtyping import Array, Float, jaxtyped

import eqquant as eqq
from eqquant.testing import LAYOUTS, QUANTIZERS


@pytest.fixture
def q():
    return eqq.Array8B.quantize(jax.random.normal(jax.random.key(0), (4, 6)))


@pytest.fixture
def dense(q):
    return q.materialize()


PACKED = {
    "q @ x": lambda q: q @ jnp.arange(6.0),
    "x @ q": lambda q: np.arange(4, dtype=np.float32) @ q,
    "q.dot": lambda q: q.dot(jnp.ones(6)),
    "2 * q": lambda q: 2 * q,
    "q * 2": lambda q: q * 2.0,
    "q / 2": lambda q: q / 2,
    "-q": lambda q: -q,
    "q.T": lambda q: q.T,
    "q.mT": lambda q: q.mT,
    "transpose": lambda q: q.transpose(1, 0),
    "swapaxes": lambda q: q.swapaxes(0, 1),
    "reshape": lambda q: q.reshape(2, 2, 6),
    "ravel": lambda q: q.ravel(),
    "squeeze": lambda q: q.reshape(1, 4, 6).squeeze(0),
    "astype": lambda q: q.astype(jnp.bfloat16),
    "q[1]": lambda q: q[1],
    "q[-1, 2]": lambda q: q[-1, 2],
    "q[1:3]": lambda q: q[1:3],
    "q[..., None]": lambda q: q[..., None],
    "q[array]": lambda q: q[jnp.array([0, 2])],
    "list(q)": lambda q: list(q)[2],
    "sum": lambda q: q.sum(0),
    "max": lambda q: q.max(),
    "min": lambda q: q.min(1),
}
DENSE = {
    "q + x": lambda q: q + jnp.ones(6),
    "1 - q": lambda q: 1 - q,
    "q - q": lambda q: q - 2 * q,
    "q * q": lambda q: q * q,
    "q ** 2": lambda q: q**2,
    "2 ** q": lambda q: 2.0**q,
    "q // 2": lambda q: q // 0.1,
    "q % 2": lambda q: q % 0.3,
    "divmod": lambda q: divmod(q, 0.3)[1],
    "abs": abs,
    "+q": operator.pos,
    "round": lambda q: round(q, 1),
    "q < 0": lambda q: q < 0,
    "q >= 0": lambda q: q >= 0,
    "q == q": lambda q: q == q,
    "q != 0": lambda q: q != 0,
    "mask": lambda q: q[np.array([True, False, True, False])],
    "mean": lambda q: q.mean(1),
    "at": lambda q: q.at[0].set(1.0),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_operators(name, q, dense):
    with eqq.strict():
        got = PACKED[name](q)
    np.testing.assert_allclose(eqq.materialize(got), PACKED[name](dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DENSE)
def test_dense_operators(name, q, dense):
    with eqq.on_materialize("ignore"):
        got = eqq.materialize(DENSE[name](q))
    want = DENSE[name](dense)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_numpy_scalars_and_arrays_on_either_side(q, dense):
    with eqq.on_materialize("ignore"):
        for other in (np.float32(2), np.ones((4, 6), np.float32), 3, 1.5):
            for op in (operator.add, operator.mul, operator.sub, operator.truediv):
                np.testing.assert_allclose(
                    eqq.materialize(op(q, other)), op(dense, other), rtol=1e-6
                )
                np.testing.assert_allclose(
                    eqq.materialize(op(other, q)), op(other, dense), rtol=1e-6
                )


def test_jax_array_on_the_left_is_right_dense_and_warned_about(q, dense):
    x = jnp.ones((2, 4))
    with pytest.warns(
        eqq.MaterializeWarning, match=r"outside eqquant.implicit.*Array8B float32\[4,6\]"
    ):
        np.testing.assert_allclose(x @ q, x @ dense, rtol=1e-6)
    with pytest.warns(eqq.MaterializeWarning):
        np.testing.assert_array_equal(jnp.sin(q), jnp.sin(dense))


def test_numpy_conversion(q, dense):
    with eqq.on_materialize("ignore"):
        np.testing.assert_array_equal(np.asarray(q), dense)
        assert np.asarray(q, np.float64).dtype == np.float64
        assert np.array(q).dtype == np.float32
    with pytest.raises(ValueError, match="must copy"):
        np.array(q, copy=False)


def test_scalars_and_lengths(q):
    one = eqq.Array8B.quantize(jnp.asarray(2.5))
    assert (float(one), int(one), complex(one), bool(one)) == (2.5, 2, 2.5 + 0j, True)
    assert len(q) == 4 and len(list(q)) == 4
    with pytest.raises(TypeError, match="0-d"):
        len(one)
    with pytest.raises(ValueError, match="ambiguous"):
        bool(q)


def test_hash_and_equality_do_not_raise(q):
    assert len({q, q}) == 1
    with eqq.on_materialize("ignore"):
        assert bool((q == q).all())


def test_unknown_operands_are_refused_in_the_usual_way(q):
    for op in (operator.add, operator.matmul, operator.lt):
        with pytest.raises(TypeError, match="unsupported operand|not supported"):
            op(q, "text")


def test_repr_says_what_it_is(q):
    assert repr(q).startswith("Array8B(float32[4,6], 13.33 bits/weight, ")
    assert "weight=int8[4,6]" in repr(q) and "scale=float32[4,1]" in repr(q)
    assert "Array8B" in repr(jtu.tree_map(lambda leaf: None, q))


def test_commute_ops_serves_the_reflected_operators(q, monkeypatch):
    monkeypatch.setattr(eqq.Array8B, "commute_ops", False)
    with pytest.raises(TypeError):
        2 * q
    assert isinstance(q * 2, eqq.Array8B)


# ----------------------------------------------------------------------------------- jaxtyping


def test_jaxtyping_outside_implicit(q):
    assert isinstance(q, Float[eqq.QuantizedArray, "out in"])
    assert isinstance(q, Float[eqq.Array8B, "4 6"])
    assert not isinstance(q, Float[eqq.QuantizedArray, "4 5"])
    assert not isinstance(q, Float[eqq.QuantizedArray, "out"])


def test_jaxtyping_inside_implicit(q):
    @jaxtyped(typechecker=beartype.beartype)
    def product(w: Float[Array, "out in"], x: Float[Array, " in"]) -> Float[Array, " out"]:
        return w @ x

    assert eqq.implicit(product)(q, jnp.ones(6)).shape == (4,)
    with pytest.raises(Exception, match="in"):
        eqq.implicit(product)(q, jnp.ones(5))


def test_jaxtyping_of_the_fields():
    with pytest.raises(Exception, match="weight"):
        eqq.Array8B(jnp.ones((3, 1)), jnp.ones((3, 4)))  # not int8


# ------------------------------------------------------------------------------- tree utilities


def test_it_is_a_pytree_with_named_leaves(q):
    paths = [jtu.keystr(path) for path, _ in jtu.tree_leaves_with_path(q)]
    assert paths == [".scale", ".weight"]
    assert eqx.tree_equal(q, jtu.tree_map(lambda leaf: leaf, q))
    assert hash(jtu.tree_structure(q)) == hash(jtu.tree_structure(q * 2))


def test_static_facts_survive_added_and_removed_axes(q):
    stacked = jtu.tree_map(lambda *leaves: jnp.stack(leaves), q, 2 * q, -q)
    assert stacked.shape == (3, 4, 6) and stacked.axis == (-1,)
    np.testing.assert_array_equal(stacked.materialize()[2], -q.materialize())
    assert jtu.tree_map(lambda leaf: leaf[1], stacked).shape == (4, 6)


def test_safe_materialize_and_safe_delete(q):
    dense, materialized = eqq.safe_materialize(q)
    assert materialized
    eqq.safe_delete(dense, materialized)
    assert dense.is_deleted()
    same, materialized = eqq.safe_materialize(x := jnp.ones(3))
    assert same is x and not materialized
    eqq.safe_delete(same, materialized)
    assert not x.is_deleted()


# ------------------------------------------------------------------ what must not happen silently


def average(a, b):
    return jax.tree.map(lambda a, b: (a + b) / 2, a, b)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_codes_that_were_averaged_are_refused(name):
    w = jax.random.normal(jax.random.key(0), (4, 64))
    mean = average(QUANTIZERS[name](w), QUANTIZERS[name](-w))
    for use in (
        lambda q: q.shape,
        lambda q: q.materialize(),
        lambda q: q @ jnp.ones(64),
        lambda q: q.T,
        lambda q: eqq.implicit(jnp.sum)(q),
        lambda q: jax.jit(lambda q: q.materialize())(q),
    ):
        with pytest.raises(
            TypeError, match=r"have dtype float32.*leaf by leaf.*is_leaf=eqquant\.is_implicit"
        ):
            use(mean)
    stopped = jax.tree.map(
        lambda a: a.materialize() if eqq.is_implicit(a) else a,
        QUANTIZERS[name](w),
        is_leaf=eqq.is_implicit,
    )  # the way that the message shows
    assert stopped.shape == w.shape
    assert repr(mean)  # debuggers show it


@pytest.mark.parametrize("save", [np.asarray, np.sin, lambda q: np.savez(io.BytesIO(), w=q)])
def test_numpy_makes_it_dense_in_daylight(save):
    q = eqq.Array8B.quantize(jnp.ones((4, 8)))
    with (
        eqq.strict(),
        pytest.raises(eqq.MaterializeError, match="A NumPy function, or one that saves"),
    ):
        save(q)
    with eqq.on_materialize("ignore"):
        save(q)


@pytest.mark.parametrize(
    ("name", "dtype"), in_turns(LAYOUTS, [jnp.bfloat16, jnp.float16, jnp.float32], each=2)
)
def test_programs_may_forbid_promotion(name, dtype):
    w = jax.random.normal(jax.random.key(0), (16, 64), dtype)
    with jax.numpy_dtype_promotion("strict"):
        q, x = LAYOUTS[name](w), jnp.ones((3, 64), dtype)
        for activations in (None, "int8"):
            y = eqq.implicit(lambda x, q: x @ q.T, activations=activations)(x, q)
            assert y.dtype == dtype
        back = eqq.implicit(lambda x, q: x[:, :16] @ q)
        jax.grad(lambda x: back(x, q).astype(jnp.float32).sum())(x)
        (
            q * jnp.asarray(2, dtype),
            q.sum(),
            q[1],
            q.astype(jnp.float32).materialize(),
            eqq.report(w, q),
        )


# --------------------------------------------------------------------- what a `jax.Array` has


METHODS = {
    "flatten": (), "copy": (), "take": (np.array([1, 0]), 0), "repeat": (2, 0), "diagonal": (),
    "trace": (), "compress": (np.array([True, False, True, False]), 0), "prod": (1,), "std": (),
    "var": (0,), "ptp": (1,), "argmax": (1,), "argmin": (), "all": (), "any": (0,), "cumsum": (1,),
    "cumprod": (0,), "sort": (), "argsort": (0,), "argpartition": (2,), "clip": (-0.5, 0.5),
    "round": (1,), "conj": (), "conjugate": (), "nonzero": (), "tolist": (), "item": (3,),
}  # fmt: skip
LEFT_OUT = {
    "bits of the dense array, which is nowhere": "view byteswap",
    "of arrays of integers": "choose",
    "an iterator over the dense array; `flatten` gives an array": "flat",
    "as the shards of each stored leaf": "addressable_data addressable_shards global_shards",
    "as `sharding` says": "device committed is_fully_addressable is_fully_replicated to_device",
    "its functions would make it dense": "__array_namespace__",
    "as every pytree is copied": "__copy__ __deepcopy__",
    "raises, as it should": "__setitem__",
    "a field": "dtype",
    "private": "__numpy_dtype__ _multi_slice _split",
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_arrays(name, q, dense):
    with eqq.on_materialize("ignore"):
        got = getattr(q, name)(*METHODS[name])
    want = getattr(dense, name)(*METHODS[name])
    for x, y in zip(jtu.tree_leaves(eqq.materialize(got)), jtu.tree_leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        assert np.asarray(x).dtype == np.asarray(y).dtype


def test_methods_stay_packed_where_they_can(q, dense):
    with eqq.strict():
        assert all(isinstance(x, eqq.Array8B) for x in (q.copy(), q.flatten(), q.real))
        np.testing.assert_array_equal(q.take(jnp.array([2, 0]), axis=0), dense[jnp.array([2, 0])])
    with eqq.on_materialize("ignore"):
        np.testing.assert_array_equal(q.clip(-q, max=jnp.ones(6)), dense.clip(-dense, 1))
        np.testing.assert_array_equal(q.imag, 0)
        assert float(dense[1, 2]) in q and 100.0 not in q
        flags = eqq.Array8B.quantize(jnp.ones((2, 2))).astype(int)
        np.testing.assert_array_equal(flags ^ 3, 2)
        with pytest.raises(TypeError, match="does not accept dtype float32"):
            q & q
    assert q.block_until_ready() is not None and q.copy_to_host_async() is None
    assert q.devices() == dense.devices() and q.itemsize == 4 and not q.is_deleted()
    other = jax.tree.map(jnp.copy, q)
    other.delete()
    assert other.is_deleted()


def test_what_an_array_has_and_this_has_not_is_left_out_on_purpose():
    missing = set(dir(jax.Array)) - set(dir(eqq.Array8B))
    assert missing - set(" ".join(LEFT_OUT.values()).split()) == set()
