"""The products behind `dot_general`, against float64 and against each other."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import jaxtyping
import numpy as np
import pytest
from helpers import examples, STRATEGIES
from jax import lax

import eqquant as eqq
from eqquant.kernels import quantized_dot_general
from eqquant.kernels.matmul import product as records, reference, xla
from eqquant.kernels.matmul.axes import Axes
from eqquant.kernels.matmul.cpu import choice, tiled
from eqquant.testing import DTYPES, generator


pytestmark = pytest.mark.usefixtures("fully_optimized")


each_format = pytest.mark.parametrize("format", STRATEGIES)


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    """Tiny operands go the way of large ones: in pieces."""
    monkeypatch.setattr(tiled, "SMALL_BYTES", 0)


def name_of(module: Any) -> str:
    return module.__name__.rpartition(".")[2]


# --------------------------------------------------------------------------- drawing a product


class Product(NamedTuple):
    """Operands of a `dot_general`."""

    x: jax.Array
    w: Any
    numbers: Any

    def dense(self, x: Any = None, w: Any = None, **options: Any) -> Any:
        x, w = self.x if x is None else x, self.w if w is None else w
        return lax.dot_general(x, w.materialize().astype(x.dtype), self.numbers, **options)

    def quantized(self, x: Any = None, w: Any = None, **options: Any) -> Any:
        x, w = self.x if x is None else x, self.w if w is None else w
        return quantized_dot_general(x, w, self.numbers, **options)

    def by(self, implementation: Any, **options: Any) -> Any:
        product = records.Product(self.x, self.w, Axes.of(self.numbers), **options)
        return implementation.compute(product, records.Target())

    @property
    def terms(self) -> int:
        return int(np.prod([self.x.shape[axis] for axis in self.numbers[0][0]], dtype=int))

    def in_float64(self, x: Any = None, w: Any = None) -> np.ndarray:
        """The product by NumPy."""
        x = np.asarray(self.x if x is None else x, np.float64)
        w = np.asarray(self.w.materialize() if w is None else w, np.float64)
        (xc, wc), (xb, wb) = self.numbers
        of_x, of_w = list(range(x.ndim)), list(range(100, 100 + w.ndim))
        for axis, other in zip((*xc, *xb), (*wc, *wb), strict=True):
            of_w[other] = of_x[axis]
        summed = {of_x[axis] for axis in xc}
        batch = [of_x[axis] for axis in xb]
        free = [i for i in (*of_x, *of_w) if i not in summed and i not in batch]
        letters = {i: chr(ord("a") + n) for n, i in enumerate(dict.fromkeys((*of_x, *of_w)))}
        word = lambda ids: "".join(letters[i] for i in ids)  # noqa: E731
        return np.einsum(f"{word(of_x)},{word(of_w)}->{word([*batch, *free])}", x, w)

    def bound(self, *dtypes: Any) -> np.ndarray:
        """Each of the summed terms may be rounded: terms x epsilon x sum of magnitudes.

        The kernels need not round the weight to its dtype, so its epsilon counts as well.
        """
        eps = sum(float(jnp.finfo(dtype).eps) for dtype in (self.w.dtype, *dtypes))
        eps += (self.terms + 4) * float(jnp.finfo(jnp.float32).eps)
        return eps * self.magnitudes + 1e-30

    @property
    def magnitudes(self) -> np.ndarray:
        """What all terms sum up to without their signs."""
        x, w = (np.abs(np.asarray(a, np.float64)) for a in (self.x, self.w.materialize()))
        return self.in_float64(x, w)

    def check(self, y: Any) -> None:
        want = self.in_float64()
        assert y.shape == want.shape
        fits = self.magnitudes < float(jnp.finfo(y.dtype).max)  # nothing overflows on the way
        assert (np.abs(np.asarray(y, np.float64) - want) <= self.bound(y.dtype))[fits].all()


LENGTHS = [1, 2, 3, 5]


@st.composite
def products(
    draw: Any,
    format: str,
    lengths: Any = tuple(LENGTHS),
    dtypes: Any = tuple(DTYPES),
    batch: int = 2,
    contract: Any = (1, 2),
    free: int = 2,
) -> Product:
    def some(low: int, high: int) -> list[int]:
        return draw(st.lists(st.sampled_from(lengths), min_size=low, max_size=high))

    groups = [some(0, batch), some(*contract), some(0, free), some(0, free)]
    n_batch = len(groups[0])
    shared = groups[0] + groups[1]
    x_lengths, w_lengths = shared + groups[2], shared + groups[3]
    x_order = draw(st.permutations(range(len(x_lengths))))
    w_order = draw(st.permutations(range(len(w_lengths))))
    x_axis = [x_order.index(i) for i in range(len(shared))]
    w_axis = [w_order.index(i) for i in range(len(shared))]
    numbers = (
        (tuple(x_axis[n_batch:]), tuple(w_axis[n_batch:])),
        (tuple(x_axis[:n_batch]), tuple(w_axis[:n_batch])),
    )
    dtype = draw(st.sampled_from(dtypes))
    w = draw(STRATEGIES[format](tuple(w_lengths[i] for i in w_order), dtype))
    x = generator(draw).normal(size=tuple(x_lengths[i] for i in x_order))
    return Product(jnp.asarray(x, dtype), w, numbers)


# --------------------------------------------------------------------------------------- values


@each_format
@pytest.mark.parametrize("implementation", [reference, xla, tiled], ids=name_of)
def test_every_implementation_is_the_product(implementation, format):
    @hypothesis.given(st.data())
    @examples(1.0)
    def holds(data: st.DataObject) -> None:
        product = data.draw(products(format))
        hypothesis.assume(product.w.offset_leaf is None)  # offsets are none of its business
        product.check(product.by(implementation))

    holds()


@each_format
@pytest.mark.parametrize("digits", [False, True], ids=["floats", "digits"])
def test_quantized_dot_general_is_lax_dot_general(format, digits, monkeypatch):
    if digits:
        monkeypatch.setattr(choice, "MIN_SIZE_OF_DIGITS", 0)
        monkeypatch.setattr(choice, "MIN_SIZE_OF_DIGITS_IF_PACKED", 0)

    @hypothesis.given(st.data())
    @examples(1.0)
    def holds(data: st.DataObject) -> None:
        product = data.draw(products(format))
        options = {
            "precision": data.draw(
                st.sampled_from([None, lax.Precision.HIGHEST, ("high", "default")])
            ),
            "preferred_element_type": data.draw(
                st.sampled_from([None, jnp.float32, product.x.dtype])
            ),
        }
        transform = data.draw(st.sampled_from([lambda f: f, jax.jit]))
        y = transform(partial(product.quantized, **options))()
        dense = jax.eval_shape(partial(product.dense, **options))
        assert (y.shape, y.dtype) == (dense.shape, dense.dtype)
        product.check(y)

    holds()


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("w_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtype_of_the_result(x_dtype, w_dtype):
    w = eqq.Array8B.quantize(jnp.ones((3, 4)), dtype=w_dtype)
    x = jnp.ones((2, 4), x_dtype)
    contract = (((1,), (1,)), ((), ()))
    want = lax.dot_general(x, w.materialize(), contract).dtype
    assert quantized_dot_general(x, w, contract).dtype == want
    with eqq.strict():
        assert eqq.implicit(lambda w, x: x @ w.T)(w, x).dtype == (x @ w.materialize().T).dtype
        assert eqq.implicit(lambda w, x: w @ x.T)(w, x).dtype == (x @ w.materialize().T).dtype


def test_precision_reaches_the_dot():
    product = Product(
        jnp.ones((2, 4)), eqq.Array8B.quantize(jnp.ones((3, 4))), (((1,), (1,)), ((), ()))
    )

    def program(precision: Any) -> str:
        f = partial(product.quantized, precision=precision, implementation="xla")
        return jax.jit(f).lower().as_text()

    assert "HIGHEST" in program(lax.Precision.HIGHEST)
    assert "HIGHEST" not in program(None)
    with jax.default_matmul_precision("highest"):
        w, x = product.w, product.x
        lowered = jax.jit(eqq.implicit(lambda w, x: x @ w.T, implementation="xla")).lower(w, x)
        assert "HIGHEST" in lowered.as_text()


def test_preferred_element_type_is_accumulated_in():
    # 4096 ones and a large term: a sum in float16 or bfloat16 would lose them.
    w = eqq.Array8B.quantize(jnp.full((1, 4096), 1.0), dtype=jnp.bfloat16)
    x = jnp.ones((2, 4096), jnp.bfloat16)
    contract = (((1,), (1,)), ((), ()))
    y = quantized_dot_general(x, w, contract, preferred_element_type=jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, 4096.0, rtol=1e-6)


@pytest.mark.parametrize("implementation", [xla, tiled], ids=name_of)
def test_float64(implementation):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        w = eqq.Array8B.quantize(jnp.asarray(rng.normal(size=(5, 7))), axis=0)
        assert w.dtype == jnp.float64
        product = Product(jnp.asarray(rng.normal(size=(3, 7))), w, (((1,), (1,)), ((), ())))
        y = product.by(implementation, accumulate=jnp.float64)
        assert y.dtype == product.quantized().dtype == jnp.float64
        bound = (
            11 * np.finfo(np.float64).eps * product.in_float64(abs(product.x), abs(w.materialize()))
        )
        assert (np.abs(y - product.in_float64()) <= bound).all()
        assert (np.abs(product.quantized() - product.in_float64()) <= bound).all()


@each_format
def test_empty_axes_and_axes_of_length_one(format):
    @hypothesis.given(st.data())
    @examples(1.0)
    def holds(data: st.DataObject) -> None:
        product = data.draw(products(format, lengths=(0, 1, 2), dtypes=(jnp.float32,), batch=1))
        product.check(product.quantized())
        y, pull_back = jax.vjp(product.quantized, product.x)
        assert pull_back(y)[0].shape == product.x.shape

    holds()


# --------------------------------------------------------------------------------------- pieces

TILINGS = {
    "free first": ((11, 6), "mk,nk->mn", (2, 6)),
    "contracted first": ((11, 6), "mk,kn->mn", (2, 11)),
    "contracted first, many rows": ((11, 40), "mk,kn->mn", (9, 11)),
    "batch first": ((5, 4, 6), "bmk,bnk->bmn", (5, 2, 6)),
    "batch last": ((11, 6, 2), "mbk,nkb->bmn", (2, 2, 6)),
    "two contracted": ((3, 7, 4), "mhk,hkn->mn", (2, 3, 7)),
    "nothing else": ((11,), "mk,k->m", (2, 11)),
    "outer product": ((11, 3), "m,nk->mnk", (2,)),
}
SCALES = {
    "rows": lambda n: [*([1] * (n - 1)), None],
    "columns": lambda n: [None, *([1] * (n - 1))],
    "blocks of the first axis": lambda n: ["block", *([1] * (n - 1))],
    "blocks of every axis": lambda n: ["block"] * n,
}


# The scales take turns.
@pytest.mark.parametrize(
    ("name", "scale", "tiles"),
    [(name, [*SCALES][(i + j) % 4], 4) for i, name in enumerate(TILINGS) for j in (0, 2)]
    + [(name, "blocks of every axis", 1000) for name in TILINGS],
)
def test_pieces_that_do_not_divide(monkeypatch, name, scale, tiles):
    monkeypatch.setattr(tiled, "TILES", tiles)
    shape, equation, x_shape = TILINGS[name]
    rng = np.random.default_rng(len(name))
    stored = [
        -(-length // 4) if what == "block" else what or length
        for what, length in zip(SCALES[scale](len(shape)), shape, strict=True)
    ]
    w = eqq.Array8B(
        jnp.asarray(rng.uniform(0.5, 2, stored), jnp.float32),
        jnp.asarray(rng.integers(-127, 128, shape), jnp.int8),
        block_size=4,
    )
    x = jnp.asarray(rng.normal(size=x_shape), jnp.float32)

    def f(w: Any, x: Any) -> Any:
        return jnp.einsum(equation, x, w)

    def both_passes(w: Any, x: Any, ct: Any) -> Any:
        y, pull_back = jax.vjp(partial(eqq.implicit(f, implementation="tiled"), w), x)
        return y, pull_back(ct)[0]

    dense, ct = w.materialize(), jnp.ones(f(w.materialize(), x).shape)
    with eqq.strict():
        lowered = jax.jit(both_passes).lower(w, x, ct)
    assert lowered.as_text().count("stablehlo.while") >= 2
    (y, gradient), (want, dense_gradient) = lowered.compile()(w, x, ct), both_passes(dense, x, ct)
    magnitude, gradient_magnitude = both_passes(abs(dense), abs(x), ct)
    eps = max(w.size, x.size) * np.finfo(np.float32).eps
    assert (np.abs(y - want) <= eps * magnitude).all()
    assert (np.abs(gradient - dense_gradient) <= eps * gradient_magnitude).all()


# ------------------------------------------------------------------------------ transformations


def close(got: Any, want: Any, terms: int, magnitude: Any) -> bool:
    """Within terms x epsilon x sum of magnitudes."""
    got, want, magnitude = (np.asarray(a, np.float64) for a in (got, want, magnitude))
    assert got.shape == want.shape
    return bool(
        (
            np.abs(got - want)
            <= terms * np.finfo(np.float32).eps * magnitude.max(initial=0) + 1e-30
        ).all()
    )


def with_scale(w: eqq.Array8B, scale: Any) -> eqq.Array8B:
    return eqx.tree_at(lambda w: w.scale, w, scale)


def of_both(product: Product) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The product as a function of `x` and the scale, quantized and dense."""
    return (
        lambda x, scale: product.quantized(x, with_scale(product.w, scale)),
        lambda x, scale: product.dense(x, with_scale(product.w, scale)),
    )


SMALL = {"lengths": (1, 2, 3), "dtypes": (jnp.float32,), "batch": 1, "free": 1}


def test_derivatives_in_x_and_scale():
    @hypothesis.given(st.data())
    @examples(0.4)
    def holds(data: st.DataObject) -> None:
        product = data.draw(products("Array8B", **SMALL))
        rng = generator(data.draw)
        at = (product.x, product.w.scale)
        towards = tuple(jnp.asarray(rng.normal(size=a.shape), jnp.float32) for a in at)
        ct = jnp.asarray(rng.normal(size=jax.eval_shape(product.quantized).shape), jnp.float32)

        def derivatives(f: Callable[..., Any]) -> Any:
            y, y_dot = jax.jvp(f, at, towards)
            return y, y_dot, *jax.vjp(f, *at)[1](ct)

        quantized, dense = of_both(product)
        found, want = (
            jax.jit(lambda: derivatives(quantized))(),
            jax.jit(lambda: derivatives(dense))(),
        )
        # Every term is a product of one number of each kind.
        x_max, x_dot_max, ct_max = (float(abs(a).max()) for a in (product.x, towards[0], ct))
        s_max, s_dot_max = (127 * float(abs(a).max()) for a in (at[1], towards[1]))
        each = (
            x_max * s_max,
            x_dot_max * s_max + x_max * s_dot_max,
            ct_max * s_max,
            ct_max * 127 * x_max,
        )
        n = product.x.size * product.w.size  # at least as many terms as any of the sums
        for got, expected, term in zip(found, want, each, strict=True):
            assert close(got, expected, n, n * term)

    holds()


@pytest.mark.parametrize(
    ("jacobian", "layout"),
    [
        (jax.jacrev, {"axis": -1}),
        (jax.jacfwd, {"axis": 0}),
        (jax.jacrev, {"axis": -1, "block_size": 2}),
        (jax.jacfwd, {"axis": -1, "block_size": 2}),
        (jax.jacfwd, {"axis": ()}),
    ],
)
def test_jacobian_of_the_scale(jacobian, layout):
    rng = np.random.default_rng(1)
    w = eqq.Array8B.quantize(jnp.asarray(rng.normal(size=(3, 5)), jnp.float32), **layout)
    product = Product(
        jnp.asarray(rng.normal(size=(2, 5)), jnp.float32), w, (((1,), (1,)), ((), ()))
    )
    quantized, dense = of_both(product)
    for argnum in (0, 1):
        found = jax.jit(jacobian(quantized, argnum))(product.x, w.scale)
        want = jacobian(dense, argnum)(product.x, w.scale)
        assert close(found, want, 5, np.abs(want).max() * 5)
        assert np.abs(want).max() > 0


def test_linear_transposes_and_second_derivatives():
    rng = np.random.default_rng(2)
    w = eqq.Array8B.quantize(jnp.asarray(rng.normal(size=(3, 5)), jnp.float32), block_size=2)
    product = Product(
        jnp.asarray(rng.normal(size=(2, 5)), jnp.float32), w, (((1,), (1,)), ((), ()))
    )
    quantized, dense = of_both(product)
    ct = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    in_x = [
        jax.linear_transpose(lambda x, f=f: f(x, w.scale), product.x)(ct)[0]
        for f in (quantized, dense)
    ]
    assert close(*in_x, 5, np.abs(in_x[1]).max())
    in_scale = [
        jax.linear_transpose(lambda s, f=f: f(product.x, s), w.scale)(ct)[0]
        for f in (quantized, dense)
    ]
    assert close(*in_scale, 20, 127 * np.abs(product.x).sum())
    hessians = [
        jax.hessian(lambda x, f=f: jnp.sum(jnp.sin(f(x, w.scale))))(product.x)
        for f in (quantized, dense)
    ]
    assert close(*hessians, 30, np.abs(hessians[1]).max())


def test_backward_pass_of_half_precision_keeps_the_dtype_of_x():
    w = eqq.Array8B.quantize(jnp.ones((3, 4)), dtype=jnp.bfloat16)
    x = jnp.ones((2, 4), jnp.bfloat16)

    def f(x: Any) -> Any:
        return quantized_dot_general(
            x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )

    y, pull_back = jax.vjp(f, x)
    assert (y.dtype, pull_back(y)[0].dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(pull_back(y)[0], np.float32), 12.0, rtol=0.01)


@pytest.mark.parametrize("over", ["x", "w", "both"])
def test_vmap(over):
    """Over any axis. (Of the other formats only axes before the packed one: the laws do that.)"""

    @hypothesis.given(st.data())
    @examples(0.5)
    def holds(data: st.DataObject) -> None:
        product = data.draw(products("Array8B", **SMALL))
        x_axis = w_axis = None
        x, w = product.x, product.w
        examples = [product, product, product]
        if over in ("x", "both"):
            x_axis = data.draw(st.integers(0, x.ndim))
            x = jnp.stack([x, -x, 2 * x], x_axis)
            examples = [p._replace(x=k * p.x) for p, k in zip(examples, (1, -1, 2), strict=True)]
        if over in ("w", "both"):
            w_axis = data.draw(st.integers(0, w.ndim))
            others = [w, *(data.draw(st.just(reversed_codes(w, axis))) for axis in (0, -1))]
            w = jtu.tree_map(lambda *leaves: jnp.stack(leaves, w_axis), *others)
            examples = [p._replace(w=other) for p, other in zip(examples, others, strict=True)]
        out_axis = data.draw(st.integers(0, len(jax.eval_shape(product.quantized).shape)))
        mapped = jax.vmap(
            partial(quantized_dot_general, dimension_numbers=product.numbers),
            (x_axis, w_axis),
            out_axis,
        )
        y = jnp.moveaxis(mapped(x, w), out_axis, 0)
        for example, found in zip(examples, y, strict=True):
            example.check(found)

    holds()


def reversed_codes(w: Any, axis: int) -> Any:
    """Another array of the same leaves, some of them read backwards."""
    return jtu.tree_map(lambda leaf: jnp.flip(leaf, axis), w)


def test_vmap_within_vmap_and_grad():
    rng = np.random.default_rng(3)
    w = eqq.Array8B.quantize(jnp.asarray(rng.normal(size=(4, 3, 5)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.float32)

    def loss(f: Callable[..., Any]) -> Callable[..., Any]:
        over_layers = jax.vmap(f, in_axes=(0, 0))
        return lambda w, x: jnp.sum(jax.vmap(over_layers, in_axes=(None, 0))(w, x) ** 2)

    def one(w: Any, x: Any) -> Any:
        return quantized_dot_general(x, w, (((0,), (1,)), ((), ())))

    found = jax.jit(jax.grad(loss(one), 1))(w, x)
    want = jax.grad(loss(lambda w, x: w @ x), 1)(w.materialize(), x)
    assert close(found, want, 60, np.abs(want).max())


# --------------------------------------------------------------------------------------- export

PLATFORMS = [("cpu",), ("cuda",), ("tpu",), ("rocm",), ("cpu", "cuda", "tpu")]


@pytest.mark.parametrize("platforms", PLATFORMS, ids="-".join)
@pytest.mark.parametrize("layout", [{"axis": -1}, {"axis": 0}, {"axis": 0, "block_size": 4}])
def test_export(platforms, layout):
    rng = np.random.default_rng(4)
    w = eqq.Array8B.quantize(jnp.asarray(rng.normal(size=(6, 8)), jnp.float32), **layout)
    x = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    leaves, treedef = jtu.tree_flatten(w)

    def f(x: Any, *leaves: Any) -> Any:
        return eqq.implicit(lambda w, x: x @ w.T)(jtu.tree_unflatten(treedef, leaves), x)

    exported = jax.export.export(jax.jit(f), platforms=platforms)(x, *leaves)
    assert exported.platforms == platforms
    # Pieces on CPU alone: elsewhere one dot, which XLA fuses the decoding into.
    assert ("stablehlo.while" in exported.mlir_module()) == ("cpu" in platforms)
    if "cpu" in platforms:
        want = x @ w.materialize().T
        assert close(exported.call(x, *leaves), want, 8, np.abs(want).max() + 8)


def test_export_of_the_gradient():
    w = eqq.Array8B.quantize(jnp.ones((6, 8)))
    gradient = jax.grad(lambda x, w: jnp.sum(eqq.implicit(lambda w, x: x @ w.T)(w, x) ** 2))
    leaves, treedef = jtu.tree_flatten(w)
    exported = jax.export.export(
        jax.jit(lambda x, *leaves: gradient(x, jtu.tree_unflatten(treedef, leaves))),
        platforms=("cpu", "cuda", "tpu"),
    )(jnp.ones((2, 8)), *leaves)
    np.testing.assert_allclose(exported.call(jnp.ones((2, 8)), *leaves), 96.0, rtol=1e-5)


# ------------------------------------------------------------------ matmul_bf16_int8_weight_only

K, N = 12, 8


@pytest.mark.parametrize(
    ("lead", "dtype"),
    [((2,), jnp.bfloat16), ((3, 2), jnp.float32), ((1, 3, 2), jnp.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize(
    "scale_shape", [*itertools.product((1, K, K // 2), (1, N, N // 2))], ids=str
)
def test_matmul_bf16_int8_weight_only(scale_shape, lead, dtype):
    rng = np.random.default_rng(9)
    x = jnp.asarray(rng.normal(size=(*lead, K)), dtype)
    codes = jnp.asarray(rng.integers(-127, 128, (K, N)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.01, 0.1, scale_shape), jnp.float32)
    y = eqq.matmul_bf16_int8_weight_only(x, codes, scale)
    assert (y.shape, y.dtype) == ((*lead, N), dtype)
    spread = np.repeat(np.repeat(scale, K // scale_shape[0], 0), N // scale_shape[1], 1)
    w = np.asarray(codes, np.float64) * spread
    want, magnitude = np.asarray(x, np.float64) @ w, np.abs(np.asarray(x, np.float64)) @ np.abs(w)
    bound = K * np.finfo(np.float32).eps * magnitude + float(jnp.finfo(dtype).eps) * np.abs(want)
    assert (np.abs(np.asarray(y, np.float64) - want) <= bound).all()


def test_matmul_bf16_int8_weight_only_is_differentiable_and_jits():
    codes, scale = jnp.ones((K, N), jnp.int8), jnp.full((1, N), 0.5)
    x = jnp.ones((2, K), jnp.bfloat16)
    gradient = jax.jit(
        jax.grad(
            lambda x: eqq.matmul_bf16_int8_weight_only(x, codes, scale).sum().astype(jnp.float32)
        )
    )(x)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), N * 0.5)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, K), (K, N), (5, N)), r"rhs_scale \(5, 8\) must divide rhs_q_int8 \(12, 8\)"),
        (((2, K), (K, N), (K // 2, N // 4)), r"blocks of different sizes \[2, 4\]"),
    ],
    ids=["does not divide", "two block sizes"],
)
def test_matmul_bf16_int8_weight_only_refuses(shapes, message):
    x, codes, scale = shapes
    with pytest.raises(ValueError, match=message):
        eqq.matmul_bf16_int8_weight_only(
            jnp.ones(x, jnp.bfloat16), jnp.ones(codes, jnp.int8), jnp.ones(scale)
        )


def test_matmul_bf16_int8_weight_only_refuses_lengths_that_differ():
    # Without the type checks of the test suite: a ValueError of its own words.
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="lhs_bf16"):
        eqq.matmul_bf16_int8_weight_only(
            jnp.ones((2, K + 1), jnp.bfloat16), jnp.ones((K, N), jnp.int8), jnp.ones((1, N))
        )
