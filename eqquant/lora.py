"""Low-rank adapters over dense or quantized weights ([LoRA](https://arxiv.org/abs/2106.09685)).

| operation                     | an adapted weight                                                  |
|-------------------------------|--------------------------------------------------------------------|
| `transpose` of the last axes  | stays adapted: the factors change places                           |
| `dot_general`                 | three products: with the base, and with each factor                |
| cast to a floating-point dtype| stays adapted                                                      |
| `neg`, `mul`, `div` by a scalar | stays adapted: base and second factor take it                    |
| all else                      | dense                                                              |
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import Array, lax
from jaxtyping import Float, PRNGKeyArray

from ._array import QuantizedArray
from ._compat import promote_types
from ._dispatch import apply, register
from ._implicit import is_implicit
from ._implicit_array import as_dense, ImplicitArray, without_views
from ._model import identity, map_arrays, matching_paths, path_name, quantize
from ._report import Report, report


Tree = TypeVar("Tree")


class AdaptedArray(QuantizedArray):
    r"""A weight with a low-rank adapter: $W + \alpha\, B A$.

    Made by [`lora.add`][eqquant.lora.add]. It is used as any quantized array; a product takes three:
    with the base, and with each factor.
    """

    base: Array | ImplicitArray
    """$W$, of shape (..., out, in), dense or quantized. Not trained."""
    a: Float[Array, "... rank in"]
    """$A$. Random at first."""
    b: Float[Array, "... out rank"]
    """$B$. Zero at first."""
    scale: float = eqx.field(static=True)
    r"""$\alpha$: `alpha / rank`, or `alpha / sqrt(rank)` (rank-stabilized)."""
    dropout_rate: float = eqx.field(static=True)
    """The share of inputs that [`lora.dropout`][eqquant.lora.dropout] hides from the adapter."""

    casts: tuple[np.dtype, ...] = eqx.field(static=True, default=())
    """The dtypes that the weight was cast to, one after another; the last is its own."""

    trained: ClassVar[tuple[str, ...]] = ("a", "b")

    def __check_init__(self) -> None:
        *batch, out, inner = self.base.shape
        rank = self.a.shape[-2]
        if self.a.shape != (*batch, rank, inner) or self.b.shape != (*batch, out, rank):
            raise ValueError(
                f"The factors of a weight of shape {self.base.shape} must have the shapes (..., rank, "
                f"{inner}) and (..., {out}, rank); they have {self.a.shape} and {self.b.shape}."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the weight."""
        return self.casts[-1] if self.casts else self.base.dtype

    def materialize(self) -> Array:
        """$W + \\alpha B A$, summed in float32 (float64 if a part is), then cast as `casts` says."""
        base = as_dense(self.base)
        wide = promote_types(base.dtype, self.a.dtype, jnp.float32)
        product = self.b.astype(wide) @ self.a.astype(wide)
        weight = base.astype(wide) + self.scale * product
        for dtype in (base.dtype, *self.casts):
            weight = weight.astype(dtype)
        return weight

    def without_views(self) -> "AdaptedArray":
        base = without_views(self.base)
        return self if base is self.base else self.replace(base=base)

    def per_element_along(self, axes: Sequence[int] = (0,)) -> "AdaptedArray | None":
        base = (
            self.base.per_element_along(axes) if isinstance(self.base, ImplicitArray) else self.base
        )
        inside = all(axis < len(self.shape) - 2 for axis in axes)
        return self.replace(base=base) if inside and base is not None else None

    def replace(self, **changes: Any) -> "AdaptedArray":
        """A copy with some of its fields changed."""
        return dataclasses.replace(self, **changes)


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
) -> Tree:
    r"""`model` with adapters on its weights. At first it computes exactly what it did before.

    **Arguments:**

    - `model`: any pytree; its weights may be quantized.
    - `paths`: which weights get adapters: a pattern, or several, as in
        [`quantize`][eqquant.quantize]. By default all matrices.
    - `key`: for the first factor, which is uniform between $\pm 1 / \sqrt{\mathrm{in}}$.
    - `rank`: the number of rows of $A$ and columns of $B$.
    - `alpha`: the adapter is scaled by `alpha / rank`, or by `alpha / sqrt(rank)` if `rank_stabilized`
        ([rsLoRA](https://arxiv.org/abs/2312.03732)).
    - `dropout`: the share of inputs that [`lora.dropout`][eqquant.lora.dropout] hides from the adapters.
    - `dtype`: of the adapters.

    **Returns:** a model in which an [`AdaptedArray`][eqquant.lora.AdaptedArray] stands for each of these
    weights. Weights that occur twice share an adapter.

    **Raises:** `ValueError` if a pattern matches nothing (it lists the nearest paths), or an argument is
    out of range: `rank` is if it is above both sides of a weight.

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
    done: dict[Any, AdaptedArray] = {}

    def adapt(path: Any, weight: Any) -> Any:
        name = path_name(path)
        if name not in chosen or isinstance(weight, AdaptedArray):
            return weight
        tie = identity(weight)
        if tie not in done:
            *batch, out, inner = weight.shape
            if rank > max(out, inner):
                raise ValueError(
                    f"rank must not be above both sides of a weight; lora.add(..., rank={rank}) was given {rank}, and "
                    f"{name!r} has the shape {tuple(weight.shape)}. Choose a smaller one, or leave this weight out of "
                    "paths."
                )
            own = jax.random.fold_in(key, len(done))
            bound = inner**-0.5
            a = jax.random.uniform(own, (*batch, rank, inner), dtype, -bound, bound)
            b = jnp.zeros((*batch, out, rank), dtype)
            done[tie] = AdaptedArray(weight, a, b, scale, float(dropout))  # pyright: ignore
        return done[tie]

    return jtu.tree_map_with_path(adapt, model, is_leaf=is_implicit)


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
    have them differ.
    """
    count = iter(range(10**9))

    def drop(x: Any) -> Any:
        if not isinstance(x, AdaptedArray) or not x.dropout_rate:
            return x
        kept = 1 - x.dropout_rate
        shape = (*x.a.shape[:-2], 1, x.a.shape[-1])
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


# ------------------------------------------------------------------------------------------ rules


def _one(primitive: Any, *operands: Any, **params: Any) -> Any:
    if any(map(is_implicit, operands)):
        return apply(primitive, operands, params)[0]
    return primitive.bind(*operands, **params)


@register(lax.transpose_p)
def transpose_adapted(primitive: Any, x: AdaptedArray, *, permutation: Any, **params: Any) -> Any:
    n = len(permutation)
    if tuple(permutation[:-2]) != tuple(range(n - 2)):
        return NotImplemented
    if permutation[-1] == n - 1:
        return x
    # (W + s B A)^T = W^T + s A^T B^T.
    base, a, b = (
        _one(primitive, each, permutation=permutation, **params) for each in (x.base, x.b, x.a)
    )
    return x.replace(base=base, a=a, b=b)


@register(lax.convert_element_type_p)
def convert_element_type_adapted(
    primitive: Any, x: AdaptedArray, *, new_dtype: Any, **params: Any
) -> Any:
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return NotImplemented
    return x.replace(casts=(*x.casts, jnp.dtype(new_dtype)))


@register(lax.neg_p)
def neg_adapted(primitive: Any, x: AdaptedArray, **params: Any) -> Any:
    return x.replace(base=_one(primitive, x.base, **params), b=-x.b)


@register(lax.mul_p, lax.div_p)
def mul_adapted_scalar(primitive: Any, x: AdaptedArray, y: Array, **params: Any) -> Any:
    return _by_scalar(primitive, x, y, params)


@register(lax.mul_p)
def mul_scalar_adapted(primitive: Any, x: Array, y: AdaptedArray, **params: Any) -> Any:
    return _by_scalar(primitive, y, x, params)


def _by_scalar(primitive: Any, x: AdaptedArray, scalar: Array, params: dict[str, Any]) -> Any:
    # (W + s B A) c = W c + s (B c) A.
    if scalar.ndim or x.casts or scalar.dtype != x.dtype or params.get("out_dtype") is not None:
        return NotImplemented
    b = x.b.astype(promote_types(x.b.dtype, jnp.float32))
    base = _one(primitive, x.base, scalar, **params)
    return x.replace(base=base, b=primitive.bind(b, scalar.astype(b.dtype), **params))


@register(lax.dot_general_p)
def dot_general_array_adapted(
    primitive: Any, x: Array, w: AdaptedArray, *, dimension_numbers: Any, **params: Any
) -> Any:
    wc, wb = (pair[1] for pair in dimension_numbers)
    n = len(w.shape)
    if len(wc) != 1 or tuple(wb) != tuple(range(n - 2)) or wc[0] < n - 2:
        return NotImplemented
    if params.get("out_sharding") is not None:
        return NotImplemented
    # x (W + s B A)^T = x W^T + s (x A^T) B^T; along the other axis the factors change places.
    near, far = (w.a, w.b) if wc[0] == n - 1 else (w.b, w.a)
    base = w.base
    if base.dtype != w.dtype:
        base = _one(
            lax.convert_element_type_p, base, new_dtype=w.dtype, weak_type=False, sharding=None
        )
    y = _one(primitive, x, base, dimension_numbers=dimension_numbers, **params)
    wide = dict(params, preferred_element_type=promote_types(y.dtype, near.dtype))
    inner = primitive.bind(x, near, dimension_numbers=dimension_numbers, **wide)
    batch = tuple(range(len(wb)))
    numbers = (((inner.ndim - 1,), (n - 1 if wc[0] == n - 1 else n - 2,)), (batch, batch))
    outer = primitive.bind(inner, far, dimension_numbers=numbers, **wide)
    return (y + w.scale * outer).astype(y.dtype)


@register(lax.dot_general_p)
def dot_general_adapted_array(
    primitive: Any, w: AdaptedArray, x: Array, *, dimension_numbers: Any, **params: Any
) -> Any:
    (wc, xc), (wb, xb) = dimension_numbers
    y = dot_general_array_adapted(primitive, x, w, dimension_numbers=((xc, wc), (xb, wb)), **params)
    if y is NotImplemented:
        return NotImplemented
    # y has the batch axes, the free axes of x, that of w: the last comes before the others.
    batch = len(wb)
    return lax.transpose(y, [*range(batch), y.ndim - 1, *range(batch, y.ndim - 1)])
