"""Binary and ternary matrices as segments of their rows: the operators of RSR."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, UInt8, UInt16

from .._checks import (
    as_floats,
    check_dtype,
    check_finite,
    check_integers,
    inherit_sharding,
    normalize_axes,
)
from .._implicit import implicit
from .._scaled import AbstractScaledArray
from .._sharding import check_tiles
from ..coding import Coding, TernaryCoding
from ..rounding import mean_where
from ..tiles import Leaf, Packing, Tile


class RSROperatorBinary(AbstractScaledArray):
    r"""Stores a matrix $A \in \{0, 1\}^{n \times m}$ as codes: the $k$ entries of a row of a block of
    $k$ columns are one $k$-bit number. Up to a `scale`, if there is one.

    This is the preprocessing of RSR, Redundant Segment Reduction
    ([arXiv:2411.06360](https://arxiv.org/abs/2411.06360)), called Randomized Sparse Representation
    elsewhere. There, $v A$ is computed block by block: first the entries of $v$ that meet equal codes
    are summed, $u_c = \sum_{i: c_i = c} v_i$; then the $2^k$ sums are multiplied with the binary
    expansion of their codes. With $k = \log_2 n - \log_2 \log_2 n$ these are $O(n^2 / \log n)$ additions for a
    square matrix. The one-hot matrices that write the first step as a product hold $2^k$ numbers
    for each code, so they are never stored; [`one_hot_maps`][eqquant.RSROperatorBinary.one_hot_maps]
    makes them on demand.

    The codes take 1 bit for each entry with `k=8` or `k=16`, and $8/k$ or $16/k$ else.

    !!! example

        ```python
        import jax.numpy as jnp
        import eqquant as eqq

        a = jnp.array([[0, 1, 1, 0], [1, 0, 0, 1]])
        op = eqq.RSROperatorBinary.from_matrix(a, k=4)
        v = jnp.array([1.0, 2.0])
        assert (op.dot(v) == v @ a).all()
        ```
    """

    codes: UInt8[Array, "..."] | UInt16[Array, "..."]
    """Of shape (n, blocks): bit `j` of a code is the entry in column `j` of the block."""
    scale: Float[Array, "..."] | None
    """One number for each tile; None if all are 1."""
    packing: Packing | None = eqx.field(static=True)
    """The packed axis, its length, and `k`."""
    dtype: np.dtype = eqx.field(static=True)
    """The dtype of the logical array."""
    casts: tuple[np.dtype, ...] = eqx.field(static=True)
    """Dtypes that the values were rounded to before they were cast to `dtype`."""

    payload: ClassVar[str] = "codes"
    coding: ClassVar[Coding] = Coding(bits=1)
    block_size: ClassVar[None] = None

    def __init__(
        self,
        codes: UInt8[Array, "..."] | UInt16[Array, "..."],
        k: int | None = None,
        padding: int = 0,
        org_dtype: Any = None,
        *,
        shape: Sequence[int] | None = None,
        dtype: Any = None,
        scale: Float[Array, "..."] | None = None,
        packing: Packing | None = None,
        casts: tuple[np.dtype, ...] = (),
    ):
        """Builds an operator from codes that exist already.

        **Arguments:**

        - `codes`: as described under [`codes`][eqquant.RSROperatorBinary.codes].
        - `k`: how many columns a code holds.
        - `padding`: how many columns of the last block are not part of the matrix.
        - `org_dtype`, `dtype`: of the logical array; float32 by default.
        - `shape`: of the logical array; checked if given.
        - `scale`: of the rank of `codes`; None if all scales are 1.
        - `packing`: instead of `k` and `padding`, if another axis than the last is packed.

        **Raises:** `ValueError` if the leaves do not fit each other or the other arguments.
        """
        if packing is None and k is not None:
            _check_k("RSROperatorBinary", k)
            packing = Packing(-1, k * codes.shape[-1] - padding, Tile(k))
        self.codes, self.scale, self.packing, self.casts = codes, scale, packing, casts
        dtype = org_dtype if dtype is None else dtype
        dtype = jnp.float32 if dtype is None else dtype
        self.dtype = check_dtype("RSROperatorBinary(dtype=...)", dtype, integers=True)
        if shape is not None and tuple(shape) != self.shape:
            raise ValueError(f"shape={tuple(shape)} but the leaves say {self.shape}.")

    @property
    def k(self) -> int:
        """How many columns a code holds."""
        return 1 if self.packing is None else self.packing.tile.size

    @property
    def padding(self) -> int:
        """How many columns of the last block are not part of the matrix."""
        return 0 if self.packing is None else -self.packing.length % self.k

    @property
    def org_dtype(self) -> np.dtype:
        """Alias of `dtype`."""
        return self.dtype

    @property
    def one_hot_maps(self) -> Float[Array, "blocks n codes"]:
        """The one-hot form of the codes, of shape (blocks, n, 2**k): $128 k$ or more times their size.

        Made on demand. Block `b` of $v A$ is `v @ one_hot_maps[b] @ bits`, where row `c` of `bits`
        is the binary expansion of `c`.
        """
        return jax.nn.one_hot(jnp.swapaxes(self.codes, -1, -2), 2**self.k)

    def dot(self, v: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        r"""$v A$ for a vector of length n, or a stack of them (..., n).

        **Arguments:**

        - `v`: an array; the others are those of `jnp.matmul`.

        **Returns:** an array of shape (..., m), in the dtype that `v @ A.materialize()` has.
        """
        return implicit(lambda v, a: jnp.matmul(v, a, **kwargs))(v, self)

    @classmethod
    def from_matrix(cls, A: Any, k: int = 8, org_dtype: Any = jnp.float32) -> "RSROperatorBinary":
        """Encodes a matrix of zeros and ones, exactly.

        **Arguments:**

        - `A`: of an integer dtype, any shape with at least one axis; columns are along the last.
        - `k`: how many columns a code holds, 1 to 16.
        - `org_dtype`: the dtype of the logical array.

        **Raises:** `TypeError` if `A` is not of integers; `ValueError` if it holds another number
        (outside tracing; under `jit`, positive numbers count as 1 and all others as 0), or if `k` is
        out of range.

        !!! example

            ```python
            import jax.numpy as jnp
            import eqquant as eqq

            op = eqq.RSROperatorBinary.from_matrix(jnp.eye(3, dtype=jnp.int8))
            assert op.codes.shape == (3, 1) and op.padding == 5
            ```
        """
        A = check_integers("RSROperatorBinary.from_matrix", A, (0, 1))
        out = _encode("RSROperatorBinary.from_matrix", A > 0, k, org_dtype)
        return inherit_sharding(out, A)

    @classmethod
    def quantize(
        cls, A: Any, k: int = 8, *, axis: int = -1, dtype: Any = None
    ) -> "RSROperatorBinary":
        """Approximates a matrix by zeros and a positive number for each row.

        **Arguments:**

        - `A`: of a floating-point dtype. Positive entries become the scale, all others 0. Integers are
            encoded as by `from_matrix`.
        - `k`: how many columns a code holds, 1 to 16.
        - `axis`: the axis along which entries share a scale: the mean of the positive ones.
        - `dtype`: of the logical array; that of `A` by default.

        **Raises:** `ValueError` if `A` holds NaN or infinity (outside tracing), or an argument is out
        of range.
        """
        where = "RSROperatorBinary.quantize"
        if hasattr(A, "dtype") and jnp.issubdtype(A.dtype, jnp.integer):
            return cls.from_matrix(A, k, A.dtype if dtype is None else dtype)
        A, axis, dtype = _check_arguments(where, A, axis, dtype)
        pattern, scale = _binarize(A, axis)
        check_finite(where, A, scale)
        out = _encode(where, pattern, k, dtype).replace(scale=scale)
        return inherit_sharding(out, A)


class RSROperatorTernary(AbstractScaledArray):
    r"""Stores a matrix $A \in \{-1, 0, 1\}^{n \times m}$ as two binary ones, $A = B_1 - B_2$, so that
    $v A = v B_1 - v B_2$: see [`RSROperatorBinary`][eqquant.RSROperatorBinary]. Up to a `scale`, if there
    is one. 2 bits for each entry with `k=8` or `k=16`.

    !!! example

        ```python
        import jax.numpy as jnp
        import eqquant as eqq

        a = jnp.array([[-1, 0, 1], [1, -1, 0]])
        op = eqq.RSROperatorTernary.from_matrix(a, k=4)
        v = jnp.array([1.0, 2.0])
        assert (op.dot(v) == v @ a).all()
        ```
    """

    rsr_b1: RSROperatorBinary
    """Where `A` is 1."""
    rsr_b2: RSROperatorBinary
    """Where `A` is -1."""
    scale: Float[Array, "..."] | None
    """One number for each tile; None if all are 1."""
    dtype: np.dtype = eqx.field(static=True)
    """The dtype of the logical array."""
    casts: tuple[np.dtype, ...] = eqx.field(static=True)
    """Dtypes that the values were rounded to before they were cast to `dtype`."""

    payload: ClassVar[str] = "rsr_b1"
    high_payload: ClassVar[str] = "rsr_b2"
    coding: ClassVar[Coding] = TernaryCoding()
    block_size: ClassVar[None] = None

    def __init__(
        self,
        rsr_b1: RSROperatorBinary,
        rsr_b2: RSROperatorBinary,
        *,
        shape: Sequence[int] | None = None,
        dtype: Any = None,
        scale: Float[Array, "..."] | None = None,
        casts: tuple[np.dtype, ...] = (),
    ):
        """Builds an operator from two binary ones of equal shape and `k`, without scales.

        **Arguments:**

        - `rsr_b1`, `rsr_b2`: where the matrix is 1, and where it is -1.
        - `shape`: of the logical array; checked if given.
        - `dtype`: of the logical array; that of `rsr_b1` by default.
        - `scale`: of the rank of the matrix; None if all scales are 1.

        **Raises:** `ValueError` if the operators do not fit each other or the other arguments.
        """
        self.rsr_b1, self.rsr_b2, self.scale, self.casts = rsr_b1, rsr_b2, scale, casts
        self.dtype = rsr_b1.dtype if dtype is None else jnp.dtype(dtype)
        if shape is not None and tuple(shape) != self.shape:
            raise ValueError(f"shape={tuple(shape)} but the leaves say {self.shape}.")

    def __check_init__(self) -> None:
        if (self.rsr_b1.packing, self.rsr_b1.shape) != (self.rsr_b2.packing, self.rsr_b2.shape):
            raise ValueError(
                f"rsr_b1 and rsr_b2 must be packed alike; they are {self.rsr_b1!r} and {self.rsr_b2!r}."
            )

    @property
    def packing(self) -> Packing | None:
        """The packed axis, its length, and `k`."""
        return self.rsr_b1.packing

    @property
    def payloads(self) -> dict[str, Any]:
        """The codes of both operators."""
        return {"rsr_b1": self.rsr_b1.codes, "rsr_b2": self.rsr_b2.codes}

    def plane(self, i: int, dtype: Any) -> Array:
        return self.rsr_b1.plane(i, dtype) - self.rsr_b2.plane(i, dtype)

    def filler(self, name: str) -> int:
        return 0

    def _packing_of(self, name: str) -> Packing | None:
        return self.packing

    def _with_payloads(self, leaves: dict[str, Leaf], packing: Packing | None) -> dict[str, Any]:
        return {
            name: getattr(self, name).replace(codes=leaf.array, packing=packing)
            for name, leaf in leaves.items()
        }

    def _encoded(self, values: Array) -> dict[str, Any]:
        return {
            "rsr_b1": self.rsr_b1.encode(values > 0.5),
            "rsr_b2": self.rsr_b2.encode(values < -0.5),
        }

    def dot(self, v: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        r"""$v A$ for a vector of length n, or a stack of them (..., n): as
        [`RSROperatorBinary.dot`][eqquant.RSROperatorBinary.dot]."""
        return implicit(lambda v, a: jnp.matmul(v, a, **kwargs))(v, self)

    @classmethod
    def from_matrix(cls, A: Any, k: int = 8, org_dtype: Any = jnp.float32) -> "RSROperatorTernary":
        """Encodes a matrix of -1, 0 and 1, exactly.

        **Arguments and errors:** as [`RSROperatorBinary.from_matrix`][eqquant.RSROperatorBinary.from_matrix].
        """
        A = check_integers("RSROperatorTernary.from_matrix", A, (-1, 0, 1))
        where = "RSROperatorTernary.from_matrix"
        plus, minus = (_encode(where, signs, k, org_dtype) for signs in (A > 0, A < 0))
        return inherit_sharding(cls(plus, minus), A)

    @classmethod
    def quantize(
        cls, A: Any, k: int = 8, *, axis: int = -1, dtype: Any = None
    ) -> "RSROperatorTernary":
        """Approximates a matrix by -1, 0 and 1 times a number for each row, as
        [`Array1B.quantize`][eqquant.Array1B.quantize] does with `scale="absmean"`.

        **Arguments:**

        - `A`: of a floating-point dtype. Integers are encoded as by `from_matrix`.
        - `k`: how many columns a code holds, 1 to 16.
        - `axis`: the axis along which entries share a scale.
        - `dtype`: of the logical array; that of `A` by default.

        **Raises:** `ValueError` if `A` holds NaN or infinity (outside tracing), or an argument is out
        of range.
        """
        where = "RSROperatorTernary.quantize"
        if hasattr(A, "dtype") and jnp.issubdtype(A.dtype, jnp.integer):
            return cls.from_matrix(A, k, A.dtype if dtype is None else dtype)
        A, axis, dtype = _check_arguments(where, A, axis, dtype)
        pattern, scale = _ternarize(A, axis)
        check_finite(where, A, scale)
        plus, minus = (_encode(where, signs, k, dtype) for signs in (pattern > 0, pattern < 0))
        return inherit_sharding(cls(plus, minus, scale=scale), A)


def _check_k(where: str, k: int) -> None:
    if not 1 <= k <= 16:
        raise ValueError(f"k must be from 1 to 16; {where}(..., k={k!r}) was given {k!r}.")


def _check_arguments(where: str, A: Any, axis: int, dtype: Any) -> tuple[Array, int, np.dtype]:
    """The floating-point matrix, a non-negative axis and the dtype that `quantize` was given."""
    A, dtype = as_floats(where, A, dtype)
    _check_matrix(where, A)
    (axis,) = normalize_axes(f"{where}(axis=...)", axis, A.ndim)
    return A, axis, dtype


def _check_matrix(where: str, A: Array) -> None:
    if not A.ndim:
        raise ValueError(f"{where} takes a matrix; it was given an array without axes.")


def _encode(where: str, ones: Array, k: int, dtype: Any) -> RSROperatorBinary:
    """The operator with ones where `ones` holds."""
    _check_k(where, k)
    _check_matrix(where, ones)
    packing = Packing(-1, ones.shape[-1], Tile(k))
    return RSROperatorBinary(_codes(ones, packing), packing=packing, dtype=dtype)


@partial(jax.jit, static_argnums=1)
def _codes(ones: Array, packing: Packing) -> Array:
    check_tiles(ones, packing.axis % ones.ndim, packing.tile.size)
    return RSROperatorBinary.coding.pack(packing.split(ones.astype(jnp.uint8)))


@partial(jax.jit, static_argnums=1)
def _binarize(x: Array, axis: int) -> tuple[Array, Array]:
    others = jnp.where(jnp.isfinite(x), jnp.zeros((), x.dtype), jnp.nan)
    scale = mean_where(jnp.where(x > 0, x, others), x > 0, (axis,))
    return x > 0, scale


@partial(jax.jit, static_argnums=1)
def _ternarize(x: Array, axis: int) -> tuple[Array, Array]:
    x = x.astype(jnp.float32)
    scale = mean_where(jnp.abs(x), jnp.ones(x.shape, bool), (axis,))
    pattern = (x > scale / 2).astype(jnp.int8) - (x < -scale / 2).astype(jnp.int8)
    return pattern, scale
