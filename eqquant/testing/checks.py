"""What it means that a law holds: for one format, in one mode."""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
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
    law: Law | str,
    strategy: Strategy,
    mode: Mode = "eager",
    *,
    max_examples: int | None = None,
    simplest: bool = True,
) -> int:
    """Checks that a law holds for the arrays of a strategy: hypothesis draws array and program.

    **Arguments:**

    - `law`: one of [`LAWS`][eqquant.testing.LAWS], or its name.
    - `strategy`: a function of shape and dtype, which gives the hypothesis strategy of arrays.
    - `mode`: how the program is run: eagerly, under `jit`, over stacked arrays by `vmap` and `scan`, or
        differentiated.
    - `max_examples`: how many programs are drawn; by default what the hypothesis profile says.
    - `simplest`: whether the first program is the simplest one, of the smallest array, as usual in hypothesis. Most
        do nothing then. Without, all programs are random.

    **Returns:** how many of the programs made nothing dense, as far as the mode can tell: a law that
    never keeps an array packed tests no rule.

    **Raises:** `AssertionError` where a program disagrees with itself on the materialized array: it says
    which element of which result is off, and how far. A note to it, or to whatever a program raises, names
    law, mode, array and program.
    """
    law = LAWS[law] if isinstance(law, str) else law
    check = {"eager": _eager, "jit": _jit, "vmap": _vmap, "grad": _grad}[mode]

    kept_packed = 0

    @_given(max_examples, simplest, law.name, mode, strategy)
    def holds(data: st.DataObject) -> None:
        nonlocal kept_packed
        program = Program.drawn(
            data.draw, law, strategy, [jnp.float32] if mode == "grad" else DTYPES
        )
        with program.named_in_errors(mode), recording() as records:
            check(program)
        kept_packed += not any(record.densified for record in records)

    holds()
    return kept_packed


def check_dense_answer(
    primitive: str,
    strategy: Strategy,
    *,
    max_examples: int | None = None,
    simplest: bool = True,
) -> None:
    """Checks that a primitive without a packed form gives the dense answer, and that the audit says so.

    **Arguments:**

    - `primitive`: one of [`DENSE_PROGRAMS`][eqquant.testing.DENSE_PROGRAMS].
    - `strategy`, `max_examples`, `simplest`: as for [`check_law`][eqquant.testing.check_law].
    """

    @_given(max_examples, simplest, primitive, strategy)
    def holds(data: st.DataObject) -> None:
        x = data.draw(strategy((4, 6), jnp.float32))
        run = DENSE_PROGRAMS[primitive]
        with _named_in_errors(f"dense answer: {primitive}", run, x):
            with recording() as records:
                got = materialize(implicit(run)(x))
            want = run(x.materialize())
            for g, (where, w) in zip(jtu.tree_leaves(got), _results(want), strict=True):
                _assert_close(g, w, 0, where)
            assert any(record.densified for record in records), "no audit line says `dense`"

    holds()


def _given(
    max_examples: int | None, simplest: bool, *what: str | Strategy
) -> Callable[[Callable[..., None]], Callable[[], None]]:
    # The first example of each shape compiles: no deadline, and slow draws are in order.
    settings: dict[str, Any] = {
        "deadline": None,
        "suppress_health_check": list(hypothesis.HealthCheck),
    }
    if max_examples is not None:
        settings["max_examples"] = max_examples

    def decorate(test: Callable[..., None]) -> Callable[[], None]:
        if not simplest:
            test = _of_random_programs(test)
        if hypothesis.settings().derandomize:  # else all laws would draw the same numbers
            names = [each if isinstance(each, str) else _name(each) for each in what]
            test = hypothesis.seed(zlib.crc32(" ".join(names).encode()))(test)
        return hypothesis.settings(**settings)(hypothesis.given(st.data())(test))

    return decorate


def _of_random_programs(test: Callable[..., None]) -> Callable[..., None]:
    """Hypothesis begins with all zeros, and where these are refused, goes on with random numbers."""

    @wraps(test)
    def of_random_programs(data: st.DataObject) -> None:
        hypothesis.assume(data.draw(st.integers(0, 2**16)))
        test(data)

    return of_random_programs


def _name(strategy: Strategy) -> str:
    return getattr(strategy, "__name__", "")


def assert_same(got: Any, want: Any) -> None:
    """Equal bit for bit, any NaN for any NaN."""
    _assert_close(got, want, 0, "result")


def _assert_close(got: Any, want: Any, bound: Any, where: str) -> None:
    """Asserts that every element differs by `bound` at most, or is NaN where NaN is wanted. Where `bound`
    is NaN, any number will do."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), (
        f"{where}: got {got.dtype}{list(got.shape)}, want {want.dtype}{list(want.shape)}"
    )
    wide = np.complex128 if jnp.issubdtype(want.dtype, jnp.complexfloating) else np.float64
    g, w = (np.asarray(a).astype(wide) for a in (got, want))
    with np.errstate(invalid="ignore"):
        error, bound = np.abs(g - w), np.broadcast_to(bound, w.shape)
        same = (g == w) | (np.isnan(g) & np.isnan(w)) | np.isnan(bound)
        off = ~(same | (error <= bound))
    if off.any():
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.nan_to_num(error / bound, nan=np.inf)
        at = np.unravel_index(np.argmax(np.where(off, ratio, -1)), w.shape)
        raise AssertionError(
            f"{where}, {want.dtype}{list(want.shape)}: {off.sum()} of {off.size} elements are off. "
            f"The worst, {list(map(int, at))}: got {g[at]:.9g}, want {w[at]:.9g}, "
            + (f"to {bound[at]:.3g}." if bound[at] else "bit for bit.")
        )


def _results(tree: Any) -> list[tuple[str, Any]]:
    """The arrays of a result, with what they are called."""
    return [(f"result{jtu.keystr(path)}", leaf) for path, leaf in jtu.tree_leaves_with_path(tree)]


@contextlib.contextmanager
def _named_in_errors(what: str, run: Callable[..., Any], x: Any, *others: Any) -> Iterator[None]:
    """Adds to every error what is checked: `what`, the array, and the program as a jaxpr."""
    try:
        yield
    except Exception as error:
        logical = jax.ShapeDtypeStruct(x.shape, x.dtype)
        try:
            program = str(jax.make_jaxpr(run)(logical, *others))
        except Exception as untraced:  # what is wrong may be the program itself
            program = f"which JAX cannot trace: {untraced}"
        error.add_note(f"{what}\narray: {type(x).__name__}, {x!r}\nprogram: {program}")
        raise


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

    def named_in_errors(self, mode: str) -> contextlib.AbstractContextManager[None]:
        """Adds law, mode, array and program to whatever is raised inside."""
        primitives = ", ".join(self.law.primitives)
        what = f"law: {self.law.name} ({primitives})\nmode: {mode}"
        return _named_in_errors(what, self.run, self.x, *self.others)

    def check(self, got: Any, want: Any, dense: Any, where: str = "") -> None:
        """Asserts that `got`, found as `where` says, is what the program has to give on the array `dense`."""
        got = materialize(got)
        found, wanted = jtu.tree_structure(got), jtu.tree_structure(want)
        assert found == wanted, f"{where}results: got {found}, want {wanted}"
        magnitude = (
            self.run(jnp.abs(dense), *map(jnp.abs, self.others)) if not self.law.exact else want
        )
        for g, (name, w), m in zip(
            jtu.tree_leaves(got), _results(want), jtu.tree_leaves(magnitude), strict=True
        ):
            bound = 0.0
            if not self.law.exact and jnp.issubdtype(w.dtype, jnp.inexact):
                # Each of the summed terms may be rounded: terms x epsilon x sum of magnitudes.
                eps = max(float(jnp.finfo(d).eps) for d in (self.x.dtype, w.dtype))
                w64, m64 = (np.asarray(a).astype(np.float64) for a in (w, m))
                bound = (self.law.terms(self.x) + 2) * eps * np.abs(m64) + jnp.finfo(w.dtype).tiny
                fits = np.isfinite(m64) & np.isfinite(w64)  # where nothing overflows on the way
                bound = np.where(fits, bound, np.nan)
            _assert_close(g, w, bound, where + name)


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
    found = {"vmap": mapped, "scan": scanned, "map inside implicit": materialize(inside)}
    for i in range(2):
        for name, got in found.items():
            where = f"{name}, array {i} of the stack, "
            program.check(jtu.tree_map(lambda leaf: leaf[i], got), want[i], dense[i], where)  # noqa: B023


def _can_be_mapped(function: Callable[..., Any], stacked: Any) -> bool:
    try:
        jax.eval_shape(jax.vmap(function), stacked)
    except NotImplementedError:
        return False
    return True


def _grad(program: Program) -> None:
    """Derivatives with respect to the float leaves and the other operands."""
    paths, treedef = jtu.tree_flatten_with_path(program.x)
    leaves = [leaf for _, leaf in paths]
    values = [*leaves, *program.others]
    names = [jtu.keystr(path, simple=True, separator=".") for path, _ in paths]
    names += [f"operand {i}" for i in range(1, len(program.others) + 1)]
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
    for i, g, w in zip(moving, got, want, strict=True):
        largest = max(float(jnp.max(jnp.abs(w))), size)
        bound = (4 * dense.size + 8) * float(jnp.finfo(jnp.float32).eps) * largest * size
        bound = bound + 1e-4 * np.abs(np.asarray(w, np.float64))
        _assert_close(g, w, bound, f"derivative with respect to {names[i]}")
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
    by_differences = np.float64(sum(values)) / 3
    along = np.float64(sum(map(jnp.sum, terms)))
    where = "derivative along one direction, next to finite differences"
    _assert_close(along, by_differences, 1e-4 * float(magnitude), where)
