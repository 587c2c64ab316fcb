"""What it means that a law holds: for one format, in one mode."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args, Literal

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import Array, lax

from .._daylight import recording
from .._implicit import implicit
from .._model import materialize
from .dense_answers import DENSE_PROGRAMS
from .laws import Law, LAWS
from .strategies import DTYPES, SHAPES


Mode = Literal["eager", "jit", "vmap", "grad"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""`"vmap"` also maps by `scan` and inside `implicit`; `"grad"` moves float leaves and activations."""

Strategy = Callable[..., st.SearchStrategy]


def check_law(
    law: Law | str, strategy: Strategy, mode: Mode = "eager", *, max_examples: int | None = None
) -> int:
    """Checks that a law holds for the arrays of a strategy: hypothesis draws array and program.

    **Arguments:**

    - `law`: one of [`LAWS`][eqquant.testing.LAWS], or its name.
    - `strategy`: a function of shape and dtype, which gives the hypothesis strategy of arrays.
    - `mode`: how the program is run: eagerly, under `jit`, over stacked arrays by `vmap` and `scan`, or
        differentiated.
    - `max_examples`: how many programs are drawn; by default what the hypothesis profile says.

    **Returns:** how many of the programs made nothing dense, as far as the mode can tell: a law that
    never keeps an array packed tests no rule.

    **Raises:** `AssertionError` where a program disagrees with itself on the materialized array.
    """
    law = LAWS[law] if isinstance(law, str) else law
    check = {"eager": _eager, "jit": _jit, "vmap": _vmap, "grad": _grad}[mode]

    kept_packed = 0

    @_given(max_examples)
    def holds(data: st.DataObject) -> None:
        nonlocal kept_packed
        program = Program.drawn(
            data.draw, law, strategy, [jnp.float32] if mode == "grad" else DTYPES
        )
        with recording() as records:
            check(program)
        kept_packed += not any(record.densified for record in records)

    holds()
    return kept_packed


def check_dense_answer(
    primitive: str, strategy: Strategy, *, max_examples: int | None = None
) -> None:
    """Checks that a primitive without a packed form gives the dense answer, and that the audit says so.

    **Arguments:**

    - `primitive`: one of [`DENSE_PROGRAMS`][eqquant.testing.DENSE_PROGRAMS].
    - `strategy`, `max_examples`: as for [`check_law`][eqquant.testing.check_law].
    """

    @_given(max_examples)
    def holds(data: st.DataObject) -> None:
        x = data.draw(strategy((4, 6), jnp.float32))
        run = DENSE_PROGRAMS[primitive]
        with recording() as records:
            got = materialize(implicit(run)(x))
        want = run(x.materialize())
        for g, w in zip(*map(jtu.tree_leaves, (got, want)), strict=True):
            assert (g.shape, g.dtype) == (w.shape, w.dtype)
            assert_same(g, w)
        assert any(record.densified for record in records)

    holds()


def _given(max_examples: int | None) -> Callable[[Callable[..., None]], Callable[[], None]]:
    # The first example of each shape compiles: no deadline, and slow draws are in order.
    settings: dict[str, Any] = {
        "deadline": None,
        "suppress_health_check": list(hypothesis.HealthCheck),
    }
    if max_examples is not None:
        settings["max_examples"] = max_examples

    def decorate(test: Callable[..., None]) -> Callable[[], None]:
        return hypothesis.settings(**settings)(hypothesis.given(st.data())(test))

    return decorate


def assert_same(got: Any, want: Any) -> None:
    """Equal bit for bit, any NaN for any NaN."""
    wide = np.complex128 if jnp.issubdtype(want.dtype, jnp.complexfloating) else np.float64
    np.testing.assert_array_equal(np.asarray(got).astype(wide), np.asarray(want).astype(wide))


@dataclasses.dataclass
class Program:
    """A drawn program, and the bound of its rounding errors."""

    law: Law
    run: Callable[..., Any]
    x: Any
    others: tuple[Any, ...]

    @staticmethod
    def drawn(draw: Any, law: Law, strategy: Strategy, dtypes: Sequence[Any] = DTYPES) -> "Program":
        """An array of the strategy, and a program of the law for it."""
        shape = draw(st.sampled_from([s for rank in law.ranks for s in SHAPES[rank]]))
        x = draw(strategy(shape, draw(st.sampled_from(dtypes))))
        made = law.draw(draw, x)
        run, others = made if isinstance(made, tuple) else (made, ())
        return Program(law, run, x, tuple(others))

    def check(self, got: Any, want: Any, dense: Any) -> None:
        """Asserts that `got` is what the program has to give on the array `dense`."""
        got = materialize(got)
        assert jtu.tree_structure(got) == jtu.tree_structure(want)
        magnitude = (
            self.run(jnp.abs(dense), *map(jnp.abs, self.others)) if not self.law.exact else want
        )
        for g, w, m in zip(*map(jtu.tree_leaves, (got, want, magnitude)), strict=True):
            assert (g.shape, g.dtype) == (w.shape, w.dtype)
            if self.law.exact or not jnp.issubdtype(w.dtype, jnp.inexact):
                assert_same(g, w)
                continue
            # Each of the summed terms may be rounded: terms x epsilon x sum of magnitudes.
            eps = max(float(jnp.finfo(d).eps) for d in (self.x.dtype, w.dtype))
            g64, w64, m64 = (np.asarray(a).astype(np.float64) for a in (g, w, m))
            fits = np.isfinite(m64) & np.isfinite(w64)  # where nothing overflows on the way
            bound = (self.law.terms(self.x) + 2) * eps * np.abs(m64) + jnp.finfo(w.dtype).tiny
            assert (np.abs(g64[fits] - w64[fits]) <= bound[fits]).all(), (g, w)


# ---------------------------------------------------------------------------------------- modes


def _eager(program: Program) -> None:
    dense = program.x.materialize()
    got = implicit(program.run)(program.x, *program.others)
    program.check(got, program.run(dense, *program.others), dense)


def _jit(program: Program) -> None:
    dense = program.x.materialize()
    got = jax.jit(implicit(program.run))(program.x, *program.others)
    program.check(got, program.run(dense, *program.others), dense)


def _vmap(program: Program) -> None:
    def another(leaf: Any) -> Any:
        return leaf[..., ::-1] if leaf.ndim and leaf.shape[-1] != 1 else leaf

    stacked = jtu.tree_map(lambda leaf: jnp.stack([leaf, another(leaf)]), program.x)
    dense = jax.vmap(lambda x: x.materialize())(stacked)

    def one(x: Any) -> Any:
        return materialize(implicit(program.run)(x, *program.others))

    def one_dense(x: Any) -> Any:
        return program.run(x, *program.others)

    want = list(map(one_dense, dense))
    try:
        mapped = jax.vmap(one)(stacked)
        _, scanned = lax.scan(lambda _, x: (None, one(x)), None, stacked)
        inside = implicit(lambda x: lax.map(one_dense, x))(stacked)
    except NotImplementedError:
        if _can_be_mapped(one_dense, dense):
            raise
        return  # made dense, and of that JAX itself has no vmap
    for i in range(2):
        for got in (mapped, scanned, materialize(inside)):
            program.check(jtu.tree_map(lambda leaf: leaf[i], got), want[i], dense[i])  # noqa: B023


def _can_be_mapped(function: Callable[..., Any], stacked: Any) -> bool:
    try:
        jax.eval_shape(jax.vmap(function), stacked)
    except NotImplementedError:
        return False
    return True


def _grad(program: Program) -> None:
    """Derivatives with respect to the float leaves and the other operands."""
    leaves, treedef = jtu.tree_flatten(program.x)
    values = [*leaves, *program.others]
    moving = [i for i, v in enumerate(values) if jnp.issubdtype(v.dtype, jnp.floating)]

    def loss(evaluate: Any, *moved: Any) -> Any:
        filled = list(values)
        for i, v in zip(moving, moved, strict=True):
            filled[i] = v
        x = jtu.tree_unflatten(treedef, filled[: len(leaves)])
        out = jtu.tree_leaves(materialize(evaluate(x, *filled[len(leaves) :])))
        return sum(
            jnp.sum(jnp.where(jnp.isfinite(y), y, 0) * jnp.cos(jnp.arange(y.size)).reshape(y.shape))
            for y in out
            if jnp.issubdtype(y.dtype, jnp.floating)
        ) + 0.0 * sum(jnp.sum(v) for v in moved)

    def packed(x: Any, *others: Any) -> Any:
        return implicit(program.run)(x, *others)

    def reference(x: Any, *others: Any) -> Any:
        return program.run(x.materialize(), *others)

    arguments = [values[i] for i in moving]
    if not arguments:
        return  # integers alone
    every = tuple(range(len(arguments)))
    packed_loss = jax.jit(jax.value_and_grad(partial(loss, packed), every))
    got = packed_loss(*arguments)[1]
    want = jax.jit(jax.grad(partial(loss, reference), every))(*arguments)
    dense = program.x.materialize()
    # Every partial derivative is a sum of at most `terms` products of these.
    size = (
        max(
            float(jnp.max(jnp.abs(v.astype(jnp.float32))))
            for v in (dense, *leaves, *program.others)
            if v.size
        )
        + 1
    )
    for g, w in zip(got, want, strict=True):
        largest = max(float(jnp.max(jnp.abs(w))), size)
        bound = (4 * dense.size + 8) * float(jnp.finfo(jnp.float32).eps) * largest * size
        assert g.shape == w.shape
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=1e-4, atol=bound)
    if program.law.multilinear:
        _finite_differences(packed_loss, arguments, got)


def _finite_differences(loss: Any, arguments: Sequence[Array], gradient: Sequence[Array]) -> None:
    """The derivative along one direction is that of a polynomial: of degree 4 at most, if the
    function is linear in each argument. So four values give it exactly, however far apart they are."""
    directions = [jnp.sign(jnp.cos(1.0 + jnp.arange(v.size))).reshape(v.shape) for v in arguments]
    weights = {-0.5: 1, -0.25: -8, 0.25: 8, 0.5: -1}
    values = [
        weight * loss(*(v + step * d for v, d in zip(arguments, directions, strict=True)))[0]
        for step, weight in weights.items()
    ]
    terms = [g * d for g, d in zip(gradient, directions, strict=True)]
    magnitude = sum(map(abs, values)) + sum(jnp.sum(jnp.abs(term)) for term in terms)
    np.testing.assert_allclose(
        float(sum(values)) / 3,
        float(sum(map(jnp.sum, terms))),
        rtol=0,
        atol=1e-4 * float(magnitude),
    )
