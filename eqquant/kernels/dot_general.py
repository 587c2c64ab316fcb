"""The product `quantized_dot_general`, and its primitive."""

import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import Array, lax

from .. import _compat
from .._daylight import note_kernel
from .._dispatch import preferred_activations, preferred_implementation
from .._scaled import AbstractScaledArray
from ..tiles import Leaf, repeat, to_elements
from .activations import Int8Blocks, rounded
from .linear import bind, linear_primitive
from .matmul.axes import Axes
from .matmul.choice import check, check_name, choose, IMPLEMENTATIONS
from .matmul.product import DIGITS, Product, Target
from .matmul.reference import dense


def quantized_dot_general(
    x: Array,
    w: AbstractScaledArray,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    implementation: str | None = None,
    activations: str | Int8Blocks | None = None,
) -> Array:
    """`lax.dot_general(x, w.materialize(), ...)` without the dense weight.

    **Arguments:**

    - `x`: a floating-point array.
    - `w`: the quantized operand; all others as in `jax.lax.dot_general`.
    - `implementation`: by default the one that serves best where the program runs, or that
        [`implicit`][eqquant.implicit] was given. One of them by name,
        `"reference"`, `"xla"`, `"tiled"`, `"int8_digits"`, `"tables"`, `"gpu"` or `"tpu"`, also computes
        the derivative in `x`, where it can.
    - `activations`: how `x` is rounded: not at all (`"float"`); to 8 bits, where the numbers that are summed up
        together share a scale, the largest magnitude over 127 (`"int8"`); or likewise with a scale for every so many
        of them ([`Int8Blocks`][eqquant.kernels.Int8Blocks]). By default as [`implicit`][eqquant.implicit] was given,
        or else as `w.activations` says. Derivatives are those without rounding. Where the values of `w` are
        no integers (`ArrayNF4`), `x` stays as it is.

    **Returns:** an array of the shape and dtype that `jax.lax.dot_general` gives. Sums are
    accumulated in float32 (float64 if an operand is).

    **Raises:** `ValueError` if there is no implementation of that name, or if it does not compute this
    product or does not run where the program is compiled for; or if there are no such activations, or blocks of
    them are asked for in a sum along several axes.

    !!! example

        ```python
        import jax.numpy as jnp
        import eqquant as eqq
        from eqquant.kernels import quantized_dot_general

        w = eqq.Array8B.quantize(jnp.ones((3, 4)))
        y = quantized_dot_general(jnp.ones((2, 4)), w, (((1,), (1,)), ((), ())))
        assert y.shape == (2, 3)
        ```
    """
    if preferred_element_type is None:
        preferred_element_type = product_dtype(x.dtype, w.dtype)
    axes, dtype = Axes.of(dimension_numbers), jnp.dtype(preferred_element_type)
    if x.dtype.itemsize < 2:  # they do not promote by themselves
        x = x.astype(jnp.float32)
    asked = (activations, preferred_activations(), w.activations)
    x, digits = rounded(x, w, axes, next(one for one in asked if one is not None))
    preferred, implementation = map(check_name, (preferred_implementation(), implementation))
    call = Call(axes, precision, dtype, digits, implementation, preferred)
    product = call.of(x, w)
    if implementation is not None:
        check(implementation, product)
    if _compat.has_explicit_axes(x, *jtu.tree_leaves(w)):
        if implementation is not None:
            raise ValueError(
                f"implementation={implementation!r} cannot be asked for with explicit mesh axes, where XLA's "
                "own product is used; leave it out."
            )
        # Shardings are part of the types here: let JAX's own dot check and propagate them.
        return jax.checkpoint(partial(_explicit, call, out_sharding))(x, w)
    note_kernel(lambda platform: implementation or choose(product, Target(platform), preferred))
    return bind(quantized_dot_general_p, x, w, **call._asdict())


@functools.cache
def product_dtype(x: Any, w: Any) -> np.dtype:
    """The dtype of a product of arrays of these dtypes, as `lax.dot_general` has it: of bfloat16 with float16 it is
    bfloat16, where NumPy's rules would say float32."""
    x, w = (jax.ShapeDtypeStruct((1,), dtype) for dtype in (x, w))
    return jax.eval_shape(
        partial(lax.dot_general, dimension_numbers=(((0,), (0,)), ((), ()))), x, w
    ).dtype


class Call(NamedTuple):
    """The parameters of a product."""

    axes: Axes
    precision: Any
    out_dtype: Any
    digits: int
    implementation: str | None
    preferred: str | None

    def of(self, x: Any, w: AbstractScaledArray) -> Product:
        """The product of these operands."""
        double = jnp.float64 in (x.dtype, w.dtype, self.out_dtype)
        accumulate = jnp.dtype(jnp.float64 if double else jnp.float32)
        return Product(x, w, self.axes, self.precision, accumulate, self.digits)

    def of_dot(self, out_sharding: Any = None) -> dict[str, Any]:
        """The parameters of `lax.dot_general`."""
        numbers, dtype = self.axes.dimension_numbers, self.out_dtype
        how = dict(precision=self.precision, preferred_element_type=dtype)
        return how | dict(dimension_numbers=numbers, out_sharding=out_sharding)


def _compute(x: Array, w: AbstractScaledArray, target: Target, **params: Any) -> Array:
    call = Call(**params)
    product, name = call.of(x, w), call.implementation
    if name is not None:
        check(name, product, target)  # vmap may have added axes
    name = name or choose(product, target, call.preferred)
    with jax.named_scope(f"quantized_dot_general_{name}"):
        y = IMPLEMENTATIONS[name].run(product, target)
        if w.offset_leaf is not None:
            y = y + _product_with_offset(product, w.offset_leaf)
        return y.astype(call.out_dtype)


def _product_with_offset(product: Product, offset: Leaf) -> Array:
    """What the offset of `w` adds to the product with its scaled values."""
    # sum_j x_j m[b(i), c(j)] = sum_c (sum_{j in c} x_j) m[b(i), c]: the inputs of a tile are summed up first, and the
    # outputs of a tile have the same sum.
    axes, dtype = product.axes, product.accumulate
    x, ndim = product.x.astype(dtype), product.w.ndim
    for axis, x_axis in zip(axes.w_contract, axes.x_contract, strict=True):
        blocks, size = offset.array.shape[axis], offset.tiles[axis].size
        missing = blocks * size - x.shape[x_axis]
        x = jnp.pad(x, [(0, missing * (i == x_axis)) for i in range(x.ndim)])
        x = x.reshape(*x.shape[:x_axis], blocks, size, *x.shape[x_axis + 1 :]).sum(x_axis + 1)
    numbers = to_elements(offset, axes.w_batch).astype(dtype)
    # It is small, and may cancel most of the rest: not rounded to what is multiplied fastest.
    y = lax.dot_general(x, numbers, axes.dimension_numbers, lax.Precision.HIGHEST, dtype)
    free = axes.w_free(ndim)
    for y_axis, axis in enumerate(free, start=y.ndim - len(free)):
        length = product.w.shape[axis]
        if 1 < y.shape[y_axis] < length:
            y = repeat(y, offset.tiles[axis].size, y_axis, length)
    return y


def _compute_differentiably(x: Array, w: AbstractScaledArray, **params: Any) -> Array:
    options: dict[str, Any] = params | dict(implementation="tiled")
    return _compute(x, w, Target(), **options)


def _explicit(call: Call, out_sharding: Any, x: Array, w: AbstractScaledArray) -> Array:
    dtype = call.of(x, w).accumulate
    return lax.dot_general(x.astype(dtype), dense(w, dtype), **call.of_dot(out_sharding))


# ------------------------------------------------------------------------------- the primitive


def _output(x: Any, w: Any, **params: Any) -> Any:
    return _compat.output_aval(lax.dot_general_p, x, w, **Call(**params).of_dot())


def _transpose(ct: Any, x: Any, w: AbstractScaledArray, **params: Any) -> Array:
    call = Call(**params)
    axes, name = call.axes, call.implementation
    x_free, n_batch = axes.x_free(x.ndim), len(axes.x_batch)
    # y[b, f, o] = sum_k x[b, f, k] w[b, o, k], so ct_x[b, f, k] = sum_o ct[b, f, o] w[b, o, k].
    outputs, batch = range(n_batch + len(x_free), ct.ndim), range(n_batch)
    back = Axes(tuple(outputs), tuple(axes.w_free(w.ndim)), tuple(batch), axes.w_batch)
    call = call._replace(axes=back, out_dtype=x.dtype)
    if name is not None and not IMPLEMENTATIONS[name].supports(call.of(ct, w)):
        call = call._replace(implementation=None)
    ct_x = bind(quantized_dot_general_p, ct, w, **call._asdict())
    of_w = dict(zip(axes.w_contract, axes.x_contract, strict=True))
    order = [*axes.x_batch, *x_free, *(of_w[axis] for axis in sorted(axes.w_contract))]
    return lax.transpose(ct_x, [order.index(axis) for axis in range(x.ndim)])


def _batch(
    x: Array, w: AbstractScaledArray, x_mapped: bool, w_mapped: bool, *, axes: Axes, **params: Any
) -> tuple[Array, int]:
    both = x_mapped and w_mapped

    def shift(axes: tuple[int, ...], by: bool) -> tuple[int, ...]:
        return tuple(axis + by for axis in axes)

    new = Axes(
        shift(axes.x_contract, x_mapped),
        shift(axes.w_contract, w_mapped),
        (0,) * both + shift(axes.x_batch, x_mapped),
        (0,) * both + shift(axes.w_batch, w_mapped),
    )
    y = bind(quantized_dot_general_p, x, w, axes=new, **params)
    # The new axis is one of the batch, or the first free one of its operand.
    first = len(axes.x_batch) if x_mapped else x.ndim - len(axes.x_contract)
    return y, 0 if both else first


quantized_dot_general_p = linear_primitive(
    "quantized_dot_general",
    output=_output,
    compute=_compute,
    compute_differentiably=_compute_differentiably,
    transpose=_transpose,
    batch=_batch,
    of_tangents=dict(digits=DIGITS),
)
"""Operands: `x`, then the leaves of `w`. Parameters: the treedef of `w`, those of `lax.dot_general`,
how many 8-bit digits say all of `x`, the name of the implementation, or None, and that of the preferred one, or None.
Result: batch axes, free axes of `x`, free axes of `w`."""
