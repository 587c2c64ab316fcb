"""What a quantized array is for its users: a logical array with operators, indexing and methods."""

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import Array
from jax.core import Tracer

from ._daylight import report_materialized
from ._eager import call
from ._implicit import implicit
from ._implicit_array import ImplicitArray


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: "QuantizedArray", *others: Any) -> Any:
        if not all(map(_is_operand, others)):
            return NotImplemented
        return call(function, (self, *others))

    return method


def _reflected(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: "QuantizedArray", other: Any) -> Any:
        if not (_is_operand(other) and self.commute_ops):
            return NotImplemented
        return call(function, (other, self))

    return method


def _power(self: "QuantizedArray", exponent: Any) -> Any:
    if not _is_operand(exponent):
        return NotImplemented
    if isinstance(exponent, int):  # products, if it is known
        return call(operator.pow, (self,), (exponent,))
    return call(operator.pow, (self, exponent))


def _round(self: "QuantizedArray", decimals: int = 0) -> Any:
    return call(jnp.round, (self,), (decimals,))


def _attribute(x: Any, name: str) -> Any:
    return getattr(x, name)


def _item(x: Any, *parts: Any) -> Any:
    """`x[index]`, of the arrays in the index, and of its form: what else is in it, and where they belong."""
    *arrays, form = parts
    there = iter(arrays)
    index = [
        next(there) if part is _ARRAY else slice(*part[1]) if isinstance(part, tuple) else part
        for part in form
    ]
    return x[tuple(index)]


_ARRAY = "array"


def _form_of_index(index: Any) -> tuple[list[Any], tuple[Any, ...]] | None:
    """The arrays of integers in an index, and the rest of it, which can be a key; None if it has other parts."""
    arrays, form = [], []
    for part in index if isinstance(index, tuple) else (index,):
        if part is None or part is Ellipsis or type(part) is int:
            form.append(part)
        elif isinstance(part, np.integer):
            form.append(int(part))
        elif isinstance(part, slice):
            ends = part.start, part.stop, part.step
            if not all(end is None or type(end) is int for end in ends):
                return None
            form.append((slice, ends))
        elif isinstance(part, (Array, np.ndarray)) and jnp.issubdtype(part.dtype, jnp.integer):
            arrays.append(part)
            form.append(_ARRAY)
        else:  # masks have to be known; and whatever an array refuses
            return None
    return arrays, tuple(form)


def _called(x: Any, *parts: Any) -> Any:
    """`x.name(*args, **kwargs)`, of the arrays among the arguments, and of what else they hold."""
    *operands, name, treedef, known = parts
    there = iter(operands)
    args, kwargs = jtu.tree_unflatten(
        treedef, [next(there) if leaf is _ARRAY else leaf[1] for leaf in known]
    )
    return getattr(x, name)(*args, **kwargs)


_TAKE_ARRAYS = ("clip", "dot", "searchsorted", "take")
"""The methods whose arguments may be arrays that are not known when they are traced."""


def _method(name: str) -> Callable[..., Any]:
    """The method of this name that an array has, by the rules."""

    def method(self: "QuantizedArray", *args: Any, **kwargs: Any) -> Any:
        return self._call(name, *args, **kwargs)

    method.__name__, method.__doc__ = name, f"As `jax.Array.{name}`."
    return method


def _is_leaf(x: Any) -> bool:
    return x is None or _is_implicit(x)


def _is_implicit(x: Any) -> bool:
    return isinstance(x, ImplicitArray)


def _is_operand(x: Any) -> bool:
    return isinstance(
        x, (bool, int, float, complex, Array, np.ndarray, np.generic, ImplicitArray)
    ) or hasattr(x, "__jax_array__")


class QuantizedArray(ImplicitArray):
    """An array whose values are stored in few bits.

    It is used in place of a `jax.Array`: the operators, indexing and array methods below go
    through the same rules as [`implicit`][eqquant.implicit] and keep the packed form where it can
    be kept. `jax.numpy` functions accept it too, but JAX makes it dense first, with a
    [`MaterializeWarning`][eqquant.MaterializeWarning]; call them inside `implicit` instead.

    Only [`materialize`][eqquant.QuantizedArray.materialize], `shape` and `dtype` are abstract.
    """

    commute_ops: ClassVar[bool] = True
    """Whether Python operators with a quantized array on the right (`2 * q`) are served."""

    # NumPy leaves `numpy_array @ q` to us.
    __array_priority__: ClassVar[int] = 1000

    # ------------------------------------------------------------------------------ sizes

    @property
    def ndim(self) -> int:
        """The number of axes of the logical array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the logical array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored leaves."""
        return sum(map(leaf_nbytes, jtu.tree_leaves(self)))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales and padding included, for each logical element."""
        return 8 * self.nbytes / self.size if self.size else 0.0

    def __repr__(self) -> str:
        try:
            leaves = ", ".join(
                f"{jtu.keystr(path, simple=True, separator='.')}={leaf.dtype}[{','.join(map(str, leaf.shape))}]"
                for path, leaf in jtu.tree_leaves_with_path(self)
            )
            shape = ",".join(map(str, self.shape))
            bits = f"{self.bits_per_weight:.4g} bits/weight"
            return f"{type(self).__name__}({self.dtype}[{shape}], {bits}, {leaves})"
        except (AttributeError, TypeError, IndexError):  # leaves replaced by None, masks, …
            return eqx.tree_pformat(self)

    # ------------------------------------------------------------------------- dense forms

    def dequantize(self) -> Array:
        """Alias of `materialize`."""
        return self.materialize()

    def __jax_array__(self) -> Array:
        report_materialized(
            "__jax_array__", [self], "A jax.numpy function outside eqquant.implicit"
        )
        return self.materialize()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("A quantized array has no dense buffer: np.asarray(q) must copy.")
        report_materialized("__array__", [self], "A NumPy function, or one that saves arrays,")
        return np.asarray(self.materialize(), dtype)

    def delete(self) -> None:
        """Frees the buffers of the stored leaves now. Does nothing under tracing."""
        for leaf in jtu.tree_leaves(self):
            if isinstance(leaf, Array) and not isinstance(leaf, Tracer):
                leaf.delete()

    # ---------------------------------------------------------------------------- operators

    __add__, __radd__ = _operator(operator.add), _reflected(operator.add)
    __sub__, __rsub__ = _operator(operator.sub), _reflected(operator.sub)
    __mul__, __rmul__ = _operator(operator.mul), _reflected(operator.mul)
    __truediv__, __rtruediv__ = _operator(operator.truediv), _reflected(operator.truediv)
    __floordiv__, __rfloordiv__ = _operator(operator.floordiv), _reflected(operator.floordiv)
    __mod__, __rmod__ = _operator(operator.mod), _reflected(operator.mod)
    __divmod__, __rdivmod__ = _operator(divmod), _reflected(divmod)
    __pow__, __rpow__ = _power, _reflected(operator.pow)
    __matmul__, __rmatmul__ = _operator(operator.matmul), _reflected(operator.matmul)
    __neg__, __pos__, __abs__ = _operator(operator.neg), _operator(operator.pos), _operator(abs)
    __round__ = _round
    __and__, __rand__ = _operator(operator.and_), _reflected(operator.and_)
    __or__, __ror__ = _operator(operator.or_), _reflected(operator.or_)
    __xor__, __rxor__ = _operator(operator.xor), _reflected(operator.xor)
    __lshift__, __rlshift__ = _operator(operator.lshift), _reflected(operator.lshift)
    __rshift__, __rrshift__ = _operator(operator.rshift), _reflected(operator.rshift)
    __invert__ = _operator(operator.invert)
    __lt__, __le__ = _operator(operator.lt), _operator(operator.le)
    __gt__, __ge__ = _operator(operator.gt), _operator(operator.ge)
    __eq__ = _operator(operator.eq)  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    __ne__ = _operator(operator.ne)  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __hash__(self) -> int:
        return id(self)

    def __getitem__(self, index: Any) -> Any:
        if (form := _form_of_index(index)) is None:
            return implicit(lambda x: x[index])(self)
        arrays, known = form
        return call(_item, (self, *arrays), (known,))

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d quantized array.")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __contains__(self, x: Any) -> bool:
        return bool((self == x).any())

    def __bool__(self) -> bool:
        return bool(self.materialize())

    def __float__(self) -> float:
        return float(self.materialize())

    def __int__(self) -> int:
        return int(self.materialize())

    def __complex__(self) -> complex:
        return complex(self.materialize())

    # ------------------------------------------------------------------------- array methods

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The method of the logical array, by the rules."""
        leaves, treedef = jtu.tree_flatten((args, kwargs), is_leaf=_is_leaf)
        numbers = (int, float) if name == "clip" else ()
        arrays = [isinstance(leaf, (Array, np.ndarray, ImplicitArray, *numbers)) for leaf in leaves]
        if name in _TAKE_ARRAYS or not any(arrays):
            operands = [leaf for leaf, is_array in zip(leaves, arrays, strict=True) if is_array]
            known = tuple(
                _ARRAY if is_array else (type(leaf), leaf)
                for leaf, is_array in zip(leaves, arrays, strict=True)
            )
            return call(_called, (self, *operands), (name, treedef, known))
        # Only quantized arguments are traced: lengths, masks and the like have to be known.
        quantized, others = eqx.partition((args, kwargs), _is_implicit, is_leaf=_is_implicit)

        def method(x: Any, quantized: Any) -> Any:
            args, kwargs = eqx.combine(quantized, others)
            return getattr(x, name)(*args, **kwargs)

        return implicit(method)(self, quantized)

    @property
    def T(self) -> Any:
        """The logical array with its axes in reverse order."""
        return call(_attribute, (self,), ("T",))

    @property
    def mT(self) -> Any:
        """The logical array with its last two axes exchanged."""
        return call(_attribute, (self,), ("mT",))

    @property
    def at(self) -> Any:
        """`jax.Array.at` of the dense array: updated elements have no packed form."""
        report_materialized("at", [self])
        return self.materialize().at

    def reshape(self, *shape: Any, **kwargs: Any) -> Any:
        """As `jax.Array.reshape`; stays packed where tiles stay whole."""
        return self._call("reshape", *shape, **kwargs)

    def ravel(self) -> Any:
        """As `jax.Array.ravel`."""
        return self.reshape(-1)

    def squeeze(self, axis: Any = None) -> Any:
        """As `jax.Array.squeeze`."""
        return self._call("squeeze", axis)

    def transpose(self, *axes: Any) -> Any:
        """As `jax.Array.transpose`; always stays packed."""
        return self._call("transpose", *axes)

    def swapaxes(self, axis1: int, axis2: int) -> Any:
        """As `jax.Array.swapaxes`; always stays packed."""
        return self._call("swapaxes", axis1, axis2)

    def astype(self, dtype: Any) -> Any:
        """As `jax.Array.astype`; stays packed for floating-point dtypes."""
        return self._call("astype", dtype)

    def dot(self, other: Any, **kwargs: Any) -> Any:
        """As `jnp.dot(self, other)`."""
        return self._call("dot", other, **kwargs)

    def sum(self, axis: Any = None, **kwargs: Any) -> Any:
        """As `jax.Array.sum`."""
        return self._call("sum", axis, **kwargs)

    def mean(self, axis: Any = None, **kwargs: Any) -> Any:
        """As `jax.Array.mean`."""
        return self._call("mean", axis, **kwargs)

    def max(self, axis: Any = None, **kwargs: Any) -> Any:
        """As `jax.Array.max`."""
        return self._call("max", axis, **kwargs)

    def min(self, axis: Any = None, **kwargs: Any) -> Any:
        """As `jax.Array.min`."""
        return self._call("min", axis, **kwargs)

    flatten, copy, take, repeat = map(_method, ("flatten", "copy", "take", "repeat"))
    diagonal, trace, prod, std = map(_method, ("diagonal", "trace", "prod", "std"))
    var, ptp = map(_method, ("var", "ptp"))
    argmax, argmin, all, any = map(_method, ("argmax", "argmin", "all", "any"))
    cumsum, cumprod, sort, argsort = map(_method, ("cumsum", "cumprod", "sort", "argsort"))
    argpartition, searchsorted = map(_method, ("argpartition", "searchsorted"))
    clip, round, conj, conjugate = map(_method, ("clip", "round", "conj", "conjugate"))

    @property
    def real(self) -> Any:
        """The real part."""
        return call(_attribute, (self,), ("real",))

    @property
    def imag(self) -> Any:
        """The imaginary part."""
        return call(_attribute, (self,), ("imag",))

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the dense array."""
        return jnp.dtype(self.dtype).itemsize

    def nonzero(self, **kwargs: Any) -> tuple[Array, ...]:
        """As `jax.Array.nonzero`, of the dense array: how many there are depends on all values."""
        report_materialized("nonzero", [self])
        return self.materialize().nonzero(**kwargs)

    def compress(self, *args: Any, **kwargs: Any) -> Array:
        """As `jax.Array.compress`, of the dense array, likewise."""
        report_materialized("compress", [self])
        return self.materialize().compress(*args, **kwargs)

    def item(self, *args: Any) -> bool | int | float | complex:
        """As `jax.Array.item`."""
        return self.materialize().item(*args)

    def tolist(self) -> Any:
        """The dense array as a number, or as lists of numbers."""
        return self.materialize().tolist()

    def block_until_ready(self) -> "QuantizedArray":
        """Waits until all stored leaves are computed."""
        return jax.block_until_ready(self)

    def copy_to_host_async(self) -> None:
        """Starts to copy the stored leaves to the host."""
        jax.copy_to_host_async(self)

    def devices(self) -> set[Any]:
        """The devices on which the stored leaves lie."""
        return set().union(*(leaf.devices() for leaf in jtu.tree_leaves(self)))

    def is_deleted(self) -> bool:
        """Whether a stored leaf was deleted."""
        return True in [leaf.is_deleted() for leaf in jtu.tree_leaves(self)]


def leaf_nbytes(leaf: Any) -> int:
    """Bytes of one stored array; sub-byte dtypes count as the bits they are."""
    dtype = leaf.dtype  # of random keys, it is none of NumPy
    if jnp.issubdtype(dtype, jnp.integer):
        bits = jnp.iinfo(dtype).bits
    elif jnp.issubdtype(dtype, jnp.floating):
        bits = jnp.finfo(dtype).bits
    else:
        bits = 8 * dtype.itemsize
    return -(-math.prod(leaf.shape) * bits // 8)
