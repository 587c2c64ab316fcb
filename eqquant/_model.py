"""Models in, models out: quantize the weights of any pytree, by path."""

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer

from ._array import QuantizedArray
from ._implicit import is_implicit
from ._implicit_array import as_dense
from ._uses import is_matrix_shape, used_as_weights


Tree = TypeVar("Tree")
Quantizer = Callable[[Any], QuantizedArray | jax.Array]
"""A function from an array to a quantized array, such as `Array8B.quantize`; or, in training, to the dense
array of its values, such as `fake_quantize(Array8B.quantize)`."""
How = Quantizer | Mapping[str, Quantizer | None]
"""One quantizer for all matrices; or quantizers by pattern of path, None to leave dense."""


def quantize(
    tree: Tree,
    how: How,
    *,
    inputs: Sequence[Any] | None = None,
    call: Callable[..., Any] | None = None,
) -> Tree:
    """`tree` with its weights quantized.

    With `inputs`, weights are what a call of the model uses as such: the operands of its products, and the tables that it
    looks rows up in. Without, they are all floating-point matrices, among them what is none: the norms and biases of
    stacked layers, masks, tables of positions. [`plan`][eqquant.plan] notes what looks like that.

    **Arguments:**

    - `tree`: an array, or any pytree: an Equinox model, a dictionary of weights, … With `jax.ShapeDtypeStruct`s in
        place of arrays (as `eqx.filter_eval_shape` makes them) the result has them, too: a skeleton to load into.
    - `how`: a format, such as `Array8B.quantize`, for every floating-point matrix (two axes or
        more, not counting axes of length 1) of the tree; or a mapping from patterns to formats. A pattern is matched, with
        `*`, `?` and `[...]` as in file names, against the path of a matrix, such as
        `layers.0.attention.query_proj.weight` (a leading `*.` also matches at the root). The first pattern
        that matches wins; the format None leaves a matrix dense, and so does no match. A path
        written out in full names any floating-point array, vectors included.
    - `inputs`: a tuple of arguments of the model, or of `jax.ShapeDtypeStruct`s like them. `tree(*inputs)` is traced, computing
        nothing, and of the matrices only those are quantized that are operands of `dot_general`, convolutions or `ragged_dot`, or from
        which rows are looked up, as in an embedding. Scales of norms, biases, masks, and tables that are only multiplied
        or added stay dense.
    - `call`: what to trace instead: `call(tree, *inputs)`, for a tree that is no function, or another method, or under `vmap`.

    **Returns:** a tree of the same structure. Vectors, integers, functions, numbers of 8 bits or fewer, and whatever
    is quantized already stay as they are; arrays that occur twice (tied weights) are quantized once.

    **Raises:** `ValueError` if a pattern matches no matrix (it lists the nearest paths), if a weight holds NaN or infinity, or if
    nothing of the tree is used as a weight in the call.

    !!! example

        ```python
        from functools import partial
        import equinox as eqx, jax
        import eqquant as eqq

        model = eqx.nn.MLP(8, 4, 16, 2, key=jax.random.key(0))
        small = eqq.quantize(model, eqq.Array8B.quantize)
        mixed = eqq.quantize(model, {
            "layers.0.*": None,
            "*.weight": partial(eqq.Array8B.quantize, axis=0),
        })

        def layer(tree, x):
            return tree["scale"] * (x @ tree["w"])

        tree = {"w": jax.numpy.ones((8, 4)), "scale": jax.numpy.ones((2, 4))}
        some = eqq.quantize(tree, eqq.Array8B.quantize, inputs=(jax.numpy.ones((2, 8)),), call=layer)
        assert isinstance(some["w"], eqq.Array8B) and some["scale"] is tree["scale"]
        ```
    """
    return quantize_among(tree, how, weights_in_call(tree, inputs, call))


def quantize_among(tree: Tree, how: How, weights: set[str] | None) -> Tree:
    """As `quantize`, if the paths of what is used as weights are known already."""
    quantizers = _formats_by_path(tree, how, weights)
    done: dict[Any, QuantizedArray | jax.Array] = {}

    def convert(path: Any, leaf: Any) -> Any:
        quantizer = quantizers.get(path_name(path))
        if quantizer is None:
            return leaf
        key = (identity(leaf), _identity_of_function(quantizer))
        if key not in done:
            done[key] = _apply_format(quantizer, leaf, path_name(path))
        return done[key]

    return jtu.tree_map_with_path(convert, tree, is_leaf=is_implicit)


def materialize(tree: Tree) -> Tree:
    """`tree` with every quantized array made dense; one that occurs twice (tied weights) is made dense once.

    !!! example

        ```python
        import equinox as eqx, jax
        import eqquant as eqq

        model = eqx.nn.Linear(8, 4, key=jax.random.key(0))
        dense = eqq.materialize(eqq.quantize(model, eqq.Array8B.quantize))
        assert isinstance(dense.weight, jax.Array)
        ```
    """
    return map_arrays(as_dense, tree)


def identity(x: Any) -> Any:
    """Equal for what occurs twice in a tree: for one array, and for quantized arrays of the same stored arrays
    (those that occur twice are two objects after a `tree_map`)."""
    if not is_implicit(x):
        return id(x)
    leaves, treedef = jtu.tree_flatten(x)
    return treedef, *map(id, leaves)


def _identity_of_function(function: Any) -> Any:
    """Equal for one method that was looked up twice: that makes two objects."""
    owner, method = getattr(function, "__self__", None), getattr(function, "__func__", None)
    return id(function) if method is None else (id(owner), id(method))


def map_arrays(function: Callable[[Any], Any], tree: Any) -> Any:
    """The function of each array, dense or quantized, and of all other leaves. What occurs twice is mapped once, so
    that tied weights stay tied."""
    done: dict[Any, Any] = {}

    def once(x: Any) -> Any:
        key = identity(x)
        if key not in done:
            done[key] = function(x)
        return done[key]

    return jtu.tree_map(once, tree, is_leaf=is_implicit)


def path_name(path: Any) -> str:
    """A key path as users write it: `layers.0.weight`."""
    return jtu.keystr(path, simple=True, separator=".")


def _apply_format(quantizer: Quantizer, leaf: Any, path: str) -> QuantizedArray | jax.Array:
    try:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return eqx.filter_eval_shape(quantizer, leaf)
        return quantizer(leaf)
    except (TypeError, ValueError) as error:
        if path and isinstance(error, ValueError) and (where := _not_finite(leaf)):
            raise ValueError(
                f"{path!r} {where}, and only finite numbers can be quantized. If it is no weight but a mask, say, leave it "
                f"out: pass inputs=(...), the arguments of a call, so that only weights are quantized; or "
                f"{{{path!r}: None, '*': ...}} as how. If it is one, it has to be mended first."
            ) from error
        if path:
            error.add_note(f"while quantizing {path!r}")
        raise


def _not_finite(x: Any) -> str:
    """Where an array holds NaN or infinity first, in words; nothing if it does not, or under tracing."""
    if isinstance(x, (Tracer, jax.ShapeDtypeStruct)) or not is_float_array(x):
        return ""
    bad = np.argwhere(~np.asarray(jnp.isfinite(x)))
    if not len(bad):
        return ""
    index = tuple(map(int, bad[0]))
    return f"holds {x[index]} at [{', '.join(map(str, index))}] ({len(bad)} such elements)"


def weights_in_call(tree: Any, inputs: Any, call: Any) -> set[str] | None:
    """The paths of what a call uses as weights (see `quantize`); None if there is no call to look at.

    **Raises:** `ValueError` if it uses nothing so.
    """
    if inputs is None and call is None:
        return None
    if inputs is not None and not isinstance(inputs, (tuple, list)):
        raise TypeError(
            f"inputs must be a tuple of the arguments of a call, e.g. inputs=(x,); it is {inputs!r}."
        )
    if call is not None and not callable(call):
        raise TypeError(f"call must be a function of the tree and the inputs; it is {call!r}.")
    if call is None and not callable(tree):
        raise TypeError(
            f"inputs=... traces tree(*inputs), and a {type(tree).__name__} cannot be called. Say how it is used, e.g. "
            "call=lambda tree, x: f(tree, x)."
        )
    given = inputs or ()
    try:
        uses = used_as_weights(call or _called, tree, given)
    except Exception as error:
        error.add_note(
            "while tracing call(tree, *inputs), or tree(*inputs), to find out which arrays are weights"
        )
        raise
    leaves = jtu.tree_leaves_with_path(tree, is_leaf=is_implicit)
    same = {identity(leaf) for (_, leaf), used in zip(leaves, uses, strict=True) if used}
    if not same and any(is_matrix(leaf) for _, leaf in leaves):
        raise ValueError(
            "The call multiplies by no array of the tree, and looks up rows in none, so nothing would be quantized: were "
            "they captured by the function in place of being passed to it? call(tree, *inputs) has to use the tree that it is given."
        )
    return {path_name(path) for path, leaf in leaves if identity(leaf) in same}


def _called(tree: Any, *inputs: Any) -> Any:
    return tree(*inputs)


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def is_matrix(x: Any) -> bool:
    """Whether `x` has floating-point numbers along two axes, of more than the 8 bits that they could be quantized to:
    the bias of a convolution, of shape (out, 1, 1), is a vector."""
    return is_float_array(x) and x.dtype.itemsize > 1 and is_matrix_shape(x.shape)


def is_float_array(x: Any) -> bool:
    return _is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)


def _formats_by_path(tree: Any, how: How, weights: set[str] | None) -> dict[str, Quantizer]:
    """The quantizer of each matrix, by path; those that stay dense are left out. Patterns choose among `weights`, if
    these are known."""
    if not isinstance(how, Mapping):
        if not callable(how):
            raise TypeError(
                "how must be a format, e.g. eqquant.Array8B.quantize, or a mapping from patterns "
                f"to formats; quantize(..., how={how!r})."
            )
        if _is_array(tree) and weights is None:
            return {"": how}
        how = {"*": how}
        every_pattern_must_match = False
    else:
        every_pattern_must_match = True
    leaves = [
        (path_name(path), leaf)
        for path, leaf in jtu.tree_leaves_with_path(tree, is_leaf=is_implicit)
    ]
    matrices = [name for name, leaf in leaves if is_matrix(leaf)]
    chosen: dict[str, Quantizer | None] = {}
    patterns: Mapping[str, Quantizer | None] = how
    for pattern, quantizer in patterns.items():
        if quantizer is not None and not callable(quantizer):
            raise TypeError(
                f"The format for {pattern!r} must be a function such as eqquant.Array8B.quantize, "
                f"or None; it is {quantizer!r}."
            )
        matches = [name for name, leaf in leaves if name == pattern and is_float_array(leaf)]
        found, among = [name for name in matrices if _matches(pattern, name)], matrices
        if weights is not None and quantizer is not None:
            among = [name for name in matrices if name in weights]
        matches = matches or [name for name in found if name in among]
        if not matches and every_pattern_must_match:
            raise ValueError(_no_match(pattern, among, leaves, unused=bool(found)))
        for name in matches:
            chosen.setdefault(name, quantizer)
    return {name: quantizer for name, quantizer in chosen.items() if quantizer is not None}


def matching_paths(tree: Any, pattern: str) -> list[str]:
    """The paths of matrices, dense or quantized, that a pattern matches.

    **Raises:** `ValueError` if there are none; it lists the nearest paths.
    """
    leaves = [
        (path_name(path), leaf)
        for path, leaf in jtu.tree_leaves_with_path(tree, is_leaf=is_implicit)
    ]
    matrices = [
        name
        for name, leaf in leaves
        if is_matrix(leaf) or (is_implicit(leaf) and len(leaf.shape) >= 2)
    ]
    matches = [name for name in matrices if _matches(pattern, name)]
    if not matches:
        raise ValueError(_no_match(pattern, matrices, leaves))
    return matches


def _matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase("." + name, pattern)


def _no_match(
    pattern: str, matrices: list[str], leaves: list[tuple[str, Any]], unused: bool = False
) -> str:
    which = "that the call uses as a weight" if unused else "of the tree"
    message = f"The pattern {pattern!r} matches no floating-point matrix {which}."
    others = [name for name, leaf in leaves if _matches(pattern, name) and _is_array(leaf)]
    if others:
        x = dict(leaves)[others[0]]
        here = f"{message} It matches {others[0]!r}, which is {x.dtype}{list(x.shape)}"
        return (
            f"{here}; write its path in full to quantize it." if is_float_array(x) else f"{here}."
        )
    if not matrices:
        return f"{message} The tree has none."
    near = difflib.get_close_matches(pattern.strip("*."), matrices, n=3, cutoff=0.0)
    return f"{message} The nearest of {len(matrices)} paths: {', '.join(map(repr, near))}."
