"""What quantization did to a model, or would do: sizes and errors by path."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from ._array import leaf_nbytes, QuantizedArray
from ._compat import promote_types
from ._implicit import is_implicit
from ._model import (
    _is_array,
    How,
    identity,
    is_float_array,
    is_matrix,
    map_arrays,
    path_name,
    quantize_among,
    weights_in_call,
)
from ._table import format_bytes, format_table


@dataclasses.dataclass(frozen=True)
class ReportRow:
    """One array of a model."""

    path: str
    """Where it is, such as `layers.0.weight`."""
    format: str
    """The class of the quantized array, or the dtype of a dense one."""
    shape: tuple[int, ...]
    """The logical shape."""
    bits_per_weight: float
    """Stored bits for each logical element."""
    nbytes: int
    """Stored bytes."""
    dense_nbytes: int
    """Bytes of the dense array."""
    sqnr_db: float | None
    r"""Signal to quantization noise, $10 \log_{10} (\sum x^2 / \sum (x - \hat x)^2)$, in dB; None for
    a dense array and in a plan, infinite where nothing was lost."""
    is_quantized: bool
    """Whether the array is quantized."""
    note: str = ""
    """What is odd about it. With `inputs`: that the call does not use this matrix as a weight. Without: what a quantized
    array looks like, by its path and shape, if it is like no weight."""


@dataclasses.dataclass(frozen=True)
class Report:
    """A row for each array, and totals. `str()` gives a table, `as_dicts()` plain data."""

    rows: tuple[ReportRow, ...]
    """One for each array of the model; tied arrays count once."""

    @property
    def nbytes(self) -> int:
        """Bytes of the model as stored."""
        return sum(row.nbytes for row in self.rows)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense model."""
        return sum(row.dense_nbytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Bits for each weight, over the quantized arrays."""
        quantized = [row for row in self.rows if row.is_quantized]
        size = sum(math.prod(row.shape) for row in quantized)
        return 8 * sum(row.nbytes for row in quantized) / size if size else 0.0

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as dictionaries, for JSON or a data frame."""
        return [dataclasses.asdict(row) for row in self.rows]

    def __str__(self) -> str:
        header = ["path", "format", "shape", "bits/weight", "bytes", "SQNR dB", "note"]
        rows = [
            [
                row.path or "(array)",
                row.format,
                "x".join(map(str, row.shape)) or "scalar",
                f"{row.bits_per_weight:.2f}",
                format_bytes(row.nbytes),
                "" if row.sqnr_db is None else f"{row.sqnr_db:.2f}",
                row.note,
            ]
            for row in self.rows
        ]
        if not any(row.note for row in self.rows):
            header, rows = header[:-1], [row[:-1] for row in rows]
        total = (
            f"total {format_bytes(self.nbytes)}, dense {format_bytes(self.dense_nbytes)}; "
            f"{self.bits_per_weight:.2f} bits/weight in quantized arrays"
        )
        odd = [row.path for row in self.rows if row.is_quantized and row.note]
        if odd:
            total += (
                f"\nquantized, although not like a weight: {len(odd)}. Pass inputs=(...), the arguments of a call, to quantize "
                f"only what it uses as a weight; or leave arrays out by path, as in {{{odd[0]!r}: None, '*': ...}}"
            )
        return f"{format_table(header, rows, left=3)}\n{total}"


def report(
    dense: Any,
    quantized: Any,
    *,
    inputs: Sequence[Any] | None = None,
    call: Callable[..., Any] | None = None,
) -> Report:
    """Compares a model with its quantized form, array by array.

    **Arguments:**

    - `dense`: the model that was quantized.
    - `quantized`: what [`quantize`][eqquant.quantize] made of it.
    - `inputs`, `call`: as for `quantize`. They say what is a weight, for the notes; without, names and shapes do.

    **Returns:** a [`Report`][eqquant.Report].

    **Raises:** `ValueError` if the two do not have the same paths and shapes.

    !!! example

        ```python
        import equinox as eqx, jax
        import eqquant as eqq

        model = eqx.nn.MLP(8, 4, 16, 2, key=jax.random.key(0))
        print(eqq.report(model, eqq.quantize(model, eqq.Array8B.quantize)))
        ```
    """
    before, after = _arrays(dense), _arrays(quantized)
    if [name for name, _ in before] != [name for name, _ in after]:
        odd = sorted({name for name, _ in before} ^ {name for name, _ in after})
        raise ValueError(f"The two models do not have the same arrays; they differ in {odd[:3]}.")
    rows, seen = [], set()
    notes = _notes(dense, quantized, weights_in_call(dense, inputs, call))
    for (name, x), (_, q) in zip(before, after, strict=True):
        if tuple(x.shape) != tuple(q.shape):
            raise ValueError(
                f"{name!r} has shape {x.shape} in one model and {q.shape} in the other."
            )
        if identity(q) in seen:
            continue
        seen.add(identity(q))
        noise = float(_sqnr_db(x, q)) if is_implicit(q) and not is_implicit(x) else None
        rows.append(_row(name, x, q, noise, notes.get(name, "")))
    return Report(tuple(rows))


def plan(
    tree: Any,
    how: How,
    *,
    inputs: Sequence[Any] | None = None,
    call: Callable[..., Any] | None = None,
) -> Report:
    """What [`quantize`][eqquant.quantize] would make of `tree`: paths, formats, sizes.

    Works on shapes and allocates no array; `tree` may hold `jax.ShapeDtypeStruct`s (as made by
    `eqx.filter_eval_shape`), so a model need not fit to be planned.

    **Arguments:** as for [`quantize`][eqquant.quantize].

    **Returns:** a [`Report`][eqquant.Report] without SQNR. Its notes say which arrays would be quantized, although they look like no
    weight; and, with `inputs`, which matrices the call does not use as weights.

    !!! example

        ```python
        import equinox as eqx, jax
        import eqquant as eqq

        shapes = eqx.filter_eval_shape(eqx.nn.Linear, 4096, 4096, key=jax.random.key(0))
        print(eqq.plan(shapes, eqq.Array8B.quantize))
        ```
    """

    def shape_of(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_float_array(x) else x

    shapes = map_arrays(shape_of, tree)
    weights = weights_in_call(shapes, inputs, call)
    planned = quantize_among(shapes, how, weights)
    rows, seen = [], set()
    notes = _notes(tree, planned, weights)
    for (name, x), (_, q) in zip(_arrays(tree), _arrays(planned), strict=True):
        if identity(q) not in seen:
            seen.add(identity(q))
            rows.append(_row(name, x, q, None, notes.get(name, "")))
    return Report(tuple(rows))


_LOOKS = {
    "a mask": {"mask", "masks"},
    "a norm": {"norm", "ln", "gamma", "gain", "scale", "scales"},
    "a bias": {"bias", "biases", "beta"},
    "a table of positions": {"cos", "sin", "rope", "rotary", "freq", "freqs", "alibi"},
}


def _notes(dense: Any, quantized: Any, weights: set[str] | None) -> dict[str, str]:
    """What is odd about arrays, by path."""
    after = dict(_arrays(quantized))
    if weights is not None:
        matrices = [name for name, x in _arrays(dense) if is_matrix(x) and name not in weights]
        return dict.fromkeys(matrices, "not used as a weight")
    stacks = {
        (name.rpartition(".")[0], x.shape[0])
        for name, x in _arrays(dense)
        if is_float_array(x) and sum(n != 1 for n in x.shape) >= 3
    }
    notes = {}
    for name, x in _arrays(dense):
        if is_implicit(x) or not is_implicit(after[name]):
            continue
        if look := _look_of(name):
            notes[name] = f"looks like {look}"
        elif x.ndim == 2 and (name.rpartition(".")[0], x.shape[0]) in stacks:
            notes[name] = "looks like a stack of vectors"
    return notes


def _look_of(path: str) -> str:
    """What the names in a path say that an array is, if it is no weight."""
    words = [set(re.findall(r"[a-z]+", part.lower())) for part in path.split(".")]
    for look, names in _LOOKS.items():
        if names & words[-1] or (
            look == "a norm" and any("norm" in w for w in set().union(*words))
        ):
            return look
    return ""


def _arrays(tree: Any) -> list[tuple[str, Any]]:
    leaves = jtu.tree_leaves_with_path(tree, is_leaf=is_implicit)
    return [(path_name(path), x) for path, x in leaves if _is_array(x) or is_implicit(x)]


def _row(name: str, dense: Any, stored: Any, sqnr_db: float | None, note: str) -> ReportRow:
    is_quantized = isinstance(stored, QuantizedArray)
    nbytes = stored.nbytes if is_quantized else leaf_nbytes(stored)
    size = math.prod(stored.shape)
    return ReportRow(
        path=name,
        format=type(stored).__name__ if is_quantized else str(stored.dtype),
        shape=tuple(stored.shape),
        bits_per_weight=8 * nbytes / size if size else 0.0,
        nbytes=nbytes,
        dense_nbytes=leaf_nbytes(dense),
        sqnr_db=sqnr_db,
        is_quantized=is_quantized,
        note=note,
    )


@jax.jit
def _sqnr_db(x: Any, q: QuantizedArray) -> jax.Array:
    x = x.astype(promote_types(x.dtype, jnp.float32))
    error = x - q.materialize().astype(x.dtype)
    peak = jnp.max(jnp.abs(x), initial=jnp.finfo(x.dtype).tiny)  # squares must not overflow
    signal, noise = jnp.sum((x / peak) ** 2), jnp.sum((error / peak) ** 2)
    return jnp.where(noise == 0, jnp.inf, 10 * jnp.log10(signal / noise))
