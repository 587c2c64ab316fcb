"""One law for each primitive. It is always the same sentence: the program agrees with itself on the
materialized array. A law only says how to draw the program.

`@law(primitive, ...)` decorates `(draw, x) -> program` or `(draw, x) -> (program, other operands)`;
the program is a function of `x` and the other operands.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from .strategies import generator


@dataclasses.dataclass(frozen=True)
class Law:
    """How the programs of a law are drawn, and how exactly they have to agree."""

    name: str
    """That of the decorated function."""
    draw: Callable[..., Any]
    """From hypothesis' `draw` and an array: a program, or a program and its other operands."""
    primitives: tuple[str, ...]
    """The JAX primitives that the programs show."""
    exact: bool
    """Bit for bit, or to the rounding of the sum."""
    packed: bool
    """Whether a rule has to keep the operand packed for some programs."""
    ranks: tuple[int, ...]
    """How many axes the array may have."""
    terms: Callable[[Any], int]
    """How many terms are summed for one element of the result."""
    multilinear: bool
    """Whether the programs are linear in each operand: then their derivatives are checked by differences, too."""


LAWS: dict[str, Law] = {}
"""Every law, by its name."""


def law(
    *primitives: str,
    exact: bool = True,
    packed: bool = True,
    ranks: Sequence[int] = (1, 2, 3),
    terms: Callable[[Any], int] = lambda x: x.size,
    multilinear: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds a law: decorates `(draw, x) -> program` or `(draw, x) -> (program, other operands)`.

    **Arguments:**

    - `primitives`: the names of JAX primitives that the programs show.
    - `exact`, `packed`, `ranks`, `terms`, `multilinear`: as in [`Law`][eqquant.testing.Law].
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        LAWS[name] = Law(
            name, function, primitives, exact, packed, tuple(ranks), terms, multilinear
        )
        return function

    return register


def dense(draw: Any, shape: Sequence[int], dtype: Any) -> Any:
    return jnp.asarray(generator(draw).normal(size=tuple(shape)), dtype)


def an_axis(draw: Any, x: Any) -> int:
    return draw(st.integers(0, x.ndim - 1))


# ---------------------------------------------------------------------------------- structural


@law("transpose")
def transpose(draw, x):
    permutation = draw(st.permutations(range(x.ndim)))
    return lambda x: lax.transpose(x, permutation)


@law("transpose", "dot_general", exact=False, ranks=(2, 3))
def transpose_then_dot(draw, x):
    permutation = draw(st.permutations(range(x.ndim)))
    again = draw(st.permutations(range(x.ndim)))
    length = x.shape[permutation[again[-1]]]
    y = dense(draw, (length, 2), x.dtype)
    left = draw(st.booleans())

    def program(x, y):
        view = lax.transpose(lax.transpose(x, permutation), again)
        if left:
            return lax.dot_general(view, y, (((x.ndim - 1,), (0,)), ((), ())))
        return lax.dot_general(y, view, (((0,), (x.ndim - 1,)), ((), ())))

    return program, (y,)


@law("reshape")
def reshape(draw, x):
    shape = draw(st.sampled_from(_factorizations(x.size)))
    return lambda x: lax.reshape(x, shape)


def _factorizations(size: int) -> list[tuple[int, ...]]:
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    pairs = [(a, size // a) for a in divisors]
    return [
        (size,),
        *pairs,
        *[(a, b // c, c) for a, b in pairs for c in divisors if b % c == 0],
        (1, size, 1),
    ]


@law("broadcast_in_dim")
def broadcast_in_dim(draw, x):
    new = draw(st.integers(0, 2))
    shape = (*draw(st.tuples(*[st.integers(1, 3)] * new)), *x.shape)
    shape = tuple(3 if n == 1 and draw(st.booleans()) else n for n in shape)
    return lambda x: lax.broadcast_in_dim(x, shape, tuple(range(new, len(shape))))


@law("squeeze", "broadcast_in_dim")
def expand_then_squeeze(draw, x):
    at, out = an_axis(draw, x), draw(st.integers(0, x.ndim))
    program = lambda x: lax.squeeze(lax.expand_dims(x, (at, x.ndim + 1)), (at,))  # noqa: E731
    return lambda x: lax.expand_dims(lax.squeeze(program(x), (x.ndim,)), (out,))


@law("squeeze", "slice")
def row(draw, x):
    axis = an_axis(draw, x)
    i = draw(st.integers(0, x.shape[axis] - 1))
    return lambda x: lax.index_in_dim(x, i, axis, keepdims=False)


@law("slice")
def slice_(draw, x):
    starts = [draw(st.integers(0, n)) for n in x.shape]
    stops = [draw(st.integers(a, n)) for a, n in zip(starts, x.shape, strict=True)]
    strides = [draw(st.sampled_from([1, 1, 2])) for _ in x.shape]
    return lambda x: lax.slice(x, starts, stops, strides)


@law("rev")
def rev(draw, x):
    axes = tuple(draw(st.sets(st.integers(0, x.ndim - 1))))
    return lambda x: lax.rev(x, axes)


@law("concatenate")
def concatenate(draw, x):
    axis = an_axis(draw, x)
    other = dense(draw, x.shape, x.dtype) if draw(st.booleans()) else None
    return lambda x: lax.concatenate([x, x if other is None else other, x], axis)


@law("split")
def split(draw, x):
    axis = an_axis(draw, x)
    first = draw(st.integers(0, x.shape[axis]))
    return lambda x: lax.split(x, [first, x.shape[axis] - first], axis)


@law("stack")
def stack(draw, x):
    axis = draw(st.integers(0, x.ndim))
    return lambda x: jnp.stack([x, x], axis)


@law("unstack")
def unstack(draw, x):
    axis = an_axis(draw, x)
    return lambda x: jnp.unstack(x, axis=axis)


@law("tile")
def tile(draw, x):
    reps = draw(st.tuples(*[st.integers(1, 2)] * x.ndim))
    return lambda x: jnp.tile(x, reps)


@law("pad")
def pad(draw, x):
    config = [
        (draw(st.integers(-1, 2)), draw(st.integers(0, 2)), draw(st.integers(0, 1)))
        for _ in x.shape
    ]
    value = draw(st.sampled_from([0, 0, 1.5]))
    return lambda x: lax.pad(x, jnp.asarray(value, x.dtype), config)


# ------------------------------------------------------------------------------------ indexing


@law("gather", ranks=(2, 3))
def gather_rows(draw, x):
    axis = an_axis(draw, x)
    shape = draw(st.sampled_from([(), (2,), (2, 3)]))
    indices = generator(draw).integers(-x.shape[axis], x.shape[axis] + 2, shape)
    mode = draw(st.sampled_from(["fill", "clip", "wrap"]))
    return lambda x: jnp.take(x, indices, axis=axis, mode=mode)


@law("gather", ranks=(2, 3))
def gather_elements(draw, x):
    indices = tuple(generator(draw).integers(0, n, 3) for n in x.shape)
    return lambda x: x[indices]


@law("gather", ranks=(2, 3))
def gather_batched(draw, x):
    indices = jnp.asarray(generator(draw).integers(0, x.shape[1], (x.shape[0], 2)))
    return (lambda x, i: jax.vmap(lambda row, i: row[i])(x, i)), (indices,)


@law("dynamic_slice")
def dynamic_slice(draw, x):
    starts = [jnp.asarray(draw(st.integers(-1, n))) for n in x.shape]
    sizes = [draw(st.integers(1, n)) for n in x.shape]
    return (lambda x, *starts: lax.dynamic_slice(x, starts, sizes)), starts


@law("dynamic_update_slice")
def dynamic_update_slice(draw, x):
    axis = an_axis(draw, x)
    start = jnp.asarray(draw(st.integers(-1, x.shape[axis])))
    other = dense(draw, x.shape, x.dtype) if draw(st.booleans()) else None

    def program(x, start):
        update = lax.slice_in_dim(x if other is None else other, 0, 1, axis=axis)
        return lax.dynamic_update_slice_in_dim(x, update, start, axis)

    return program, (start,)


@law("select_n", "mul")
def select_n(draw, x):
    scalar = draw(st.booleans())
    which = jnp.asarray(generator(draw).integers(0, 2, () if scalar else x.shape), bool)
    return (lambda x, which: lax.select_n(which, x, -x)), (which,)


@law("scatter", packed=False)
def scatter(draw, x):
    axis = an_axis(draw, x)
    i = draw(st.integers(0, x.shape[axis] - 1))
    index = (slice(None),) * axis + (i,)
    return lambda x: x.at[index].set(1.5)


# --------------------------------------------------------------------------------- elementwise


@law("neg")
def neg(draw, x):
    return lax.neg


@law("mul", exact=False, terms=lambda x: 3)
def mul_scalar(draw, x):
    c = jnp.asarray(draw(st.sampled_from([0.0, 2.0, -0.3, 1e-3])), x.dtype)
    if draw(st.booleans()):
        return (lambda x, c: x * c), (c,)
    return (lambda x, c: c * x), (c,)


@law("div", exact=False, terms=lambda x: 3, multilinear=False)
def div_scalar(draw, x):
    c = jnp.asarray(draw(st.sampled_from([2.0, -0.3, 1e-3])), x.dtype)
    return (lambda x, c: x / c), (c,)


@law("convert_element_type", multilinear=False)
def convert_element_type(draw, x):
    targets = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.complex64, jnp.bool_]
    chain = draw(st.lists(st.sampled_from(targets[:3]), max_size=2))
    last = draw(st.sampled_from(targets))

    def program(x):
        for dtype in (*chain, last):
            x = lax.convert_element_type(x, dtype)
        return x

    return program


@law("copy")
def copy(draw, x):
    return lambda x: lax.copy_p.bind(x)


@law("stop_gradient", multilinear=False)  # its derivative is not that of the function
def stop_gradient(draw, x):
    return lax.stop_gradient


@law("name")
def name(draw, x):
    return lambda x: checkpoint_name(x, "weight")


@law("optimization_barrier")
def optimization_barrier(draw, x):
    y = dense(draw, (2,), x.dtype)
    return (lambda x, y: lax.optimization_barrier((x, y))), (y,)


@law("device_put")
def device_put(draw, x):
    return lambda x: jax.device_put(x)


# --------------------------------------------------------------------------------- contraction


@law("dot_general", exact=False)
def dot_general(draw, x):
    """Any axes contracted, any batched, on either side."""
    roles = [draw(st.sampled_from("cbf")) for _ in x.shape]
    contract = [i for i, role in enumerate(roles) if role == "c"]
    batch = [i for i, role in enumerate(roles) if role == "b"]
    free = draw(st.sampled_from([(), (1,), (2,), (2, 3)]))
    sizes = [x.shape[i] for i in batch + contract] + list(free)
    order = draw(st.permutations(range(len(sizes))))
    y = dense(draw, [sizes[i] for i in order], x.dtype)
    place = [order.index(i) for i in range(len(sizes))]
    y_batch, y_contract = place[: len(batch)], place[len(batch) : len(batch) + len(contract)]
    left = draw(st.booleans())
    preferred = draw(st.sampled_from([None, jnp.float32]))
    precision = draw(st.sampled_from([None, lax.Precision.HIGHEST]))

    def program(x, y):
        if left:
            numbers = ((contract, y_contract), (batch, y_batch))
            return lax.dot_general(x, y, numbers, precision, preferred)
        numbers = ((y_contract, contract), (y_batch, batch))
        return lax.dot_general(y, x, numbers, precision, preferred)

    return program, (y,)


@law("dot_general", exact=False, packed=False, ranks=(2,), multilinear=False)
def dot_general_both(draw, x):
    return lambda x: x @ x.T


@law("ragged_dot_general", exact=False, ranks=(3,))
def ragged_dot(draw, x):
    groups, k, _ = x.shape
    sizes = jnp.asarray(generator(draw).multinomial(5, [1 / groups] * groups), jnp.int32)
    y = dense(draw, (5, k), x.dtype)
    return (lambda x, y, sizes: lax.ragged_dot(y, x, sizes)), (y, sizes)


@law("conv_general_dilated", exact=False, ranks=(3,))
def conv_general_dilated(draw, x):
    out, inner, width = x.shape
    groups = draw(st.sampled_from([1, out]))
    y = dense(draw, (2, inner * groups, width + 3), x.dtype)
    padding = draw(st.sampled_from(["SAME", "VALID"]))
    stride = draw(st.sampled_from([1, 2]))
    return (
        lambda x, y: lax.conv_general_dilated(y, x, (stride,), padding, feature_group_count=groups)
    ), (y,)


@law("reduce_sum", exact=False)
def reduce_sum(draw, x):
    axes = tuple(draw(st.sets(st.integers(0, x.ndim - 1))))
    return lambda x: jnp.sum(x, axes)


@law("reduce_max", "reduce_min", multilinear=False)
def reduce_max(draw, x):
    axes = tuple(draw(st.sets(st.integers(0, x.ndim - 1))))
    return lambda x: (jnp.max(x, axes), jnp.min(x, axes))


@law("reduce_prod", exact=False, terms=lambda x: 4 * x.size, multilinear=False)
def reduce_prod(draw, x):
    axis = an_axis(draw, x)
    return lambda x: jnp.prod(x, axis)


@law("argmax", "argmin")
def argmax(draw, x):
    axis = an_axis(draw, x)
    return lambda x: (jnp.argmax(x, axis), jnp.argmin(x, axis))


# ---------------------------------------------------------------------------------------- chains


@law("transpose", "reshape", "slice", "concatenate", "rev", "squeeze")
def chain_of_structural(draw, x):
    """Nothing is ever re-quantized: chains reproduce the materialized array bit for bit."""
    steps = []
    shape = x.shape
    for _ in range(draw(st.integers(2, 4))):
        kind = draw(st.sampled_from([transpose, rev, slice_, concatenate, stack]))
        like = jax.ShapeDtypeStruct(shape, x.dtype)
        if 0 in shape or len(shape) > 4:
            break
        steps.append(kind(draw, like))
        shape = jax.eval_shape(steps[-1], like).shape

    def program(x):
        for step in steps:
            x = step(x)
        return x

    return program
