"""What a call uses as weights: `quantize`, `plan` and `report` with `inputs`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import assert_raises, normal
from jax import lax

import eqquant as eqq
from eqquant._model import weights_in_call


INT8 = eqq.Array8B.quantize
X, IDS = normal(3, 8), jnp.array([1, 0, 2])


def weights_of(call, *inputs, **arrays):
    """The names of the arrays that are quantized."""

    def with_another(tree, *inputs):  # a call that uses nothing as a weight is refused
        tree = dict(tree)
        return jnp.ones(8) @ tree.pop("another"), call(*inputs, **tree)

    q = eqq.quantize(
        {**arrays, "another": jnp.ones((8, 8))}, INT8, inputs=inputs, call=with_another
    )
    assert isinstance(q.pop("another"), eqq.Array8B)
    return {name for name, x in q.items() if eqq.is_implicit(x)}


W, G, T = normal(8, 8, seed=1), normal(3, 8, seed=2), normal(8, 3, seed=3)
SMALL = normal(3, 4, seed=4)

# Each with the names of what it uses as weights.
CALLS = {
    "product": ("w", lambda x, w, g: (x + g) @ w * g),
    "product, scale first": ("w", lambda x, w, g: (g * x) @ w),
    "transposed, cast and scaled": ("w", lambda x, w, g: (x * g) @ (2 * w.T.astype(jnp.bfloat16))),
    "a factor for each row": ("w", lambda x, w, g: x @ (w / jnp.linalg.norm(w, axis=1)[:, None])),
    "a weight plus something": ("", lambda x, w, g: x * g @ (w + 1)),
    "a mask on a weight": ("", lambda x, w, g: x @ (w * (w > 0))),
    "both": ("w g", lambda x, w, g: g @ w + x),
    "joined": ("w", lambda x, w, g: x * g @ jnp.concatenate([w, w], 1)),
    "joined with what is none": ("w", lambda x, w, g: jnp.concatenate([x, g]) @ w),
    "unused": ("w", lambda x, w, g: (x @ w, g @ w)[0]),
    "jit": ("w", lambda x, w, g: jax.jit(lambda x, w: x @ w)(x, w) + g),
    "remat": ("w", lambda x, w, g: jax.checkpoint(lambda w: jnp.sin(x @ w) * g)(w)),
    "grad": ("w", lambda x, w, g: jax.grad(lambda x: ((x * g) @ w).sum())(x)),
    "vmap": ("w", lambda x, w, g: jax.vmap(lambda x, g: w @ x + g)(x, g)),
    "elementwise by einsum": ("", lambda x, w, g: jnp.einsum("bi,bi->bi", x, g) + w[:3]),
    "vectors": ("", lambda x, w, g: jax.vmap(jnp.dot)(x, g) + w[0, 0]),
    "convolution": (
        "w", lambda x, w, g: lax.conv_general_dilated((x * g)[None], w.reshape(8, 8, 1)[:, :3], (1,), "SAME")
    ),
    "ragged": ("w", lambda x, w, g: lax.ragged_dot(x * g, w.reshape(1, 8, 8), jnp.array([3]))),
    "cond": ("w", lambda x, w, g: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: x * g, w)),
    "platform": ("w", lambda x, w, g: lax.platform_dependent(x * g, w, default=jnp.matmul)),
    "scan over it": ("", lambda x, w, g: lax.scan(lambda c, v: (c * v + g.sum(), v), x[0], w)[0]),
    "scan around it": ("w", lambda x, w, g: lax.scan(lambda c, v: (c @ w + v, None), x[0], g)[0]),
    "carried": ("w", lambda x, w, g: lax.scan(lambda c, v: ((c[0] @ c[1], c[1]), v), (x, w), g)[0]),
    "while": ("w", lambda x, w, g: lax.while_loop(lambda x: (x * g).sum() > 9, lambda x: x @ w, x)),
    "while, in the condition": (
        "w", lambda x, w, g: lax.while_loop(lambda x: (x @ w).sum() > 9, lambda x: x * g, x)
    ),
    "loop over rows": ("", lambda x, w, g: lax.fori_loop(0, 3, lambda i, c: c * w[i] + g[i], x)),
    "repeated": ("w", lambda x, w, g: jnp.broadcast_to(w, (3, 8, 8)) @ x[:, :, None] + g[0, 0]),
    "a token": ("w", lambda x, w, g: jnp.broadcast_to(g[0], (5, 8)) @ w),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_what_is_a_weight(name):
    want, call = CALLS[name]
    assert weights_of(call, X, w=W, g=G) == set(want.split())


LOOK_UPS = {
    "embedding": ("table", lambda ids, w, table: table[ids] * 4 + w[0]),
    "take": ("table", lambda ids, w, table: jnp.sin(jnp.take(table, ids, axis=0)) + w[0]),
    "returned": ("table", lambda ids, w, table: (table[ids], w)),
    "one row": ("table", lambda ids, w, table: jnp.tanh(table[ids[0]]) + w),
    "attention mask": ("w table", lambda ids, w, table: (table[ids] * (ids > 0)[:, None]) @ w),
    "normalized": (
        "w table",
        lambda ids, w, table: (table[ids] * jnp.mean(table[ids], -1, keepdims=True)) @ w,
    ),
    "norm of rows alone": ("w table", lambda ids, w, table: (table[ids] * table[ids]) @ w),
    "scaled": ("w table", lambda ids, w, table: (table[ids] * w[0]) @ w),
    "rotary": ("w", lambda ids, w, table: (jnp.ones((3, 8)) @ w) * table[ids]),
    "rotary, repeated": (
        "w", lambda ids, w, table: (jnp.ones((3, 4)) @ w[:4]) * jnp.tile(table[ids, :4], 2)
    ),
    "rotary at an offset": (
        "w",
        lambda ids, w, table: (jnp.ones((2, 8)) @ w) * lax.dynamic_slice(table, (ids[0], 0), (2, 8)),
    ),
    "experts": ("table", lambda ids, w, table: jnp.ones(4) @ table.reshape(2, 4, 8)[ids % 2] + w[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOK_UPS)
def test_what_is_looked_up(name):
    want, call = LOOK_UPS[name]
    assert weights_of(call, IDS, w=W, table=normal(8, 8, seed=5)) == set(want.split())


class Block(eqx.Module):
    """One layer with all that is no weight, and has two axes where layers are stacked."""

    norm: eqx.nn.LayerNorm
    query: eqx.nn.Linear
    mlp: eqx.nn.MLP
    cos: jax.Array
    mask: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(8)
        self.query = eqx.nn.Linear(8, 8, key=keys[0])
        self.mlp = eqx.nn.MLP(8, 8, 16, 1, key=keys[1])
        self.cos = jnp.cos(jnp.outer(jnp.arange(3.0), jnp.arange(8.0)))
        self.mask = jnp.where(jnp.tri(3, dtype=bool), 0.0, -jnp.inf)

    def __call__(self, x, positions):
        h = jax.vmap(self.query)(jax.vmap(self.norm)(x)) * self.cos[positions]
        return x + jax.vmap(self.mlp)(jax.nn.softmax(h @ h.T + self.mask) @ h)


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    layers: Block
    positions: jax.Array
    unembed: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(10, 8, key=keys[0])
        self.layers = eqx.filter_vmap(Block)(keys)
        self.positions = normal(5, 8, seed=3)
        self.unembed = self.embed.weight

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids) + self.positions[: len(ids)]
        arrays, rest = eqx.partition(self.layers, eqx.is_array)

        @jax.checkpoint
        def layer(x, arrays):
            return eqx.combine(arrays, rest)(x, jnp.arange(len(ids))), None

        return lax.scan(layer, x, arrays)[0] @ self.unembed.T


WEIGHTS = {
    "embed.weight", "layers.query.weight", "layers.mlp.layers.0.weight", "layers.mlp.layers.1.weight", "unembed",
}  # fmt: skip


def quantized_paths(tree):
    leaves = jtu.tree_leaves_with_path(tree, is_leaf=eqq.is_implicit)
    return {
        jtu.keystr(path, simple=True, separator=".") for path, x in leaves if eqq.is_implicit(x)
    }


@pytest.fixture(scope="module")
def model():
    return Model(jax.random.key(0))


def test_a_model_of_stacked_layers(model):
    q = eqq.quantize(model, INT8, inputs=(IDS,))
    assert quantized_paths(q) == WEIGHTS
    assert q.unembed is q.embed.weight and q.layers.mask is model.layers.mask
    with eqq.strict():
        got = eqx.filter_jit(eqq.implicit(q))(IDS)
    np.testing.assert_allclose(got, eqq.materialize(q)(IDS), rtol=2e-5, atol=2e-5)
    assert eqx.tree_equal(eqq.quantize(q, INT8, inputs=(IDS,)), q)


def test_shapes_are_enough(model):
    shapes, ids = eqx.filter_eval_shape(lambda: (model, IDS))
    for inputs in ((IDS,), (ids,), [np.asarray(IDS)]):
        skeleton = eqq.quantize(shapes, eqq.ArrayNF4.quantize, inputs=inputs)
        assert quantized_paths(skeleton) >= WEIGHTS - {"unembed"}
        leaves = jtu.tree_leaves(eqx.filter(skeleton, eqq.is_implicit, is_leaf=eqq.is_implicit))
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    traced = eqx.filter_eval_shape(
        lambda model, x: eqq.quantize(model, INT8, inputs=(x,)), model, IDS
    )
    assert quantized_paths(traced) >= WEIGHTS - {"unembed"}


def test_ensembles(model):
    members = eqx.filter_vmap(lambda key: eqx.nn.MLP(8, 4, 16, 1, key=key))(
        jax.random.split(jax.random.key(1), 2)
    )

    def call(members, x):
        return eqx.filter_vmap(lambda model, x: model(x), in_axes=(eqx.if_array(0), None))(
            members, x
        )

    q = eqq.quantize(members, INT8, inputs=(X[0],), call=call)
    assert quantized_paths(q) == {"layers.0.weight", "layers.1.weight"}
    got = eqq.implicit(call)(q, X[0])
    np.testing.assert_allclose(got, call(eqq.materialize(q), X[0]), rtol=1e-5, atol=1e-6)


def test_custom_derivatives():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, w), lambda w, ct: (ct @ w.T, None))
    assert weights_of(lambda x, w, g: product(x, w) + g, X, w=W, g=G) == {"w"}
    grad = jax.grad(lambda x, w, g: (product(x, w) * g[0]).sum())
    assert weights_of(lambda x, w, g: grad(x, w, g), X, w=W, g=G) == {"w"}

    batched = jax.custom_batching.custom_vmap(lambda x, w: x @ w)
    batched.def_vmap(lambda size, where, x, w: (x @ w, True))
    assert weights_of(lambda x, w, g: jax.vmap(batched, (0, None))(x, w) + g, X, w=W, g=G) == {"w"}


def test_patterns_choose_among_weights(model):
    q = eqq.quantize(
        model,
        {"*.mlp.*": None, "*.norm.*": None, "layers.norm.bias": INT8, "*": eqq.ArrayNF4.quantize},
        inputs=(IDS,),
    )
    assert quantized_paths(q) == {"embed.weight", "layers.query.weight", "unembed"}
    q = eqq.quantize(model, {"layers.cos": INT8, "*": INT8}, inputs=(IDS,))
    assert quantized_paths(q) == WEIGHTS | {"layers.cos"}
    for make in (eqq.quantize, eqq.plan):
        assert_raises(
            lambda make=make: make(model, {"*.norm.*": INT8, "*": INT8}, inputs=(IDS,)),
            ValueError,
            [
                "'*.norm.*' matches no floating-point matrix that the call uses as a weight",
                "path in full",
            ],
        )


def test_mistakes_are_explained(model):
    cases = [
        (dict(inputs=IDS), TypeError, ["inputs must be a tuple", "inputs=(x,)"]),
        (dict(inputs=(IDS,), call=3), TypeError, ["call must be a function", "it is 3"]),
        (
            dict(inputs=(X,), call=lambda m, x: x),
            ValueError,
            ["multiplies by no array of the tree"],
        ),
        (dict(inputs=(IDS, IDS)), TypeError, []),
    ]
    for keywords, error, words in cases:
        given = {"inputs": None, "call": None, **keywords}
        assert_raises(lambda given=given: weights_in_call(model, **given), error, words)
    with pytest.raises(TypeError) as caught:
        eqq.quantize(model, INT8, inputs=(IDS, IDS))
    assert any("to find out which arrays are weights" in note for note in caught.value.__notes__)
    assert_raises(
        lambda: eqq.quantize({"w": W}, INT8, inputs=(X,)), TypeError, ["a dict cannot be called"]
    )


def test_numbers_that_are_not_finite_are_named(model):
    words = ["'layers.mask' holds -inf at [0, 0, 1] (9 such elements)", "inputs=(...)"]
    for how in (INT8, {"*": eqq.ArrayNVFP4.quantize}):
        assert_raises(lambda how=how: eqq.quantize(model, how), ValueError, words)
    q = eqq.quantize(model, {"layers.mask": None, "*": INT8})  # the way out that it names
    assert q.layers.mask is model.layers.mask


def test_complex_weights_keep_their_imaginary_part():
    w = W + 1j * W
    for make in (eqq.Array8B, eqq.ArrayNF4, eqq.Array1B, eqq.RSROperatorTernary):
        with pytest.raises(TypeError, match="array.real and array.imag as two arrays") as caught:
            make.quantize(w)
        assert "astype" not in str(caught.value)
    assert eqq.quantize({"w": w, "v": W}, INT8)["w"] is w
    assert_raises(
        lambda: eqq.quantize({"w": w, "v": W}, {"w": INT8}),
        ValueError,
        ["'w', which is complex64[8, 8]."],
    )


def test_notes_of_plan_and_report(model):
    model = eqx.tree_at(lambda m: m.layers.mask, model, jnp.zeros((3, 3, 3)))
    q = eqq.quantize(model, INT8)
    for made in (eqq.plan(model, INT8), eqq.report(model, q)):
        notes = {row.path: row.note for row in made.rows if row.note}
        assert notes == {
            "layers.norm.weight": "looks like a norm",
            "layers.norm.bias": "looks like a norm",
            "layers.query.bias": "looks like a bias",
            "layers.mlp.layers.0.bias": "looks like a bias",
            "layers.mlp.layers.1.bias": "looks like a bias",
            "layers.cos": "looks like a table of positions",
            "layers.mask": "looks like a mask",
        }
        table = str(made)
        assert "quantized, although not like a weight: 7. Pass inputs=(...)" in table
        assert "{'layers.norm.weight': None, '*': ...}" in table
    weights = eqq.quantize(model, INT8, inputs=(IDS,))
    planned = eqq.plan(model, INT8, inputs=(IDS,))
    for made in (planned, eqq.report(model, weights, inputs=(IDS,))):
        notes = {row.path: row.note for row in made.rows if row.note}
        assert set(notes) == quantized_paths(q) - WEIGHTS
        assert set(notes.values()) == {"not used as a weight"}
        assert "although" not in str(made)
    assert "note" not in str(eqq.plan({"w": W}, INT8))


def test_a_stack_of_vectors_is_noted():
    layers = {"w": normal(3, 8, 8), "b": normal(3, 8)}
    assert [row.note for row in eqq.plan(layers, INT8).rows] == [
        "looks like a stack of vectors",
        "",
    ]


KEY = jax.random.key(0)
LAYERS = {
    "conv": (lambda: eqx.nn.Conv2d(3, 4, 3, key=KEY), {"weight"}, (jnp.ones((3, 8, 8)),)),
    "depthwise": (lambda: eqx.nn.Conv1d(8, 8, 3, groups=8, key=KEY), {"weight"}, (jnp.ones((8, 9)),)),
    "gru": (lambda: eqx.nn.GRUCell(8, 8, key=KEY), {"weight_ih", "weight_hh"}, (X[0], X[1])),
    "weight norm": (
        lambda: eqx.nn.WeightNorm(eqx.nn.Linear(8, 4, key=KEY)), {"layer.weight"}, (X[0],)
    ),
    "norm of two axes": (
        lambda: eqx.nn.Sequential(
            [eqx.nn.LayerNorm((3, 8)), eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(24, 4, key=KEY)]
        ),
        {"layers.2.weight"},
        (X,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_equinox(name):
    make, want, inputs = LAYERS[name]
    assert quantized_paths(eqq.quantize(make(), INT8, inputs=inputs)) == want


def test_attention_with_dropout():
    attention = eqx.nn.MultiheadAttention(2, 8, dropout_p=0.5, key=KEY)
    q = eqq.quantize(attention, INT8, inputs=(X, KEY), call=lambda m, x, key: m(x, x, x, key=key))
    assert len(quantized_paths(q)) == 4
