"""Training with quantized weights: what is trained, and how rounding is differentiated."""

import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import Array
from jaxtyping import Float

from ._checks import as_float_array, check_choice, normalize_axes
from ._exporting import exportable
from ._implicit import is_implicit
from ._implicit_array import as_dense, in_row_major
from ._scaled import AbstractScaledArray
from ._transposed import ColumnMajor
from .formats import Array8B
from .tiles import broadcastable


def trainable(model: Any, *, scales: bool = False) -> Any:
    """Which leaves of a model are to be trained: a filter for `eqx.partition`.

    `eqx.filter_grad` differentiates every floating-point leaf, the scales of quantized arrays among
    them. This filter leaves quantized arrays alone, and of a weight with an adapter the base.

    **Arguments:**

    - `model`: any pytree.
    - `scales`: whether the scales of quantized arrays are trained too.

    **Returns:** a tree of booleans, of the structure of `model`: True for its floating-point arrays,
    except as said.

    !!! example

        ```python
        import equinox as eqx, jax, jax.numpy as jnp
        import eqquant as eqq

        model = eqx.nn.MLP(8, 4, 16, 2, key=jax.random.key(0))
        model = eqq.quantize(model, eqq.ArrayNF4.quantize)
        trained, frozen = eqx.partition(model, eqq.trainable(model))

        @eqx.filter_grad
        def gradient(trained, frozen, x):
            return jnp.sum(eqx.combine(trained, frozen)(x) ** 2)

        g = gradient(trained, frozen, jnp.ones(8))
        assert g.layers[0].bias.shape == (16,) and g.layers[0].weight.absmax is None
        ```
    """

    def mark(x: Any) -> Any:
        if not is_implicit(x):
            return eqx.is_inexact_array(x)
        return jtu.tree_map_with_path(
            lambda path, leaf: (
                eqx.is_inexact_array(leaf)
                and (
                    jtu.keystr(path[:1], simple=True) in x.trained
                    or (scales and _is_scale(x, path))
                )
            ),
            x,
        )

    return jtu.tree_map(mark, model, is_leaf=is_implicit)


def _is_scale(x: Any, path: Any) -> bool:
    """Whether the leaf at this path of an array is a factor or summand: the format says so, not the dtype."""
    if isinstance(x, ColumnMajor):
        x, path = x.stored, path[1:]
    name = jtu.keystr(path[:1], simple=True)
    return isinstance(x, AbstractScaledArray) and name in (*x.factors, *x.summands)


# ------------------------------------------------------------------ quantization-aware training


def ste(how: Callable[[Array], Any]) -> Callable[[Array], Array]:
    """Makes a quantizer differentiable by pretending that it is the identity.

    The value of `ste(how)(x)` is exactly that of `how(x)`, materialized; its derivative is
    that of `x` ([Bengio et al. 2013](https://arxiv.org/abs/1308.3432)). Works under `jit`,
    `vmap`, `scan`, `jax.checkpoint`, and in forward and reverse mode.

    **Arguments:**

    - `how`: a function from an array to a quantized or dense array of the same shape.

    **Returns:** a function from an array to a dense array of its shape and dtype.

    **Raises:** `ValueError` when called, if `how` changes the shape.

    !!! example

        ```python
        import jax, jax.numpy as jnp
        import eqquant as eqq

        fake_quantize = eqq.ste(eqq.Array8B.quantize)
        g = jax.grad(lambda w: fake_quantize(w).sum())(jnp.linspace(-1, 1, 8).reshape(2, 4))
        assert (g == 1).all()
        ```
    """
    return fake_quantize(how)


Gradient = Literal["straight_through", "clipped"]


def fake_quantize(
    how: Callable[[Array], Any], gradient: Gradient = "straight_through"
) -> Callable[[Array], Array]:
    """The rounding of a format, in training: dense values that the format holds exactly.

    Apply it to the weights inside the loss; [`quantize`][eqquant.quantize] takes it as a format. After
    training, quantize with `how` itself: that gives exactly the weights that were trained with.

    **Arguments:**

    - `how`: a format, such as `Array1B.quantize`.
    - `gradient`: the derivative with respect to the array. `"straight_through"`: the identity;
        `"clipped"`: zero for elements beyond the largest value that their place can hold, so that
        they are not driven further ([Hubara et al. 2016](https://arxiv.org/abs/1609.07061), section 2.3).

    **Returns:** a function from an array to a dense array of its shape and dtype.

    **Raises:** `ValueError` when called, if `how` changes the shape; `TypeError` if `gradient` is
    `"clipped"` and `how` gives no scaled array.

    !!! example

        ```python
        import equinox as eqx, jax, jax.numpy as jnp
        import eqquant as eqq

        model, x = eqx.nn.Linear(8, 4, key=jax.random.key(0)), jnp.ones(8)

        @eqx.filter_grad
        def gradient(model):
            return jnp.sum(eqq.quantize(model, eqq.fake_quantize(eqq.Array1B.quantize))(x) ** 2)

        model = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradient(model)))
        ternary = eqq.quantize(model, eqq.Array1B.quantize)
        ```
    """
    check_choice("fake_quantize(gradient=...)", gradient, ("straight_through", "clipped"))

    @jax.custom_jvp
    def fake(x: Array) -> Array:
        y = as_dense(how(x))
        if y.shape != x.shape:
            raise ValueError(
                f"fake_quantize(how): how must keep the shape; it turned {x.shape} into {y.shape}."
            )
        return y.astype(x.dtype)

    @fake.defjvp
    def _derivative(primals: Any, tangents: Any) -> Any:
        (x,), (tangent,) = primals, tangents
        if gradient == "clipped":  # the mask itself is not differentiated
            q = how(jax.lax.stop_gradient(x))
            tangent = jnp.where(jnp.abs(x) <= _largest(q), tangent, 0)
        return fake(x), tangent

    return fake


def _largest(q: Any) -> Array:
    """The largest magnitude that the place of each element can hold, to rounding."""
    q = in_row_major(q)
    if not isinstance(q, AbstractScaledArray):
        raise TypeError(
            f'gradient="clipped" needs a format with scales, such as Array1B.quantize; how gave {q!r}.'
        )
    ends = [jnp.asarray(end, jnp.float32) for end in q.coding.range]
    if (scale := q.scale_leaf) is not None:
        ends = [end * broadcastable(scale) for end in ends]
    if (offset := q.offset_leaf) is not None:
        ends = [end + broadcastable(offset) for end in ends]
    slack = 1 + 4 * jnp.finfo(jnp.float32).eps
    return jnp.maximum(*map(jnp.abs, ends)) * slack


@exportable
class LearnedStep(eqx.Module):
    r"""8-bit rounding with a step that is learned: $\hat x = s \, \mathrm{round}(\mathrm{clip}(x / s, \pm 127))$.

    [Learned Step Size Quantization](https://arxiv.org/abs/1902.08153): the derivative along $s$ is
    $\mathrm{round}(x / s) - x / s$ inside the range and $\pm 127$ beyond it, times $1 / \sqrt{127 n}$ for
    the $n$ elements that share the step; that along $x$ is 1 inside the range and 0 beyond it.

    !!! example

        ```python
        import jax, jax.numpy as jnp
        import eqquant as eqq

        w = jax.random.normal(jax.random.key(0), (4, 16))
        step = eqq.LearnedStep.of(w)
        g = jax.grad(lambda step: jnp.sum((step(w) - w) ** 2))(step)
        assert g.step.shape == (4, 1)
        assert (step.quantize(w).materialize() == step(w)).all()
        ```
    """

    step: Float[Array, "..."]
    """Of the rank of the arrays; length 1 along the axes whose elements share a step."""

    @classmethod
    def of(cls, array: Any, axis: int | tuple[int, ...] = -1) -> "LearnedStep":
        r"""Starts at $2 \, \mathrm{mean} |x| / \sqrt{127}$ over `axis`, as the paper does.

        **Raises:** `TypeError` if `array` is not a floating-point array; `ValueError` if an axis is
        out of range.
        """
        array = as_float_array("LearnedStep.of", array)
        axes = normalize_axes("LearnedStep.of(axis=...)", axis, array.ndim)
        mean = jnp.mean(jnp.abs(array), axes, keepdims=True, dtype=jnp.float32)
        return cls(jnp.where(mean == 0, 1, 2 * mean / math.sqrt(127)))

    def __call__(self, x: Array) -> Array:
        """`x` rounded, of its shape and dtype."""
        n = x.size // self.step.size
        step = _scaled_gradient(self.step, 1 / math.sqrt(127 * n))
        codes = _round(jnp.clip(x.astype(step.dtype) / step, -127, 127))
        return (codes * step).astype(x.dtype)

    def quantize(self, x: Array) -> Array8B:
        """The array that `x` is rounded to: a format for [`quantize`][eqquant.quantize]."""
        codes = jnp.round(jnp.clip(x.astype(self.step.dtype) / self.step, -127, 127))
        return Array8B(self.step, codes.astype(jnp.int8), dtype=x.dtype)


@jax.custom_jvp
def _round(x: Array) -> Array:
    return jnp.round(x)


@_round.defjvp
def _straight_through(primals: Any, tangents: Any) -> Any:
    return _round(*primals), tangents[0]


def _scaled_gradient(x: Array, factor: float) -> Array:
    @jax.custom_jvp
    def identity(x: Array) -> Array:
        return x

    @identity.defjvp
    def _scaled(primals: Any, tangents: Any) -> Any:
        return primals[0], factor * tangents[0]

    return identity(x)
