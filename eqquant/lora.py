"""Low-rank adapters over dense or quantized weights ([LoRA](https://arxiv.org/abs/2106.09685))."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PRNGKeyArray

from ._adapted import AdaptedArray as AdaptedArray
from ._implicit import is_implicit
from ._model import identity, map_arrays, matching_paths, path_name, quantize
from ._report import Report, report


Tree = TypeVar("Tree")


# ------------------------------------------------------------------------------ models in and out


def add(
    model: Tree,
    paths: str | Sequence[str] = "*",
    *,
    key: PRNGKeyArray,
    rank: int = 8,
    alpha: float | int = 16,
    rank_stabilized: bool = False,
    dropout: float | int = 0.0,
    dtype: Any = jnp.float32,
    window_axes: int | Mapping[str, int] | None = None,
) -> Tree:
    r"""`model` with adapters on its weights. At first it computes exactly what it did before.

    **Arguments:**

    - `model`: any pytree; its weights may be quantized.
    - `paths`: which weights get adapters: a pattern, or several, as in
        [`quantize`][eqquant.quantize]. By default all matrices.
    - `key`: for the first factor, which is uniform between $\pm 1 / \sqrt{n}$, with the $n$ elements of a row.
    - `rank`: the number of rows of $A$ and columns of $B$.
    - `alpha`: the adapter is scaled by `alpha / rank`, or by `alpha / sqrt(rank)` if `rank_stabilized`
        ([rsLoRA](https://arxiv.org/abs/2312.03732)).
    - `dropout`: the share of inputs that [`lora.dropout`][eqquant.lora.dropout] hides from the adapters.
    - `dtype`: of the adapters.
    - `window_axes`: how many of the last axes of a weight are the window of a convolution, whose kernel is (..., out, in,
        *window): 0 for a matrix, and for a stack of matrices. The layers of `eqx.nn` say it themselves, also where they
        are stacked, and a weight of two axes is a matrix. For any other it has to be said here: by a number, or by a
        mapping from patterns to numbers; the first pattern that matches wins.

    **Returns:** a model in which an [`AdaptedArray`][eqquant.lora.AdaptedArray] stands for each of these
    weights. Weights that occur twice share an adapter. That of a kernel is one of the matrix (out, in · window), not one for
    each point of the window.

    **Raises:** `ValueError` if a pattern matches nothing (it lists the nearest paths), or an argument is
    out of range: `rank` is if it is above both sides of a weight; if a weight has three axes or more, and neither its layer nor
    `window_axes` says what they are; or if the two say different things.

    !!! example

        ```python
        import equinox as eqx, jax, jax.numpy as jnp
        import eqquant as eqq

        model = eqx.nn.MLP(8, 4, 16, 2, key=jax.random.key(0))
        base = eqq.quantize(model, eqq.ArrayNF4.quantize)
        adapted = eqq.lora.add(base, "layers.*.weight", rank=2, key=jax.random.key(1))
        x = jnp.ones(8)
        assert (adapted(x) == base(x)).all()
        trained, frozen = eqx.partition(adapted, eqq.lora.adapters(adapted))
        ```
    """
    if rank < 1:
        raise ValueError(f"rank must be positive; lora.add(..., rank={rank}) was given {rank}.")
    if not 0 <= dropout < 1:
        raise ValueError(
            f"dropout must be at least 0 and below 1; lora.add(..., dropout={dropout}) was given {dropout}."
        )
    scale = float(alpha / (rank**0.5 if rank_stabilized else rank))
    patterns = [paths] if isinstance(paths, str) else list(paths)
    chosen = {name for pattern in patterns for name in matching_paths(model, pattern)}
    windows = _windows(model, chosen, window_axes)
    done: dict[Any, AdaptedArray] = {}

    def adapt(path: Any, weight: Any) -> Any:
        name = path_name(path)
        if name not in chosen or isinstance(weight, AdaptedArray):
            return weight
        tie = identity(weight)
        if tie not in done:
            window = windows[name]
            first = len(weight.shape) - 2 - window
            (*batch, out), inner = weight.shape[: first + 1], weight.shape[first + 1 :]
            length = math.prod(inner)
            if rank > max(out, length):
                raise ValueError(
                    f"rank must not be above both sides of a weight; lora.add(..., rank={rank}) was given {rank}, and "
                    f"{name!r} has the shape {tuple(weight.shape)}{_sides(out, length) if window else ''}. Choose a smaller "
                    "one, or leave this weight out of paths."
                )
            own = jax.random.fold_in(key, len(done))
            bound = length**-0.5
            a = jax.random.uniform(own, (*batch, rank, *inner), dtype, -bound, bound)
            b = jnp.zeros((*batch, out, rank), dtype)
            done[tie] = AdaptedArray(weight, a, b, scale, float(dropout), window_axes=window)  # pyright: ignore
        return done[tie]

    return jtu.tree_map_with_path(adapt, model, is_leaf=is_implicit)


def _sides(out: int, length: int) -> str:
    return f", as a matrix ({out}, {length})"


_LAYERS = (
    eqx.nn.Conv,
    eqx.nn.ConvTranspose,
    eqx.nn.Embedding,
    eqx.nn.GRUCell,
    eqx.nn.Linear,
    eqx.nn.LSTMCell,
)
"""The layers whose weights are known to be matrices, or kernels of as many axes as `num_spatial_dims` says."""


def _windows(
    model: Any, chosen: set[str], window_axes: int | Mapping[str, int] | None
) -> dict[str, int]:
    """How many axes the window has of each weight that is chosen, by path."""
    weights = {
        path_name(path): tuple(weight.shape)
        for path, weight in jtu.tree_leaves_with_path(model, is_leaf=is_implicit)
        if path_name(path) in chosen and not isinstance(weight, AdaptedArray)
    }
    of_layers = _windows_of_layers(model)
    known = {name: 0 for name, shape in weights.items() if len(shape) == 2} | of_layers
    said: dict[str, int] = {}
    if isinstance(window_axes, Mapping):
        for pattern, count in window_axes.items():
            for name in matching_paths(model, pattern):
                said.setdefault(name, count)
    elif window_axes is not None:
        said = dict.fromkeys(weights.keys() - known.keys(), window_axes)
    windows = known | said
    for name, shape in weights.items():
        if (count := windows.get(name)) is None:
            raise ValueError(
                f"{name!r} has the shape {shape}, and lora.add cannot see whether it is a stack of matrices (out, in) or the "
                "kernel (out, in, *window) of a convolution: it is in no layer of eqx.nn. Say it with window_axes=0 for "
                f"matrices, or with the number of axes of the window; by pattern, as window_axes={{{name!r}: 0}}, where "
                "weights differ."
            )
        if not 0 <= count <= len(shape) - 2:
            raise ValueError(
                f"window_axes must leave two axes, out and in; lora.add(..., window_axes={window_axes!r}) gives {count} for "
                f"{name!r} of shape {shape}."
            )
        if name in of_layers and count != of_layers[name]:
            raise ValueError(
                f"The layer of {name!r} has a window of {of_layers[name]} axes; lora.add(..., window_axes={window_axes!r}) says "
                f"{count}. Leave it out there."
            )
    return windows


def _windows_of_layers(tree: Any, prefix: tuple[Any, ...] = ()) -> dict[str, int]:
    """The axes of the window, by path, of all weights in layers of `eqx.nn`."""

    def stops(x: Any) -> bool:
        return is_implicit(x) or (isinstance(x, _LAYERS) and x is not tree)

    known, count = {}, getattr(tree, "num_spatial_dims", 0)
    for path, x in jtu.tree_leaves_with_path(tree, is_leaf=stops):
        path = (*prefix, *path)
        if isinstance(x, _LAYERS):
            known |= _windows_of_layers(x, path)
        elif isinstance(tree, _LAYERS):
            known[path_name(path)] = count
    return known


def adapters(model: Any) -> Any:
    """Which leaves of a model belong to adapters: a filter for `eqx.partition` and `eqx.filter`.

    Train these alone, and save these alone: `eqx.filter(model, lora.adapters(model))` has nothing else;
    `eqx.combine` puts them back over the base.
    """

    def mark(x: Any) -> Any:
        if not isinstance(x, AdaptedArray):
            return jtu.tree_map(lambda _: False, x)
        return jtu.tree_map_with_path(
            lambda path, _: jtu.keystr(path[:1], simple=True) in x.trained, x
        )

    return jtu.tree_map(mark, model, is_leaf=is_implicit)


def base(model: Tree) -> Tree:
    """`model` without its adapters, as it was before [`lora.add`][eqquant.lora.add]."""
    return map_arrays(lambda x: x.base if isinstance(x, AdaptedArray) else x, model)


def dropout(model: Tree, key: PRNGKeyArray) -> Tree:
    """`model` for one step of training: each adapter does not see some of its inputs, chosen by `key`,
    and the others larger, so that the mean is kept.

    Inputs of one call are hidden from all its tokens alike; give each example its key under `vmap` to
    have them differ. Of a convolution, whole channels are hidden.
    """
    count = iter(range(10**9))

    def drop(x: Any) -> Any:
        if not isinstance(x, AdaptedArray) or not x.dropout_rate:
            return x
        kept = 1 - x.dropout_rate
        first = x.out_axis
        shape = (*x.a.shape[:first], 1, x.a.shape[first + 1], *[1] * x.window_axes)
        mask = jax.random.bernoulli(jax.random.fold_in(key, next(count)), kept, shape)
        return x.replace(a=jnp.where(mask, x.a / kept, 0))

    return map_arrays(drop, model)


def merge(model: Tree, how: Any = None) -> tuple[Tree, Report]:
    """`model` with its adapters folded into dense weights, and a report of what that changed.

    **Arguments:**

    - `model`: a model with adapters.
    - `how`: if given, the merged weights are quantized again: a format, or a mapping from patterns
        to formats that applies to these weights.

    **Returns:** the model without adapters, and the [`Report`][eqquant.Report] that compares each merged
    weight with $W + \\alpha B A$: its error is that of quantizing again.

    !!! example

        ```python
        import equinox as eqx, jax
        import eqquant as eqq

        model = eqq.quantize(eqx.nn.Linear(64, 4, key=jax.random.key(0)), eqq.ArrayNF4.quantize)
        model = eqq.lora.add(model, rank=2, key=jax.random.key(1))
        merged, errors = eqq.lora.merge(model, eqq.ArrayNF4.quantize)
        assert isinstance(merged.weight, eqq.ArrayNF4) and errors.rows[0].path == "weight"
        ```
    """

    def only_adapted(x: Any) -> Any:
        return x.materialize() if isinstance(x, AdaptedArray) else None

    dense = map_arrays(only_adapted, model)
    merged = dense if how is None else quantize(dense, how)
    rest = jtu.tree_map(
        lambda x: None if isinstance(x, AdaptedArray) else x, model, is_leaf=is_implicit
    )
    together = jtu.tree_map(
        lambda new, old: old if new is None else new,
        merged,
        rest,
        is_leaf=lambda x: x is None or is_implicit(x),
    )
    return together, report(dense, merged)
