"""The kernel itself: one body for every format.

A program computes the sums of a block of rows and a block of stored outputs. It goes along the summed axis
step by step: it loads a block of stored numbers and decodes it plane by plane, as the format says
(`Packing` in `eqquant.tiles`); it loads the inputs that meet each plane, and adds their product. What lies
between the planes is never brought in order. Where there are too few programs, the steps are shared out
among several, whose sums are added up afterwards: programs run at once, so they must not add to one place.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from .... import _compat
from ...._scaled import AbstractScaledArray
from ....tiles import Leaf, Tile
from ...in_pieces import zeros
from ..product import has_sixteen_levels, high_half_first
from .blocks import Blocks


class Side(NamedTuple):
    """One axis of the weight: how stored numbers and scales cover it, and what a block takes of it."""

    length: int
    stored: int
    tile: Tile
    scaled: int
    """How many elements share a scale; 0 if all do."""
    block: int
    """Of stored numbers."""

    @staticmethod
    def of(payload: Leaf, scale: Leaf | None, axis: int, block: int) -> "Side":
        """The axis, with the largest block of at most this size that does not reach over several scales, if
        one of at least 16 does not."""
        tile, scaled = payload.tiles[axis], 0
        if scale is not None and not scale.is_constant_along(axis):
            scaled = scale.tiles[axis].size
        side = Side(payload.shape[axis], payload.array.shape[axis], tile, scaled, block)
        while side.block > 16 and not side.shares_scale:
            side = side._replace(block=side.block // 2)
        return side if side.shares_scale else side._replace(block=block)

    @property
    def shares_scale(self) -> bool:
        """Whether one scale serves a whole block."""
        tiles, rest = divmod(self.scaled, self.tile.size)
        return not (self.scaled and (rest or tiles * self.tile.stored % self.block))

    def elements(self, stored: Any, plane: int) -> Any:
        """Which elements of the axis lie in this plane of these stored numbers."""
        size, count = self.tile
        if count == 1:
            return stored * size + plane if size > 1 else stored
        tile, rest = lax.div(stored, _like(stored, count)), lax.rem(stored, _like(stored, count))
        return tile * size + (plane * count + rest)

    def scales(self, start: Any, elements: Any) -> Any:
        """Which scales these elements of the block from `start` have: one for all if they share it."""
        if not self.scaled:
            return jnp.zeros(1, jnp.int32)
        if self.shares_scale:
            start = self.elements(start, 0)
            return jnp.full(1, lax.div(start, _like(start, self.scaled)))
        return lax.div(elements, _like(elements, self.scaled))


class Problem(NamedTuple):
    """All that is known when the kernel is traced."""

    rows: int
    inputs: Side
    outputs: Side
    packed: Literal["inputs", "outputs", "no"]
    inputs_last: bool
    splits: int
    blocks: Blocks
    dtype: Any
    interpret: bool

    @property
    def steps(self) -> int:
        """Of the loop, in each program."""
        return -(-self.inputs.stored // (self.inputs.block * self.splits))


def product(x: Array, w: AbstractScaledArray, scale: Array | None, problem: Problem) -> Array:
    """Partial sums of `x` (rows, inputs) times the values of `w`, times `scale` if it is given: float32, of shape
    (splits, rows, outputs)."""
    leaves, treedef = jtu.tree_flatten(w)
    payload = [*w.payloads.values()]
    places = [next(i for i, leaf in enumerate(leaves) if leaf is array) for array in payload]
    levels = w.codebook if has_sixteen_levels(w) else None
    table, permuting = None, not problem.interpret and problem.dtype != jnp.float32
    if levels is not None:
        as_table = _words if permuting else jnp.asarray
        table = as_table(levels, problem.dtype)

    def decode(stored: Sequence[Array], table_ref: Any) -> Sequence[Array]:
        """The planes of a block."""
        if levels is not None:
            (codes,) = stored
            decoded = _permuted if permuting else _looked_up
            planes = decoded(codes, table_ref, problem.dtype)
            return planes if high_half_first(w) else planes[::-1]
        filled: list[Any] = [None] * len(leaves)
        for place, array in zip(places, stored, strict=True):
            filled[place] = array
        block = jtu.tree_unflatten(treedef, filled)
        count = 1 if w.packing is None else w.packing.elements
        return [block.plane(i, problem.dtype) for i in range(count)]

    def body(x_ref: Any, *refs: Any) -> None:
        *stored, out_ref = refs
        table_ref = None if table is None else stored.pop()
        scale_ref = None if scale is None else stored.pop()
        _program(problem, decode, x_ref, stored, scale_ref, table_ref, out_ref)

    body.__name__ = f"quantized_dot_general_{type(w).__name__}"
    blocks, outputs = problem.blocks, problem.outputs
    others = [array for array in (scale, table) if array is not None]
    shape = (problem.splits, problem.rows, outputs.length)
    return pl.pallas_call(
        body,
        grid=(
            -(-problem.rows // blocks.rows),  # programs that read the same weights run together
            -(-outputs.stored // outputs.block),
            problem.splits,
        ),
        out_shape=_compat.as_struct(jax.typeof(zeros((x, payload, others), shape, jnp.float32))),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=problem.interpret,
    )(x, *payload, *others)


def _program(
    problem: Problem,
    decode: Any,
    x_ref: Any,
    refs: Sequence[Any],
    scale_ref: Any,
    table_ref: Any,
    out_ref: Any,
) -> None:
    inputs, outputs = problem.inputs, problem.outputs
    # As the left operand, the weight goes from registers to the tensor cores, if there are 64 outputs at least.
    weight_first = problem.packed == "inputs" and outputs.block >= 64
    sums = problem.blocks.rows, outputs.block

    def oriented(of_inputs: Any, of_outputs: Any) -> tuple[Any, Any]:
        """Numbers along each axis as they index the weight; None stays None."""
        along = (None, slice(None)) if problem.inputs_last else (slice(None), None)
        a = None if of_inputs is None else of_inputs[along]
        b = None if of_outputs is None else of_outputs[along[::-1]]
        return (b, a) if problem.inputs_last else (a, b)

    m = pl.program_id(0) * sums[0] + _range(sums[0])
    n_start = pl.program_id(1) * sums[1]
    n = n_start + _range(sums[1])
    first = pl.program_id(2) * problem.steps
    # Masks cost instructions: none where the blocks fit.
    is_row = m < problem.rows if problem.rows % sums[0] else None
    is_output = n < outputs.stored if outputs.stored % sums[1] else None
    per_input = inputs.tile.size // inputs.tile.stored
    per_output = outputs.tile.size // outputs.tile.stored
    whole = problem.steps * problem.splits * inputs.block == inputs.stored

    def step(i: Any, before: tuple[Array, ...]) -> tuple[Array, ...]:
        totals = [*before]
        x: Any = None
        scale: Any = None
        part: Any = None
        k_start = (first + jnp.asarray(i, jnp.int32)) * inputs.block
        k = k_start + _range(inputs.block)
        is_input = None if whole else k < inputs.stored
        mask = _both(*oriented(is_input, is_output))
        planes = decode([_load(ref, oriented(k, n), mask) for ref in refs], table_ref)
        for p, values in enumerate(planes):
            plane_k = inputs.elements(k, p) if problem.packed == "inputs" else k
            plane_n = outputs.elements(n, p) if problem.packed == "outputs" else n
            if p == 0 or problem.packed == "inputs":
                is_element = None
                if not whole or inputs.length != inputs.stored * per_input:
                    is_element = (plane_k < inputs.length)[None, :]
                mask = _both(None if is_row is None else is_row[:, None], is_element)
                x = _load(x_ref, (m[:, None], plane_k[None, :]), mask)
            x_p = x
            if scale_ref is not None:
                # sum_j x_j s_ij q_ij: where s_ij is the same for all j, or for all i, of the block, it is
                # multiplied where there are fewest numbers.
                s_k, s_n = inputs.scales(k_start, plane_k), outputs.scales(n_start, plane_n)
                # Beyond the edges, some scale that is there: what it multiplies is 0 or not stored.
                s_k = jnp.minimum(s_k, scale_ref.shape[problem.inputs_last] - 1)
                s_n = jnp.minimum(s_n, scale_ref.shape[not problem.inputs_last] - 1)
                scale = _load(scale_ref, oriented(s_k, s_n))
                if not inputs.shares_scale and outputs.shares_scale:
                    x_p = (x * (scale if problem.inputs_last else scale.T)).astype(problem.dtype)
                elif not inputs.shares_scale:
                    values = (values * scale).astype(problem.dtype)
            product = _dot(x_p, values, problem.inputs_last, weight_first)
            part = product if part is None else part + product
            if problem.packed == "inputs" and p + 1 < len(planes):
                continue  # all planes have the same sums
            if scale_ref is not None and inputs.shares_scale:
                part = part * (scale if weight_first == problem.inputs_last else scale.T)
            place = p if problem.packed == "outputs" else 0
            totals[place], part = totals[place] + part, None
        return tuple(totals)

    nothing = jnp.zeros(sums[::-1] if weight_first else sums, jnp.float32)
    totals = lax.fori_loop(0, problem.steps, step, (nothing,) * per_output)
    for p, total in enumerate(totals):
        columns = outputs.elements(n, p)
        is_column = None
        if outputs.length != -(-outputs.stored // sums[1]) * sums[1] * per_output:
            is_column = (columns < outputs.length)[None, :]
        mask = _both(None if is_row is None else is_row[:, None], is_column)
        place = pl.program_id(2), m[:, None], columns[None, :]
        if weight_first:
            mask, place = None if mask is None else mask.T, (place[0], place[1].T, place[2].T)
        mask = None if mask is None else jnp.broadcast_to(mask, total.shape)
        triton.store(out_ref.at[place], total, mask=mask)


def _dot(x: Array, values: Array, inputs_last: bool, weight_first: bool) -> Array:
    """The product, of shape (rows, outputs); transposed, with the weight first."""
    highest = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    options: dict[str, Any] = dict(precision=highest, preferred_element_type=jnp.float32)
    if weight_first:
        return lax.dot_general(values, x, (((int(inputs_last),), (1,)), ((), ())), **options)
    return lax.dot_general(x, values, (((1,), (int(inputs_last),)), ((), ())), **options)


def _load(ref: Any, index: tuple[Any, Any], mask: Array | None = None) -> Array:
    """The numbers at each pair of a column of indices and a row of them; 0 where the mask says no."""
    if mask is None:
        return triton.load(ref.at[index])
    shape = jnp.broadcast_shapes(index[0].shape, index[1].shape)
    return triton.load(
        ref.at[index], mask=jnp.broadcast_to(mask, shape), other=jnp.zeros((), ref.dtype)
    )


def _both(a: Array | None, b: Array | None) -> Array | None:
    """The conjunction of two masks, where None is always true."""
    return a if b is None else b if a is None else a & b


# ------------------------------------------------------------------------------ sixteen levels


# Levels of 16 bits are found by permuting bytes: Triton has the instruction, the interpreter has not. Loading each
# from a table takes longer, and choosing among them in steps longer still.


def _words(levels: Sequence[float], dtype: Any) -> Array:
    """The low bytes of the sixteen levels in four words, then the high bytes."""
    bits = np.asarray(levels, np.float32).astype(dtype).view(np.uint16)
    low_and_high = np.concatenate([bits & 255, bits >> 8]).astype(np.uint8)
    return jnp.asarray(low_and_high.view(np.int32))


def _looked_up(codes: Array, table_ref: Any, dtype: Any) -> Sequence[Array]:
    """The levels of the high and of the low halves of a block of bytes, from a table of the levels."""
    return [triton.load(table_ref.at[half.astype(jnp.int32)]) for half in (codes >> 4, codes & 15)]


def _permuted(codes: Array, words_ref: Any, dtype: Any) -> Sequence[Array]:
    """As `_looked_up`, from the words of the levels."""
    # As operands: of constants, the compiler would make a copy for each use.
    words = [jnp.full(codes.shape, triton.load(words_ref.at[i])) for i in range(8)]
    [pairs] = triton.elementwise_inline_asm(
        permutation([f"${5 + 4 * i}" for i in range(8)]),
        args=[codes, *words],
        constraints="=r,=r,=r,=r" + ",r" * (1 + 4 * len(words)),
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.int32)],
    )
    upper = lax.shift_right_logical(pairs, _like(pairs, 16))
    return [lax.bitcast_convert_type(half.astype(jnp.uint16), dtype) for half in (upper, pairs)]


def permutation(words: Sequence[str]) -> str:
    """The assembly that turns four bytes of two codes each, in `$4`, into four pairs of levels, in `$0` to `$3`: that
    of the low half below that of the high half.

    `prmt` takes four bytes out of eight, as four 4-bit numbers say. The low three bits of a code choose among the
    lower and among the upper eight levels, the fourth between the two: once for the low bytes of the
    levels and once for the high ones, which are then put together.
    """
    asm = [
        ".reg .b32 of8, which, a, b, low, high;",
        "and.b32 of8, $4, 0x77777777;",
        "shr.u32 which, $4, 1;",
        "lop3.b32 which, which, 0x44444444, 0x32103210, 0xEA;",  # byte j of the one, or of the other
    ]
    for half in range(2):  # of the eight codes
        if half:
            asm += ["shr.u32 of8, of8, 16;", "shr.u32 which, which, 16;"]
        for name, table in (("low", words[:4]), ("high", words[4:])):
            asm += [
                f"prmt.b32 a, {table[0]}, {table[1]}, of8;",
                f"prmt.b32 b, {table[2]}, {table[3]}, of8;",
                f"prmt.b32 {name}, a, b, which;",
            ]
        asm += [
            f"prmt.b32 ${2 * half}, low, high, 0x5140;",
            f"prmt.b32 ${2 * half + 1}, low, high, 0x7362;",
        ]
    return "{" + " ".join(asm) + "}"


def _range(length: int) -> Array:
    return jnp.arange(length, dtype=jnp.int32)


def _like(x: Any, value: int) -> Any:
    return jnp.full(jnp.shape(x), value, jnp.int32)
