"""The kernel itself.

A register of a TPU holds 8 x 128 words of 32 bits, and bytes lie four to a word: the bytes of four rows, one above
another. So a block of the payload is a block of words as it stands, of eight codes each, and a shift brings one code of
every word to the bottom. A register can be looked up in another one, row by row: within each of its 128 columns, the
lower three bits of a code name one of eight rows. The sixteen levels take two such tables, between which the fourth bit
decides. Where the columns are outputs and a scale serves all that is looked up together,

    sum_j x_j (s_i l[c_ij]) = sum_j x_j (s_i l)[c_ij]:

column i of the tables holds s_i l, and scaling costs two products for each eight registers of weights.

- Packed along the last axis, the four bytes of a word are those of four outputs, and the inputs lie along the columns:
  the words are transposed, which is an eighth of transposing the weights.
- Packed along the first axis, the columns are outputs already, and the four bytes are those of four inputs.

In neither case are codes brought in order. The inputs are put in theirs, which are few.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .... import _compat
from ...in_pieces import zeros


SUBLANES, LANES = 8, 128
# The elements of so many bytes, along the sum, are multiplied at once: the depth of a matrix unit, or half of it.
DEPTH = 64
# How many bytes of the sum one step takes, a power of 2. Not tuned on a device.
STEP = 512
# How many registers of outputs it takes: one for each byte of a word, or as many side by side.
GROUPS = 4


def product(
    x: Array,
    payload: Array,
    scales: Array | None,
    levels: Sequence[float],
    *,
    high_first: bool,
    bytes_per_tile: int,
    bytes_per_scale: int | None,
    sum_last: bool,
    max_rows: int,
    interpret: Any,
) -> Array:
    """Inputs (rows, elements) times the weight, where the elements fill all tiles of the payload.

    The payload is (outputs, bytes) if `sum_last`, else (bytes, outputs); `scales` is (outputs, blocks). The result is
    float32, (rows, outputs): at most `max_rows` of them at a time.
    """
    rows, stored = len(x), x.shape[1] // 2
    outputs = payload.shape[0 if sum_last else 1]
    step = max(2 * DEPTH, min(STEP, pl.next_power_of_2(stored)))
    steps = -(-stored // step)
    width = GROUPS * LANES
    bytes_of_inputs = 1 if sum_last else 4  # in one word
    # The elements of so many bytes follow each other as they are decoded: first all first halves, then all second ones.
    shifts = (4, 0) if high_first else (0, 4)
    run = min(bytes_per_tile, DEPTH)
    words_of_run = run // bytes_of_inputs
    x = x.reshape(rows, -1, 2, bytes_per_tile // run, words_of_run, bytes_of_inputs)
    x = x.transpose(0, 1, 3, 2, 5, 4).reshape(rows, -1)
    # What lies beyond the end is arbitrary in the payload, and 0 in inputs and scales.
    x = jnp.pad(x, ((0, 0), (0, 2 * (steps * step - stored))))
    if scales is None or bytes_per_scale is None:
        scales, bytes_per_scale = jnp.ones((outputs, 1), jnp.float32), pl.next_power_of_2(stored)
    held = max(bytes_per_scale // step, 1)  # steps that share a scale
    per_step = max(step // bytes_per_scale, 1)
    missing = -(-steps // held) * per_step - scales.shape[1]
    scales = jnp.pad(scales, ((0, -outputs % width), (0, missing)))
    groups = (LANES, GROUPS) if sum_last else (GROUPS, LANES)
    scales = scales.reshape(-1, *groups, -(-steps // held), per_step)
    scales = scales.transpose(0, 2, 3, 4, 1) if sum_last else scales.transpose(0, 1, 3, 4, 2)
    table = jnp.broadcast_to(jnp.asarray(levels, jnp.float32)[:, None], (len(levels), LANES))
    height = min(rows, max_rows)

    def body(table_ref: Any, x_ref: Any, payload_ref: Any, scale_ref: Any, out_ref: Any) -> None:
        @pl.when(pl.program_id(2) == 0)
        def start() -> None:
            out_ref[...] = jnp.zeros_like(out_ref)

        def two_depths(i: Any, nothing: None) -> None:
            place = pl.ds(pl.multiple_of(i * 2 * DEPTH, 2 * DEPTH), 2 * DEPTH)
            turned = pltpu.bitcast(payload_ref[:, place], jnp.int32).T if sum_last else None

            def one_group(group: Any, nothing: None) -> None:
                words = turned
                if words is None:
                    lanes = pl.ds(pl.multiple_of(group * LANES, LANES), LANES)
                    words = pltpu.bitcast(payload_ref[place, lanes], jnp.int32)

                def tables(offset: int) -> tuple[Array, Array]:
                    if bytes_per_scale < 2 * DEPTH:
                        row = i * (2 * DEPTH // bytes_per_scale) + offset // bytes_per_scale
                    else:
                        row = lax.div(i, np.int32(bytes_per_scale // (2 * DEPTH)))
                    scale = scale_ref[0, group, 0, pl.ds(row, 1)]
                    return table_ref[:SUBLANES] * scale, table_ref[SUBLANES:] * scale

                def decoded(first: int) -> Sequence[Array]:
                    """The weights of a run of bytes, register by register."""
                    registers = []
                    for shift in shifts:
                        for byte in [group] if sum_last else range(4):
                            for row in range(0, words_of_run, SUBLANES):
                                offset = first + row * bytes_of_inputs
                                at = offset // bytes_of_inputs
                                codes = words[at : at + SUBLANES] >> (8 * byte + shift)
                                registers.append(_look_up(*tables(offset), codes))
                    return registers

                for half in range(2):
                    at = pl.multiple_of((2 * i + half) * 2 * DEPTH, 2 * DEPTH)
                    inputs = x_ref[:, pl.ds(at, 2 * DEPTH)]
                    runs = range(half * DEPTH, (half + 1) * DEPTH, run)
                    weights = jnp.concatenate([w for first in runs for w in decoded(first)])
                    out_ref[0, group] += _dot(inputs, weights.astype(inputs.dtype))

            # In a row, for the compiler to overlap them; interpreted, one is compiled instead of four.
            lax.fori_loop(0, GROUPS, one_group, None, unroll=not interpret)

        lax.fori_loop(0, step // (2 * DEPTH), two_depths, None)

    body.__name__ = "quantized_dot_general_tpu"
    if sum_last:
        of_payload = pl.BlockSpec((width, step), lambda m, n, k: (n, k))
    else:
        of_payload = pl.BlockSpec((step, width), lambda m, n, k: (k, n))
    blocks = -(-outputs // width)
    with jax.enable_x64(False):  # Pallas for TPU does not count in 64 bits
        y = pl.pallas_call(
            body,
            grid=(-(-rows // height), blocks, steps),
            in_specs=[
                pl.BlockSpec(table.shape, lambda m, n, k: (0, 0)),
                pl.BlockSpec((height, 2 * step), lambda m, n, k: (m, k)),
                of_payload,
                pl.BlockSpec(
                    (1, GROUPS, 1, per_step, LANES),
                    lambda m, n, k: (n, 0, lax.div(k, np.int32(held)), 0, 0),
                ),
            ],
            out_specs=pl.BlockSpec((1, GROUPS, height, LANES), lambda m, n, k: (n, 0, m, 0)),
            out_shape=_compat.as_struct(
                jax.typeof(zeros((x, payload, scales), (blocks, GROUPS, rows, LANES), jnp.float32))
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            interpret=interpret,
        )(table, x, payload, scales)
    y = y.transpose(2, 0, 3, 1) if sum_last else y.transpose(2, 0, 1, 3)
    return y.reshape(rows, -1)[:, :outputs]


def _look_up(low: Array, high: Array, codes: Array) -> Array:
    """The entries of two tables of eight rows, by the lowest four bits of `codes`, column by column."""
    index = codes & 7
    low, high = (
        jnp.take_along_axis(table, index, axis=0, mode="promise_in_bounds") for table in (low, high)
    )
    return jnp.where((codes & 8) != 0, high, low)


def _dot(x: Array, weights: Array) -> Array:
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, weights, precision=exact, preferred_element_type=jnp.float32)
