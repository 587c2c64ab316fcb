"""Every layer of `eqx.nn` that holds a matrix, under every transformation of JAX.

The law is the same for all: the program agrees with itself on the materialized model, and under
`eqq.strict()`, so that a weight made dense on the way is an error.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import in_turns, NIGHTLY

import eqquant as eqq
from eqquant.testing import LAYOUTS


nn = eqx.nn


@dataclass(frozen=True)
class Layer:
    """How to make a layer, the shapes of its inputs, and how to call it."""

    make: Callable[[jax.Array], Any]
    inputs: tuple[Any, ...]
    call: Callable[..., Any] = lambda layer, *xs: layer(*xs)
    pattern: str = "*weight*"
    """Which matrices are quantized."""
    dense: frozenset[str] = frozenset()
    """Primitives that need every element of the weight: arithmetic, not a product."""
    dense_in: frozenset[str] = frozenset()
    """Transformations that add such arithmetic."""
    operators: bool = False
    """Whether the layer uses its weights through Python operators alone."""


def _spectral_norm(key: jax.Array) -> Any:
    return nn.make_with_state(nn.SpectralNorm)(nn.Linear(6, 4, key=key), "weight", key=key)


def _call_spectral_norm(layer_and_state: Any, x: jax.Array) -> jax.Array:
    layer, state = jtu.tree_map(lambda leaf: leaf, layer_and_state)  # a state serves once
    return layer(x, state)[0]


def _rotated_attention(key: jax.Array) -> Any:
    return nn.MultiheadAttention(2, 8, key=key), nn.RotaryPositionalEmbedding(4)


def _call_rotated(layers: Any, x: jax.Array) -> jax.Array:
    attention, rotate = layers
    causal = jnp.tril(jnp.ones((len(x), len(x)), bool))
    turn = jax.vmap(rotate, in_axes=1, out_axes=1)
    return attention(x, x, x, mask=causal, process_heads=lambda q, k, v: (turn(q), turn(k), v))


class Tied(eqx.Module):
    """A language model whose output weights are those of its embedding."""

    shared: nn.Shared

    def __init__(self, key: jax.Array):
        parts = nn.Embedding(6, 4, key=key), nn.Linear(4, 6, use_bias=False, key=key)
        self.shared = nn.Shared(parts, lambda p: p[1].weight, lambda p: p[0].weight)

    def __call__(self, token: jax.Array) -> jax.Array:
        embedding, linear = self.shared()
        return linear(jnp.tanh(embedding(token)))


def _sequential(key: jax.Array) -> nn.Sequential:
    a, b = jr.split(key)
    layers = nn.Linear(6, 5, key=a), nn.RMSNorm(5), nn.Lambda(jax.nn.gelu), nn.Linear(5, 3, key=b)
    return nn.Sequential(layers)


TOKEN = "token"
ELEMENTWISE = frozenset({"mul"})

# One row or more for each class; a name may go on after a hyphen.
LAYERS = {
    "Linear": Layer(lambda k: nn.Linear(6, 4, key=k), ((6,),), operators=True),
    "Linear-from scalar": Layer(
        lambda k: nn.Linear("scalar", 4, key=k), ((),), pattern="weight", operators=True
    ),
    "Linear-to scalar": Layer(
        lambda k: nn.Linear(6, "scalar", key=k), ((6,),), pattern="weight", operators=True
    ),
    "MLP": Layer(lambda k: nn.MLP(6, 4, 5, 2, jax.nn.silu, key=k), ((6,),), operators=True),
    "Conv": Layer(lambda k: nn.Conv(1, 2, 4, 3, key=k), ((2, 6),)),
    "Conv1d": Layer(lambda k: nn.Conv1d(4, 6, 3, groups=2, key=k), ((4, 6),)),
    "Conv2d": Layer(lambda k: nn.Conv2d(2, 4, 3, 2, 1, key=k), ((2, 5, 5),)),
    "Conv3d": Layer(lambda k: nn.Conv3d(2, 3, 2, dilation=2, key=k), ((2, 3, 3, 3),)),
    "ConvTranspose": Layer(lambda k: nn.ConvTranspose(1, 2, 4, 3, key=k), ((2, 6),)),
    "ConvTranspose1d": Layer(lambda k: nn.ConvTranspose1d(4, 6, 3, groups=2, key=k), ((4, 6),)),
    "ConvTranspose2d": Layer(lambda k: nn.ConvTranspose2d(2, 3, 3, 2, key=k), ((2, 3, 3),)),
    "ConvTranspose3d": Layer(lambda k: nn.ConvTranspose3d(2, 3, 2, key=k), ((2, 3, 3, 3),)),
    "MultiheadAttention": Layer(
        lambda k: nn.MultiheadAttention(2, 6, 5, 4, use_query_bias=True, key=k),
        ((5, 6), (3, 5), (3, 4)),
        operators=True,
    ),
    "RotaryPositionalEmbedding-in attention": Layer(
        _rotated_attention, ((5, 8),), _call_rotated, operators=True
    ),
    "GRUCell": Layer(lambda k: nn.GRUCell(5, 4, key=k), ((5,), (4,)), operators=True),
    "LSTMCell": Layer(
        lambda k: nn.LSTMCell(5, 4, key=k),
        ((5,), (4,), (4,)),
        lambda cell, x, h, c: cell(x, (h, c)),
        operators=True,
    ),
    "Embedding": Layer(lambda k: nn.Embedding(7, 4, key=k), (TOKEN,), operators=True),
    "Shared": Layer(Tied, (TOKEN,), operators=True),
    "Sequential": Layer(_sequential, ((6,),), operators=True),
    "SpectralNorm": Layer(
        _spectral_norm,
        ((6,),),
        _call_spectral_norm,
        # The norms of a stack divide its entries; the derivative multiplies by the weight.
        dense_in=frozenset({"vmap of weights", "custom_vjp"}),
    ),
    "WeightNorm": Layer(
        lambda k: nn.WeightNorm(nn.Linear(6, 4, key=k)), ((6,),), dense=ELEMENTWISE
    ),
    "LayerNorm": Layer(lambda k: nn.LayerNorm((3, 4)), ((3, 4),), dense=ELEMENTWISE),
    "RMSNorm": Layer(lambda k: nn.RMSNorm((3, 4)), ((3, 4),), dense=ELEMENTWISE),
    "PReLU": Layer(
        lambda k: nn.PReLU(jr.uniform(k, (3, 4))), ((3, 4),), pattern="*", dense=ELEMENTWISE
    ),
}

WITHOUT_MATRICES = {
    *("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "AdaptivePool"),
    *("AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d"),
    *("AvgPool1d", "AvgPool2d", "AvgPool3d", "MaxPool1d", "MaxPool2d", "MaxPool3d", "Pool"),
    *("BatchNorm", "GroupNorm"),  # one number for each channel
    *("Dropout", "Identity", "Lambda", "State", "StateIndex", "StatefulLayer"),
}


def test_every_layer_is_in_the_table():
    exported = {name for name, value in vars(nn).items() if inspect.isclass(value)}
    listed = {name.partition("-")[0] for name in LAYERS}
    assert exported - listed - WITHOUT_MATRICES == set(), "layers that no test covers"
    assert listed | WITHOUT_MATRICES <= exported, "names that eqx.nn does not export"


# ------------------------------------------------------------------- transformations of f(model, *xs)


def _loss(y: Any) -> jax.Array:
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jtu.tree_leaves(y))


def _jit(f):
    def run(model, *xs):
        arrays, static = eqx.partition(model, eqx.is_array)
        return jax.jit(lambda arrays, *xs: f(eqx.combine(arrays, static), *xs))(arrays, *xs)

    return run


def _grad(f):
    def run(model, *xs):
        argnums = tuple(range(len(xs)))
        return jax.grad(lambda *xs: _loss(f(model, *xs)), argnums)(*xs)

    return run


def _jvp(f):
    return lambda model, *xs: jax.jvp(lambda *xs: f(model, *xs), xs, tuple(map(jnp.cos, xs)))


def _vmap(f):
    def run(model, *xs):
        xs = [jnp.stack([x, x + 1, x - 2], -1) for x in xs]
        return jax.vmap(lambda *xs: f(model, *xs), -1, -1)(*xs)

    return run


def _cond(f):
    def run(model, *xs):
        arrays, static = eqx.partition(model, eqx.is_array)
        branches = [
            lambda arrays, *xs: f(eqx.combine(arrays, static), *xs),
            lambda arrays, *xs: f(eqx.combine(arrays, static), *[x + x for x in xs]),
        ]
        return jax.lax.cond(jnp.max(jnp.abs(xs[0])) < 9, *branches, arrays, *xs)

    return run


def _while(f):
    def run(model, *xs):
        zeros = jtu.tree_map(jnp.zeros_like, f(model, *xs))
        return jax.lax.fori_loop(
            0, 2, lambda i, total: jtu.tree_map(jnp.add, total, f(model, *xs)), zeros
        )

    return run


def _custom_vjp(f):
    """With the model itself as residual, and twice the true derivative."""

    def run(model, *xs):
        arrays, static = eqx.partition(model, eqx.is_inexact_array)

        def call(arrays, *xs):
            return f(eqx.combine(arrays, static), *xs)

        def backward(residuals, ct):
            cts = jax.vjp(call, *residuals)[1](ct)
            return jtu.tree_map(lambda ct: ct if ct.dtype == jax.dtypes.float0 else ct + ct, cts)

        twice = jax.custom_vjp(call)
        twice.defvjp(lambda *args: (call(*args), args), backward)
        return twice(arrays, *xs)

    return run


def _vmap_of_weights(f):
    def run(stack, *xs):
        return eqx.filter_vmap(f, in_axes=(eqx.if_array(0), *[None] * len(xs)))(stack, *xs)

    return run


def _scan(f):
    def run(stack, *xs):
        arrays, static = eqx.partition(stack, eqx.is_array)
        return jax.lax.scan(lambda _, layer: (_, f(eqx.combine(layer, static), *xs)), 0, arrays)[1]

    return run


TRANSFORMATIONS = {
    "jit": _jit,
    "grad": _grad,
    "jvp": _jvp,
    "vmap": _vmap,
    "checkpoint": eqx.filter_checkpoint,
    "cond": _cond,
    "while": _while,
    "custom_vjp": _custom_vjp,
}
DERIVATIVES = {"grad", "jvp"}
OF_STACKS = {
    "vmap of weights": _vmap_of_weights,
    "scan": _scan,
    "scan of checkpoint": lambda f: _scan(eqx.filter_checkpoint(f)),
}


@functools.cache
def _quantized(layer: Layer, stacked: bool = False, dtype: Any = jnp.float32) -> Any:
    def make(key: jax.Array) -> Any:
        model = layer.make(key)
        model = jtu.tree_map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, model)
        return eqq.quantize(model, {layer.pattern: eqq.Array8B.quantize})

    model = eqx.filter_vmap(make)(jr.split(jr.key(0), 3)) if stacked else make(jr.key(0))
    assert any(map(eqq.is_implicit, jtu.tree_leaves(model, is_leaf=eqq.is_implicit)))
    return model


def _inputs(layer: Layer, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    keys = jr.split(jr.key(1), len(layer.inputs))
    return tuple(
        jnp.array(3) if x == TOKEN else jr.uniform(key, x, dtype, minval=-1)
        for key, x in zip(keys, layer.inputs, strict=True)
    )


def _strict_unless_dense(layer: Layer, transformation: str = ""):
    dense = layer.dense or transformation in layer.dense_in
    return eqq.on_materialize("ignore") if dense else eqq.strict()


def _assert_agree(found: Any, expected: Any, model: Any, largest: float = 1) -> None:
    """Equal up to one rounding for each term. No sum has more terms than the model has
    parameters; `largest` is how large a factor of a term may be (a code, in the gradient of a
    scale)."""
    terms = sum(x.size for x in jtu.tree_leaves(model) if eqx.is_array(x))

    def agree(x: Any, y: Any) -> None:
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)
        magnitude = largest * max(1, float(jnp.abs(y).max()))
        atol = float(jnp.finfo(x.dtype).eps) * terms * magnitude
        np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=0, atol=atol)

    jtu.tree_map(agree, found, expected)


with_each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


def _with_each(of_layer):
    """Each layer, under the transformations of its number."""
    return pytest.mark.parametrize(
        ("layer", "transformation"),
        [
            pytest.param(layer, transformation, id=f"{name}-{transformation}")
            for i, (name, layer) in enumerate(LAYERS.items())
            for transformation in of_layer(i)
            if TOKEN not in layer.inputs or transformation not in DERIVATIVES
        ],
    )


def _check(layer: Layer, transformation: str, model: Any) -> None:
    """Transformed outside of `implicit` and inside: the results, and their derivatives with
    respect to inputs and parameters, scales included."""
    transform = (TRANSFORMATIONS | OF_STACKS)[transformation]

    def results(program: Callable[..., Any], model: Any, xs: Any) -> Any:
        def loss(model_and_xs: Any) -> Any:
            result = program(*model_and_xs)
            return _loss(result), result

        if transformation in DERIVATIVES:
            return None, program(model, *xs)
        return eqx.filter_grad(loss, has_aux=True)((model, *xs))

    programs = (
        lambda model, *xs: transform(eqq.implicit(layer.call))(model, *xs),
        lambda model, *xs: eqq.implicit(transform(layer.call))(model, *xs),
        lambda model, *xs: transform(layer.call)(eqq.materialize(model), *xs),
    )
    compare = eqx.filter_jit(lambda *args: [results(program, *args) for program in programs])
    with _strict_unless_dense(layer, transformation):
        outside, inside, expected = compare(model, _inputs(layer))
    for gradient, result in (outside, inside):
        _assert_agree(result, expected[1], model)
        _assert_agree(gradient, expected[0], model, largest=127)


# Each compiles three programs and their derivatives: layers take turns.
@_with_each(lambda i: [t for j, t in enumerate(TRANSFORMATIONS) if NIGHTLY or (i + j) % 2 == 0])
def test_transformed(layer, transformation):
    _check(layer, transformation, _quantized(layer))


@_with_each(lambda i: ("vmap of weights", ("scan", "scan of checkpoint")[i % 2]))
def test_transformed_stack(layer, transformation):
    _check(layer, transformation, _quantized(layer, stacked=True))


@with_each_layer
def test_model_itself(layer):
    """`eqx.filter_jit(implicit(model))(x)`, and without `jit`."""
    model, xs = eqx.Partial(layer.call, _quantized(layer)), _inputs(layer)
    expected = eqx.filter_jit(eqq.materialize(model))(*xs)
    with _strict_unless_dense(layer):
        _assert_agree(eqx.filter_jit(eqq.implicit(model))(*xs), expected, model)
        _assert_agree(eqq.implicit(model)(*xs), expected, model)


@with_each_layer
def test_audit(layer):
    """Only arithmetic makes a weight dense, and the audit says so."""
    audit = eqq.audit(layer.call, _quantized(layer), *_inputs(layer))
    assert audit.rows
    assert {row.primitive for row in audit.densified} == layer.dense


@pytest.mark.parametrize("layer", [name for name, layer in LAYERS.items() if layer.operators])
def test_operators_alone(layer):
    """An unmodified layer, called as it is."""
    layer = LAYERS[layer]
    model, xs = _quantized(layer), _inputs(layer)
    with eqq.strict():
        found = layer.call(model, *xs), jax.jit(lambda *xs: layer.call(model, *xs))(*xs)
    expected = eqx.filter_jit(layer.call)(eqq.materialize(model), *xs)
    _assert_agree(found, (expected, expected), model)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", ["Linear", "MLP", "Conv2d", "GRUCell"])
def test_half_precision(name, dtype):
    layer = LAYERS[name]
    model, xs = _quantized(layer, dtype=dtype), _inputs(layer, dtype)
    with eqq.strict():
        found = eqx.filter_jit(eqq.implicit(layer.call))(model, *xs)
    _assert_agree(found, eqx.filter_jit(layer.call)(eqq.materialize(model), *xs), model)


OTHER_FORMATS = [name for name, each in LAYOUTS.items() if each.format is not eqq.Array8B]


@pytest.mark.parametrize(("layer", "name"), in_turns(LAYERS, OTHER_FORMATS, each=2))
def test_other_formats(layer, name):
    layer = LAYERS[layer]
    model = eqq.quantize(layer.make(jr.key(0)), {layer.pattern: LAYOUTS[name]})
    model, xs = eqx.Partial(layer.call, model), _inputs(layer)
    with _strict_unless_dense(layer):
        found = eqx.filter_jit(eqq.implicit(model))(*xs)
    _assert_agree(found, eqx.filter_jit(eqq.materialize(model))(*xs), model)
