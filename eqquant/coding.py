"""How numbers are written in the payload of a format: codes as data.

From a `Coding` follow the values that are stored, the planes that products read, how many bits a weight takes, and
which code is nearest to a number.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ._sharding import look_up


@dataclasses.dataclass(frozen=True)
class Coding:
    """Codes of a fixed number of bits, each of which stands for a number.

    Without `levels`, code $c$ stands for the integer `low + step * c`; with them, for `levels[c]`. One stored
    number holds one code, or several side by side.

    !!! example

        ```python
        import jax.numpy as jnp
        from eqquant.coding import Coding

        coding = Coding(bits=4, low=-8)  # integers from -8 to 7
        codes = coding.nearest(jnp.array([-7.9, 0.2, 99.0]))
        assert coding.value(codes, jnp.float32).tolist() == [-8, 0, 7]
        ```
    """

    bits: int
    """How many bits a code has."""
    low: int = 0
    """The integer that code 0 stands for."""
    step: int = 1
    """How much larger the integer of the next code is."""
    levels: tuple[float, ...] | None = None
    """A codebook: the number that each code stands for. None: integers."""
    first: Literal["low", "high"] = "low"
    """Which bits of a stored number hold the first of its codes: the lowest, or the highest."""
    high_bits: int = 0
    """How many of the bits are stored in a second payload."""
    signed: bool = False
    """Whether a stored number *is* its integer, in two's complement."""
    ties: Literal["lower", "even"] = "lower"
    """To which of two levels that are equally near a number goes: to the lower one, or to that of the even code."""

    def __post_init__(self) -> None:
        if self.levels is not None and len(self.levels) != 2**self.bits:
            raise ValueError(
                f"{self.bits} bits are codes of {2**self.bits} levels; Coding(levels=...) has {len(self.levels)}."
            )

    # ------------------------------------------------------------------------- what a code means

    def value(self, codes: Array, dtype: Any) -> Array:
        """The numbers that these codes stand for."""
        if self.levels is not None:
            return look_up(jnp.asarray(self.levels, dtype), codes)
        if self.signed or (self.low, self.step) == (0, 1):
            return codes.astype(dtype)
        # In 16 bits: CPUs compute in those as fast as in 8, GPUs in two thirds of the instructions.
        steps = codes.astype(jnp.int16)
        return ((steps if self.step == 1 else self.step * steps) + self.low).astype(dtype)

    @property
    def range(self) -> tuple[float | int, float | int]:
        """The least and the largest number."""
        if self.levels is not None:
            return min(self.levels), max(self.levels)
        if self.signed:  # symmetric: the code -128 is not used
            return 1 - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1
        return self.low, self.low + self.step * (2**self.bits - 1)

    @property
    def low_bits(self) -> int:
        """How many of the bits are stored in the first payload."""
        return self.bits - self.high_bits

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return float(max(map(abs, self.range)))

    @property
    def is_integer(self) -> bool:
        """Whether all numbers are integers that fit in an int8."""
        return self.levels is None and self.range[0] >= -128 and self.range[1] <= 127

    @property
    def zero_code(self) -> int | None:
        """The code of 0; None if there is none."""
        if self.levels is not None:
            return self.levels.index(0.0) if 0.0 in self.levels else None
        if self.signed:
            return 0
        code, rest = divmod(-self.low, self.step)
        return code if not rest and 0 <= code < 2**self.bits else None

    def nearest(self, x: Array) -> Array:
        """The codes of the numbers that are nearest to `x`: of integers, ties go to the even one."""
        if self.levels is None:
            least, largest = self.range
            x = jnp.clip(
                jnp.round((x - self.low) / self.step) * self.step + self.low, least, largest
            )
            dtype = jnp.int8 if self.signed else jnp.uint8
            return x.astype(dtype) if self.signed else ((x - self.low) / self.step).astype(dtype)
        codes, midpoints = self._ranked
        ranks = bisect(x, midpoints)
        return (
            ranks
            if codes == (*range(len(codes)),)
            else look_up(jnp.asarray(codes, jnp.uint8), ranks)
        )

    def nearest_value(self, x: Array) -> Array:
        """The numbers that are nearest to `x`: of levels, without a table, element by element."""
        if self.levels is None:
            return self.value(self.nearest(x), x.dtype)
        codes, midpoints = self._ranked
        value = jnp.full_like(x, self.levels[codes[0]])
        for midpoint, code in zip(midpoints, codes[1:], strict=True):
            value = jnp.where(x > midpoint, np.float32(self.levels[code]), value)
        return value

    @functools.cached_property
    def _ranked(self) -> tuple[tuple[int, ...], tuple[np.float32, ...]]:
        """The codes in the order of their levels, and the numbers above which the next one is nearest."""
        assert self.levels is not None
        order = sorted({level: code for code, level in reversed([*enumerate(self.levels)])}.items())
        midpoints = []
        for (a, code_a), (b, code_b) in itertools.pairwise(order):
            middle = np.float32((a + b) / 2)
            to_upper = self.ties == "even" and code_a % 2 > code_b % 2
            midpoints.append(np.nextafter(middle, np.float32(-np.inf)) if to_upper else middle)
        return tuple(code for _, code in order), tuple(midpoints)

    # ------------------------------------------------------------------- what a stored number holds

    def unpack(self, stored: Array, place: int, elements: int, high: bool = False) -> Any:
        """The codes in place `place` of stored numbers that hold `elements` codes each. With `high`, the numbers are those
        of the second payload, which hold the high bits."""
        if self.signed:
            return stored
        bits = self.high_bits if high else self.low_bits
        shift = bits * (place if self.first == "low" else elements - 1 - place)
        return (stored >> shift) & (2**bits - 1)

    def pack(self, planes: Sequence[Any], high: bool = False) -> Any:
        """The stored numbers of the codes in all places: the inverse of `unpack`. They hold the low bits of the codes, or
        with `high` the high ones."""
        if self.signed:
            (plane,) = planes
            return plane
        low_bits = self.low_bits
        bits = self.high_bits if high else low_bits
        dtype = jnp.uint8 if bits * len(planes) <= 8 else jnp.uint16
        places = range(len(planes)) if self.first == "low" else range(len(planes) - 1, -1, -1)
        of_each = [(plane >> low_bits if high else plane) & (2**bits - 1) for plane in planes]
        shifted = [
            plane.astype(dtype) << bits * place
            for plane, place in zip(of_each, places, strict=True)
        ]
        return functools.reduce(operator.or_, shifted)

    def filler(self, elements: int, high: bool = False) -> int | None:
        """A stored number all of whose elements are 0; None if 0 has no code."""
        if self.zero_code is None:
            return None
        code: Any = np.full((), self.zero_code, np.int8 if self.signed else np.uint8)
        return int(self.pack([code] * elements, high))


@dataclasses.dataclass(frozen=True)
class TernaryCoding(Coding):
    """The integers -1, 0, 1 as five digits of a number in base 3, first digit first: as the fraction of 243 that it
    is, in units of 1/256, rounded up."""

    bits: int = 2
    low: int = -1

    @property
    def range(self) -> tuple[float | int, float | int]:
        return -1, 1

    def unpack(self, stored: Array, place: int, elements: int, high: bool = False) -> Any:
        # Times 3^i, in arithmetic modulo 1, the fraction begins with digit i: times 3, its integer part is the digit.
        fraction = stored * jnp.uint8(3**place)
        return (fraction.astype(jnp.uint16) * 3) >> 8

    def pack(self, planes: Sequence[Any], high: bool = False) -> Any:
        digits = (plane.astype(jnp.int32) * 3 ** (4 - i) for i, plane in enumerate(planes))
        number = functools.reduce(operator.add, digits)
        return ((number * 256 + 242) // 243).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class FloatCoding(Coding):
    """The bit patterns of floating-point numbers of 8 bits, such as `float8_e4m3fn`."""

    bits: int = 8
    kind: str = "float8_e4m3fn"
    """The name of the dtype."""

    @property
    def range(self) -> tuple[float | int, float | int]:
        info = jnp.finfo(self.kind)
        return float(info.min), float(info.max)

    @property
    def is_integer(self) -> bool:
        return False

    @property
    def zero_code(self) -> int:
        return 0

    def value(self, codes: Array, dtype: Any) -> Array:
        return lax.bitcast_convert_type(codes, jnp.dtype(self.kind)).astype(dtype)

    def nearest(self, x: Array) -> Array:
        """The bit patterns of the nearest numbers, ties to even; beyond the largest number, those of the largest."""
        clipped = jnp.clip(x, *self.range).astype(jnp.dtype(self.kind))
        return lax.bitcast_convert_type(clipped, jnp.uint8)


def bisect(x: Array, midpoints: Sequence[Any] | np.ndarray) -> Array:
    """How many of these increasing numbers are below `x`, by bisection: element by element, so that the result is
    split over devices as `x` is."""
    bits = max(len(midpoints), 1).bit_length()
    filled = [*midpoints, *[np.float32(np.inf)] * (2**bits - 1 - len(midpoints))]
    if bits > 5:  # too many to choose among without a table
        table, below = jnp.asarray(filled), jnp.zeros_like(x, jnp.int32)
        for step in (1 << i for i in reversed(range(bits))):
            below = jnp.where(x > look_up(table, below + (step - 1)), below + step, below)
        return below.astype(jnp.uint8)
    above: list[Array] = []

    def halve(bits: Sequence[Array], candidates: Sequence[Any]) -> Any:
        """The number to compare with next: the middle of those that the comparisons so far leave."""
        middle = len(candidates) // 2
        if not bits:
            return candidates[middle]
        upper, lower = candidates[middle + 1 :], candidates[:middle]
        return jnp.where(bits[0], halve(bits[1:], upper), halve(bits[1:], lower))

    for _ in range(bits):
        above.append(x > halve(above, filled))
    places = [bit.astype(jnp.uint8) << (bits - 1 - i) for i, bit in enumerate(above)]
    return functools.reduce(operator.or_, places)
