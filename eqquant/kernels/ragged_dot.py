"""Products of rows with the matrix of their group."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._compat import promote_types
from .._scaled import AbstractScaledArray
from ..tiles import as_index, dynamic_slice, remove_axis
from .dot_general import product_dtype, quantized_dot_general


def quantized_ragged_dot(
    x: Array,
    w: AbstractScaledArray,
    group_sizes: Array,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """`lax.ragged_dot(x, w.materialize(), group_sizes, ...)`, group by group.

    **Arguments:**

    - `x`: a floating-point array (rows, inputs). The rows of each group follow each other.
    - `w`: a stack of quantized matrices (groups, inputs, outputs), not packed along the groups.
    - `group_sizes`: how many rows each group has. All others are as in `jax.lax.ragged_dot`.

    **Returns:** an array (rows, outputs) of the dtype that `jax.lax.ragged_dot` gives. Sums are accumulated in
    float32 or wider. Rows that are in no group are 0.

    !!! example

        ```python
        import jax.numpy as jnp
        import eqquant as eqq
        from eqquant.kernels import quantized_ragged_dot

        experts = eqq.Array8B.quantize(jnp.ones((2, 4, 3)), axis=1)
        y = quantized_ragged_dot(jnp.ones((5, 4)), experts, jnp.asarray([2, 3]))
        assert y.shape == (5, 3)
        ```
    """
    out_dtype = jnp.dtype(preferred_element_type or product_dtype(x.dtype, w.dtype))
    accumulate = promote_types(out_dtype, jnp.float32)
    group_sizes = as_index(group_sizes)
    rows, ends = jnp.arange(x.shape[0]), jnp.cumsum(group_sizes)

    @jax.checkpoint
    def group(i: Array, x: Array, w: AbstractScaledArray) -> Array:
        mine = (rows >= ends[i] - group_sizes[i]) & (rows < ends[i])
        inputs = jnp.where(mine[:, None], x, 0)
        contract = (((1,), (0,)), ((), ()))
        return quantized_dot_general(inputs, _entry(w, i), contract, precision, accumulate)

    start = jnp.zeros((x.shape[0], w.shape[2]), accumulate)
    total, _ = lax.scan(
        lambda total, i: (total + group(i, x, w), None), start, jnp.arange(w.shape[0])
    )
    return total.astype(out_dtype)


def _entry(w: AbstractScaledArray, i: Array) -> AbstractScaledArray:
    """The `i`-th matrix."""
    return w.moved(lambda leaf: remove_axis(dynamic_slice(leaf, 0, i, 1), 0))
