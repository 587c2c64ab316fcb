"""Products of activations with raw codes and scales."""

from typing import Any

from jax import Array
from jaxtyping import Float, Int8

from .formats import Array8B
from .kernels import quantized_dot_general


def matmul_bf16_int8_weight_only(
    lhs_bf16: Float[Array, "... m k"],
    rhs_q_int8: Int8[Array, "k n"],
    rhs_scale: Float[Array, "a b"],
) -> Float[Array, "... m n"]:
    """`lhs @ (rhs_q * rhs_scale)`, weight-only: the codes are never expanded into a matrix.

    **Arguments:**

    - `lhs_bf16`: activations, of any leading axes; bfloat16, or another floating-point dtype.
    - `rhs_q_int8`: the codes.
    - `rhs_scale`: `(1, n)`, one for each column: multiplied after the sum; `(k, 1)`, one for each
        row: multiplied into the activations before it; or along each axis 1, the full length, or
        a divisor of it (blocks): multiplied tile by tile.

    **Returns:** an array in the dtype of `lhs_bf16`. Sums are accumulated in float32.

    **Raises:** `ValueError` if the shapes do not fit each other.

    !!! example

        ```python
        import jax.numpy as jnp
        import eqquant as eqq

        w = eqq.Array8B.quantize(jnp.ones((4, 3)), axis=0)
        x = jnp.ones((2, 4), jnp.bfloat16)
        y = eqq.matmul_bf16_int8_weight_only(x, w.weight, w.scale)
        assert y.dtype == jnp.bfloat16 and y.shape == (2, 3)
        ```
    """
    if lhs_bf16.shape[-1] != rhs_q_int8.shape[0]:
        raise ValueError(
            f"The last axis of lhs_bf16 {lhs_bf16.shape} must be the first of rhs_q_int8 "
            f"{rhs_q_int8.shape}."
        )
    weight = Array8B(
        rhs_scale, rhs_q_int8, dtype=lhs_bf16.dtype, block_size=_block_size(rhs_q_int8, rhs_scale)
    )
    contract = (((lhs_bf16.ndim - 1,), (0,)), ((), ()))
    return quantized_dot_general(lhs_bf16, weight, contract)


def _block_size(codes: Any, scale: Any) -> int | None:
    sizes = set()
    for length, stored in zip(codes.shape, scale.shape, strict=True):
        if stored in (1, length):
            continue
        if length % stored:
            raise ValueError(
                f"rhs_scale {scale.shape} must divide rhs_q_int8 {codes.shape} into equal blocks."
            )
        sizes.add(length // stored)
    if len(sizes) > 1:
        raise ValueError(
            f"rhs_scale {scale.shape} divides the axes of rhs_q_int8 {codes.shape} into blocks of "
            f"different sizes {sorted(sizes)}; use one size, or repeat the scale along one axis."
        )
    return sizes.pop() if sizes else None
