"""Models in, models out: quantize the weights of any pytree, by path."""

import difflib
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ._array import QuantizedArray
from ._implicit import is_implicit
from ._implicit_array import as_dense


Tree = TypeVar("Tree")
Quantizer = Callable[[Any], QuantizedArray | jax.Array]
"""A function from an array to a quantized array, such as `Array8B.quantize`; or, in training, to the dense
array of its values, such as `fake_quantize(Array8B.quantize)`."""
How = Quantizer | Mapping[str, Quantizer | None]
"""One quantizer for all matrices; or quantizers by pattern of path, None to leave dense."""


def quantize(tree: Tree, how: How) -> Tree:
    """`tree` with its weights quantized.

    **Arguments:**

    - `tree`: an array, or any pytree: an Equinox model, a dictionary of weights, … With `jax.ShapeDtypeStruct`s in
        place of arrays (as `eqx.filter_eval_shape` makes them) the result has them, too: a skeleton to load into.
    - `how`: a format, such as `Array8B.quantize`, for every floating-point matrix (two axes or
        more, not counting axes of length 1) of the tree; or a mapping from patterns to formats. A pattern is matched, with
        `*`, `?` and `[...]` as in file names, against the path of a matrix, such as
        `layers.0.attention.query_proj.weight` (a leading `*.` also matches at the root). The first pattern
        that matches wins; the format None leaves a matrix dense, and so does no match. A path
        written out in full names any floating-point array, vectors included.

    **Returns:** a tree of the same structure. Vectors, integers, functions, numbers of 8 bits or fewer, and whatever
    is quantized already stay as they are; arrays that occur twice (tied weights) are quantized once.

    **Raises:** `ValueError` if a pattern matches no matrix; it lists the nearest paths.

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
        ```
    """
    quantizers = _formats_by_path(tree, how)
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
        if path:
            error.add_note(f"while quantizing {path!r}")
        raise


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _is_matrix(x: Any) -> bool:
    """Whether `x` has floating-point numbers along two axes, of more than the 8 bits that they could be quantized to:
    the bias of a convolution, of shape (out, 1, 1), is a vector."""
    wide = is_float_array(x) and x.dtype.itemsize > 1
    return wide and sum(n != 1 for n in x.shape) >= 2


def is_float_array(x: Any) -> bool:
    return _is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)


def _formats_by_path(tree: Any, how: How) -> dict[str, Quantizer]:
    """The quantizer of each matrix, by path; those that stay dense are left out."""
    if not isinstance(how, Mapping):
        if not callable(how):
            raise TypeError(
                "how must be a format, e.g. eqquant.Array8B.quantize, or a mapping from patterns "
                f"to formats; quantize(..., how={how!r})."
            )
        if _is_array(tree):
            return {"": how}
        how = {"*": how}
        every_pattern_must_match = False
    else:
        every_pattern_must_match = True
    leaves = [
        (path_name(path), leaf)
        for path, leaf in jtu.tree_leaves_with_path(tree, is_leaf=is_implicit)
    ]
    matrices = [name for name, leaf in leaves if _is_matrix(leaf)]
    chosen: dict[str, Quantizer | None] = {}
    patterns: Mapping[str, Quantizer | None] = how
    for pattern, quantizer in patterns.items():
        if quantizer is not None and not callable(quantizer):
            raise TypeError(
                f"The format for {pattern!r} must be a function such as eqquant.Array8B.quantize, "
                f"or None; it is {quantizer!r}."
            )
        matches = [name for name, leaf in leaves if name == pattern and is_float_array(leaf)]
        matches = matches or [name for name in matrices if _matches(pattern, name)]
        if not matches and every_pattern_must_match:
            raise ValueError(_no_match(pattern, matrices, leaves))
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
        if _is_matrix(leaf) or (is_implicit(leaf) and len(leaf.shape) >= 2)
    ]
    matches = [name for name in matrices if _matches(pattern, name)]
    if not matches:
        raise ValueError(_no_match(pattern, matrices, leaves))
    return matches


def _matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase("." + name, pattern)


def _no_match(pattern: str, matrices: list[str], leaves: list[tuple[str, Any]]) -> str:
    message = f"The pattern {pattern!r} matches no floating-point matrix of the tree."
    others = [name for name, leaf in leaves if _matches(pattern, name) and _is_array(leaf)]
    if others:
        return f"{message} It matches {others[0]!r}, which is not one; write its path in full to quantize it."
    if not matrices:
        return f"{message} The tree has none."
    near = difflib.get_close_matches(pattern.strip("*."), matrices, n=3, cutoff=0.0)
    return f"{message} The nearest of {len(matrices)} paths: {', '.join(map(repr, near))}."
