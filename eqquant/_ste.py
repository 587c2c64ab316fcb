"""The straight-through estimator."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from ._dispatch import as_dense


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

    @jax.custom_jvp
    def straight_through(x: Array) -> Array:
        y = as_dense(how(x))
        if y.shape != x.shape:
            raise ValueError(
                f"ste(how): how must keep the shape; it turned {x.shape} into {y.shape}."
            )
        return y.astype(x.dtype)

    @straight_through.defjvp
    def _identity(primals: Any, tangents: Any) -> Any:
        return straight_through(*primals), tangents[0]

    return straight_through
