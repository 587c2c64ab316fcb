"""Formats of somebody else's, written as extending.md says, pass the whole suite of laws."""

from typing import Any, ClassVar

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import in_turns
from jax import lax
from jaxtyping import Array, Float, UInt8

import eqquant as eqq
from eqquant import testing
from eqquant.coding import Coding
from eqquant.tiles import combine, Packing, Tile


class ArraySmallFloat(eqq.AbstractScaledArray):
    r"""Stores $x \approx s \cdot \pm 2^{-e}$: a sign and one of eight exponents, two numbers in a byte."""

    codes: UInt8[Array, "..."]
    scale: Float[Array, "..."]
    packing: Packing | None = eqx.field(static=True)
    block_size: int | None = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)
    casts: tuple[np.dtype, ...] = eqx.field(static=True, default=())

    payload: ClassVar[str] = "codes"
    coding: ClassVar[Coding] = Coding(
        bits=4, levels=tuple(sign * 2.0**-e for sign in (1, -1) for e in range(8)), first="high"
    )

    @classmethod
    def quantize(cls, array: Any) -> "ArraySmallFloat":
        array = jnp.asarray(array)
        scale = jnp.max(jnp.abs(array), axis=-1, keepdims=True).astype(jnp.float32)
        packing = Packing(-1, array.shape[-1], Tile(2))
        empty = jnp.zeros((*array.shape[:-1], packing.stored), jnp.uint8)
        return cls(empty, scale, packing, None, array.dtype).encode(array)


class ArrayInt5(eqq.AbstractScaledArray):
    r"""Stores $x \approx d_B s_b q - n_B m_b$: 5-bit $q$ in two parts, and two levels of scales and of offsets."""

    low: UInt8[Array, "..."]
    high: UInt8[Array, "..."]
    scale: eqq.CodedScale  # s: small integers, as k-quants have them
    coarse: Float[Array, "..."]  # d
    minimum: Float[Array, "..."]  # m
    packing: Packing | None = eqx.field(static=True)
    dtype: np.dtype = eqx.field(static=True)
    block_size: int | tuple[int, ...] | None = eqx.field(static=True)
    coarse_block_size: int | tuple[int, ...] | None = eqx.field(static=True)
    casts: tuple[np.dtype, ...] = eqx.field(static=True, default=())

    payload: ClassVar[str] = "low"
    high_payload: ClassVar[str] = "high"
    coding: ClassVar[Coding] = Coding(bits=5, high_bits=1)
    factors: ClassVar[tuple[str, ...]] = ("coarse", "scale")
    summands: ClassVar[tuple[str, ...]] = ("minimum",)

    @property
    def offset_leaf(self) -> Any:
        return combine(lambda d, m: -d * m, self.number_leaf("coarse"), self.number_leaf("minimum"))

    multiplied: ClassVar[tuple[str, ...]] = ("coarse",)  # the offset has it as a factor, too


@st.composite
def small_floats(draw: Any, shape: Any, dtype: Any = jnp.float32) -> ArraySmallFloat:
    packing = testing.packings(draw, shape, 2, draw(st.sampled_from([1, 2])))
    codes = testing.payloads(draw, shape, packing, jnp.uint8)
    block_size = draw(st.sampled_from([None, 2]))
    scale = testing.scales(draw, shape, block_size)
    return ArraySmallFloat(codes, scale, packing, block_size, jnp.dtype(dtype))


@st.composite
def int5_arrays(draw: Any, shape: Any, dtype: Any = jnp.float32) -> ArrayInt5:
    packing = testing.packings(draw, shape, 2, 4)
    low = testing.payloads(draw, shape, packing, jnp.uint8)
    high = testing.payloads(draw, shape, packing.of_high_bits(4, 1), jnp.uint8)
    small = jnp.abs(testing.scales(draw, shape, 2))
    scale = eqq.CodedScale(jnp.round(small).astype(jnp.uint8), Coding(bits=6))
    coarse, minimum = testing.scales(draw, shape, 4), testing.scales(draw, shape, 2)
    return ArrayInt5(low, high, scale, coarse, minimum, packing, jnp.dtype(dtype), 2, 4)


TRANSFORMED = [mode for mode in testing.MODES if mode != "eager"]


@pytest.mark.parametrize(("law", "mode"), in_turns(testing.LAWS, TRANSFORMED, each=1))
def test_every_law_holds(law: str, mode: testing.Mode) -> None:
    max_examples = -(-hypothesis.settings().max_examples // 5)
    testing.check_law(law, small_floats, "eager", max_examples=max_examples)
    testing.check_law(law, int5_arrays, "eager", max_examples=max_examples)
    testing.check_law(law, int5_arrays, mode, max_examples=max_examples)


def test_it_is_used_as_any_other() -> None:
    model = eqx.nn.MLP(16, 4, 32, 2, key=jax.random.key(0))
    packed = eqq.quantize(model, ArraySmallFloat.quantize)
    assert "ArraySmallFloat" in str(eqq.report(model, packed))
    x = jnp.linspace(-1, 1, 16)
    with eqq.strict():
        y = eqx.filter_jit(eqq.implicit(packed))(x)
    np.testing.assert_allclose(y, eqq.materialize(packed)(x), rtol=1e-5, atol=1e-5)


def test_it_meets_the_formats_of_the_library() -> None:
    w = jax.random.normal(jax.random.key(0), (4, 16))
    ours, theirs = ArraySmallFloat.quantize(w), eqq.ArrayNF4.quantize(w)
    with eqq.on_materialize("ignore"):
        for a, b in ((ours, theirs), (theirs, ours)):
            got = eqq.implicit(lambda a, b: (a + b, a @ b.T, jnp.concatenate([a, b])))(a, b)
            a, b = a.materialize(), b.materialize()
            for g, w in zip(got, (a + b, a @ b.T, jnp.concatenate([a, b])), strict=True):
                np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_a_rule_for_it_wins_over_the_rule_of_the_family() -> None:
    used = []

    @eqq.register(lax.neg_p)
    def neg_small_float(primitive: Any, x: ArraySmallFloat, **params: Any) -> ArraySmallFloat:
        used.append(primitive)
        return x.replace(codes=x.codes ^ 0x88)  # the two bits of the signs

    q = ArraySmallFloat.quantize(jnp.asarray([[1.0, -2.0, 4.0]]))
    np.testing.assert_array_equal((-q).materialize(), -q.materialize())
    assert used
