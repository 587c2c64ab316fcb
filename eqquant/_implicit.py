"""`implicit`: evaluates a function equation by equation, quantized arrays staying packed."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from . import _compat
from ._dispatch import apply, preferring
from ._implicit_array import ImplicitArray, without_views


P = ParamSpec("P")
R = TypeVar("R")


def is_implicit(x: Any) -> bool:
    """Whether `x` is a quantized array (or another implicit one): an `is_leaf` for tree maps.

    !!! example

        ```python
        import jax, jax.numpy as jnp
        import eqquant as eqq

        tree = {"w": eqq.Array8B.quantize(jnp.ones((4, 8))), "b": jnp.ones(4)}
        found = jax.tree.map(eqq.is_implicit, tree, is_leaf=eqq.is_implicit)
        assert found == {"w": True, "b": False}
        ```
    """
    return isinstance(x, ImplicitArray)


class Implicit(eqx.Module, Generic[P, R]):
    """A function, or module, that accepts quantized arrays. Made by
    [`implicit`][eqquant.implicit].

    It has the attributes of a module: its methods, which accept quantized arrays likewise (`implicit(model).decode(x)` is
    `implicit(model.decode)(x)`), and its fields and properties, just as they are.
    """

    wrapped: Callable[P, R]
    """The original function; its own leaves may be quantized too."""
    implementation: str | None = eqx.field(static=True, default=None)
    """The preferred implementation of products."""
    activations: Any = eqx.field(static=True, default=None)
    """How products round what quantized arrays are multiplied with."""

    @property
    def __wrapped__(self) -> Callable[P, R]:
        return self.wrapped

    def __getattr__(self, name: str) -> Any:
        # Only what this class does not have. Copying and pickling ask before there is a `wrapped`, and for special names.
        wrapped = self.__dict__.get("wrapped")
        if name.startswith("__") or not isinstance(wrapped, eqx.Module):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(wrapped, name)
        if getattr(value, "__self__", None) is wrapped:
            return Implicit(value, self.implementation, self.activations)
        return value

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        leaves, treedef = jtu.tree_flatten((self.wrapped, args, kwargs), is_leaf=is_implicit)
        traced = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        results_like: list[Any] = []  # the treedef and the leaves that are no arrays

        def on_logical_arrays(*arrays: Any) -> list[Any]:
            filled = list(leaves)
            for i, array in zip(traced, arrays, strict=True):
                filled[i] = array
            function, args, kwargs = jtu.tree_unflatten(treedef, filled)
            out_leaves, out_treedef = jtu.tree_flatten(function(*args, **kwargs))
            results_like[:] = [out_treedef, [None if _is_array(x) else x for x in out_leaves]]
            return [x for x in out_leaves if _is_array(x)]

        arrays = [leaves[i] for i in traced]
        jaxpr = jax.make_jaxpr(on_logical_arrays)(*map(_logical, arrays))
        with preferring(self.implementation, self.activations):
            results = map(as_array, evaluate(jaxpr, arrays))
        out_treedef, out_leaves = results_like
        return jtu.tree_unflatten(
            out_treedef, [next(results) if leaf is None else leaf for leaf in out_leaves]
        )


def implicit(
    f: Callable[P, R], *, implementation: str | None = None, activations: Any = None
) -> Implicit[P, R]:
    """Makes `f` accept quantized arrays wherever it takes arrays.

    `f` is traced once, with each quantized array appearing as an ordinary traced array of its
    logical shape and dtype; then the trace is evaluated equation by equation, by the
    [rules][eqquant.register] where an operand is quantized. Inside `f`, therefore, `x @ w`,
    `einsum`, `vmap`, `grad`, jaxtyping annotations and all the rest work as they always do.

    **Arguments:**

    - `f`: any function or callable module. Quantized arrays may be among its arguments, at any
        depth, or inside `f` itself.
    - `implementation`: one of those of
        [`quantized_dot_general`][eqquant.kernels.quantized_dot_general], by name. Products go by it
        wherever it computes them, runs on the platform that the program is compiled for, and is no loss
        by what is known; by default, and elsewhere, by the one that serves best.
    - `activations`: how products with quantized arrays of integers round the other operand: `"float"`, `"int8"` or
        [`Int8Blocks`][eqquant.kernels.Int8Blocks], as `quantized_dot_general` has it; by default as each array asks.

    **Returns:** a module that is called as `f` is. It is a pytree that holds `f`:
    `eqx.filter_jit(implicit(model))(x)` passes the weights of `model` as arguments. (With
    `jax.jit(implicit(f))`, weights that `f` captures by closure become constants of the
    compiled program, and XLA may store them unpacked.) It has the methods of `f`, if `f` is a module: they accept
    quantized arrays, too. A result is again a quantized array where
    `f` only rearranged one.

    Arrays are traced, as under `jax.jit`; Python numbers are not.

    **Raises:** `TypeError` if `f` is not callable; when a product is traced, `ValueError` if there is no
    implementation of the name given, or if there are no such activations.

    !!! example

        ```python
        import equinox as eqx, jax, jax.numpy as jnp
        import eqquant as eqq

        model = eqx.nn.MLP(8, 4, 16, 2, key=jax.random.key(0))
        model = eqq.quantize(model, eqq.Array8B.quantize)
        y = eqx.filter_jit(eqq.implicit(model))(jnp.ones(8))
        ```
    """
    if not callable(f):
        raise TypeError(f"implicit() takes a function or a callable module; it was given {f!r}.")
    with warnings.catch_warnings():
        # Equinox doubts `implicit(jax.vmap(model))`, whose weights are captured by closure. That is
        # right here too; where it makes them dense, the warning of that place says so.
        warnings.filterwarnings("ignore", "(?s).*assigning a JAX-transformed callable")
        return Implicit(f, implementation, activations)


def evaluate(jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """The results of a jaxpr (open or closed) on arrays and implicit arrays. Constants are as the jaxpr has them:
    their value is known under tracing, too.

    Equations without an implicit operand are bound just as they are; the others go to
    [`apply`][eqquant._dispatch.apply].
    """
    jaxpr, consts = _compat.open_jaxpr(jaxpr)
    values: dict[Any, Any] = dict(zip(jaxpr.invars, [*consts, *args], strict=True))
    last_use = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if _is_var(var)}
    kept = {var for var in jaxpr.outvars if _is_var(var)}

    def read(atom: Any) -> Any:
        return values[atom] if _is_var(atom) else atom.val

    for i, eqn in enumerate(jaxpr.eqns):
        operands = [read(atom) for atom in eqn.invars]
        with _compat.equation_context(eqn):
            if any(map(is_implicit, operands)):
                results = apply(eqn.primitive, operands, eqn.params)
            else:
                results = _compat.bind(eqn.primitive, operands, eqn.params)
        values.update(zip(eqn.outvars, results, strict=True))
        for var in {v for v in eqn.invars if _is_var(v) and last_use[v] == i} - kept:
            del values[var]
    return [without_views(read(atom)) for atom in jaxpr.outvars]


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, _compat.Literal)


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, ImplicitArray))


def as_array(x: Any) -> Any:
    """A result of `evaluate` as an array: a constant of a jaxpr may be one of NumPy, or a Python number."""
    given = is_implicit(x) or isinstance(x, jax.Array)
    return x if given or getattr(x, "dtype", None) == jax.dtypes.float0 else jnp.asarray(x)


def _logical(x: Any) -> Any:
    """What the traced function sees of `x`."""
    if not isinstance(x, ImplicitArray):
        return x
    aval = _compat.logical_aval(jtu.tree_leaves(x)[0], x.shape, x.dtype)
    return _compat.as_struct(aval)
