"""What the kernel computes, and where it serves."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import Array

from ...._compat import promote_types
from ...._scaled import AbstractScaledArray
from ....tiles import Leaf
from ..as_matrices import by_matrices, holds_for_matrices, scale_of_inputs
from ..product import has_sixteen_levels, has_slack, Product, Target
from .blocks import Blocks, blocks_for, Case, MAX_ROWS, splits_for


# XLA makes the weight dense, which costs more than the product up to some number of rows. Not measured on a device: the
# first is where the dense product takes as long as reading a bfloat16 weight; in float32 there are no tensor cores.
MAX_ROWS_IN_16_BITS = 256
MAX_ROWS_IN_32_BITS = 16
MIN_SIZE = 1 << 20
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def supports(product: Product) -> bool:
    """Whether `compute` does: products with matrices that decode number by number."""
    return holds_for_matrices(lambda x, w, scale, axis: _decodes(w), product, FLOATS)


def pays(product: Product) -> bool:
    """Whether XLA makes the weight dense, and there are few enough rows for that to matter."""

    def needs_a_kernel(x: Any, w: AbstractScaledArray, scale: Leaf | None, axis: int) -> bool:
        left_to_xla = w.packing is None and (scale is None or scale.is_constant_along(1 - axis))
        most = MAX_ROWS_IN_32_BITS if _dtype(x, w) == jnp.float32 else MAX_ROWS_IN_16_BITS
        return not left_to_xla and len(x) <= most

    return product.w.size >= MIN_SIZE and holds_for_matrices(needs_a_kernel, product, FLOATS)


def compute(
    product: Product, target: Target, *, blocks: Blocks | None = None, interpret: bool = False
) -> Array:
    """As `reference`, where `supports` says so. Reads the stored numbers, and nothing as large as the dense
    weight is written.

    What is multiplied is rounded as the dense product would be, to the common dtype of `x` and `w`; float32
    is not rounded, whatever the `precision`. `blocks` says how it is cut, which depends on the device by default;
    `interpret` runs it anywhere.
    """
    from . import kernel

    def of_matrix(rows: Any, w: AbstractScaledArray, scale: Leaf | None, axis: int) -> Array:
        payload, dtype = w.payload_leaf, _dtype(rows, w)
        if scale is not None:
            to_input = scale.is_constant_along(1 - axis)
            shared = kernel.Side.of(payload, scale, axis, 16).shares_scale
            if dtype == jnp.float16 and (to_input or not shared):
                dtype = jnp.dtype("float32")  # float16 is too narrow for its numbers times a scale
            if to_input:
                rows, scale = rows.astype(jnp.float32) * scale_of_inputs(scale, axis), None
        case = case_of(len(rows), w, axis, dtype)
        cut = blocks or blocks_for(case, target.device)
        inputs = kernel.Side.of(payload, scale, axis, cut.inputs)
        outputs = kernel.Side.of(payload, scale, 1 - axis, cut.outputs)
        matrices = product.w.size // w.size
        splits = splits_for(
            matrices * -(-len(rows) // cut.rows) * -(-outputs.stored // outputs.block),
            -(-inputs.stored // inputs.block),
            4 * len(rows) * outputs.length,
            payload.array.size * payload.array.dtype.itemsize,
        )
        problem = kernel.Problem(
            rows=len(rows),
            inputs=inputs,
            outputs=outputs,
            packed=case.packed,
            inputs_last=case.inputs_last,
            splits=splits,
            blocks=cut,
            dtype=dtype,
            interpret=interpret,
        )
        scales = None if scale is None else scale.array
        return jnp.sum(kernel.product(rows.astype(dtype), w, scales, problem), axis=0)

    return by_matrices(of_matrix, product.x, product.w, product.axes)


def case_of(rows: int, w: AbstractScaledArray, axis: int, dtype: Any) -> Case:
    """What the block sizes depend on, for so many rows and a sum along this axis of `w`."""
    height = min(MAX_ROWS, max(16, 1 << (rows - 1).bit_length()))
    packed, elements = "no", 1
    if w.packing is not None:
        packed = "inputs" if w.packing.axis % 2 == axis else "outputs"
        elements = w.packing.elements
    return Case(height, 8 * dtype.itemsize, elements, packed, axis == 1)


def _dtype(x: Any, w: AbstractScaledArray) -> Any:
    """What is multiplied."""
    return jnp.dtype(promote_types(x.dtype, w.dtype))


def _decodes(w: AbstractScaledArray) -> bool:
    """Whether the kernel can decode a block of the stored numbers as the format says."""
    payload = [*w.payloads.values()]
    if w.packing is not None and (w.packing.elements > 16 or has_slack(w.packing)):
        return False
    if any(leaf.dtype not in (jnp.int8, jnp.uint8, jnp.uint16) for leaf in payload):
        return False
    if has_sixteen_levels(w):
        return True
    leaves, treedef = jtu.tree_flatten(w)
    return _is_elementwise(treedef, tuple(leaf.dtype for leaf in leaves))


# What Triton computes number by number.
_ELEMENTWISE = frozenset(
    "abs add and convert_element_type eq ge gt jit le lt max min mul ne neg not or pjit select_n "
    "shift_left shift_right_arithmetic shift_right_logical sub xor".split()
)


@functools.lru_cache(maxsize=256)
def _is_elementwise(treedef: Any, dtypes: tuple[Any, ...]) -> bool:
    """Whether every plane is arithmetic on the stored numbers, one by one."""
    shape = (16, 16)

    def planes(*leaves: Array) -> list[Array]:
        w = jtu.tree_unflatten(treedef, leaves)
        count = 1 if w.packing is None else w.packing.elements
        return [w.plane(i, jnp.float32) for i in range(count)]

    def simple(jaxpr: Any) -> bool:
        return all(
            eqn.primitive.name in _ELEMENTWISE
            and ("jaxpr" not in eqn.params or simple(eqn.params["jaxpr"]))
            for eqn in jaxpr.eqns
        )

    found = jax.make_jaxpr(planes)(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes))
    return not found.consts and all(out.shape == shape for out in found.out_avals) and simple(found)
