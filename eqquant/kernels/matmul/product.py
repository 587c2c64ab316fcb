"""A product with a quantized weight, where it is to run, and what computes it."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ..._scaled import AbstractScaledArray
from ...tiles import Packing
from .axes import Axes


MANY = 1 << 40
DIGITS = 3
"""So many 8-bit digits say all of a number in float32."""


def count(lengths: Iterable[Any]) -> int:
    """How many elements axes of these lengths have, for choices: `MANY` if a length is a symbol, in a program that is
    exported for all of them."""
    lengths = tuple(lengths)
    known = all(isinstance(n, (int, np.integer)) for n in lengths)
    return math.prod(lengths) if known else MANY


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """`lax.dot_general(x, w)`, in the dtype `accumulate`. Operands may be abstract."""

    x: Any
    w: AbstractScaledArray
    axes: Axes
    precision: Any = None
    accumulate: Any = jnp.float32
    digits: int = DIGITS
    """How many 8-bit digits say all of `x`: 1 if what is summed up together is rounded to 8 bits."""

    def replace(self, **changes: Any) -> "Product":
        """A copy with some of its fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def rows(self) -> int:
        """How many rows each matrix of the batch is multiplied with."""
        return count(self.x.shape[axis] for axis in self.axes.x_free(self.x.ndim))

    @property
    def inputs(self) -> int:
        """How many elements `x` has."""
        return count(self.x.shape)

    @property
    def outputs(self) -> int:
        """How many results each row has."""
        return math.prod(self.w.shape[axis] for axis in self.axes.w_free(self.w.ndim))

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of the result: batch axes, free axes of `x`, free axes of `w`."""
        x, w, axes = self.x, self.w, self.axes
        of_x = [*axes.x_batch, *axes.x_free(x.ndim)]
        return (*(x.shape[i] for i in of_x), *(w.shape[i] for i in axes.w_free(w.ndim)))

    @property
    def scale_leaves_the_sum(self) -> bool:
        """Whether the terms of each sum have the same scale."""
        scale = self.w.scale_leaf
        return scale is None or all(map(scale.is_constant_along, self.axes.w_contract))


class Target(NamedTuple):
    """What a program is compiled for."""

    platform: str | None = None
    """`"cpu"`, `"cuda"`, `"tpu"`, or any other."""
    partitioned: bool = False
    """Whether there may only be operations that XLA can split over devices and that every device runs."""
    device: str | None = None
    """The kind of the GPU."""
    calls_out: bool = True
    """Whether it may call functions that are compiled into this library: not if it is exported, to be run elsewhere."""


class Implementation(NamedTuple):
    """One way to compute products."""

    name: str
    run: Callable[[Product, Target], Array]
    supports: Callable[[Product], bool] = lambda product: True
    """Whether it computes this product."""
    pays: Callable[[Product], bool] = lambda product: True
    """Whether it is no loss, by what is known."""
    platforms: tuple[str, ...] | None = None
    """Where it runs; None if everywhere."""

    def runs_on(self, target: Target) -> bool:
        """Whether programs for this target can hold it."""
        return self.platforms is None or (
            target.platform in self.platforms and not target.partitioned
        )


def has_slack(packing: Packing) -> bool:
    """Whether there are places for elements that none takes."""
    return packing.tile.size % packing.tile.stored != 0


def has_sixteen_levels(w: AbstractScaledArray) -> bool:
    """Whether each byte of the payload holds the numbers of two of sixteen levels."""
    packed_in_pairs = w.packing is not None and w.packing.elements == 2
    return (
        packed_in_pairs
        and len(w.payloads) == 1
        and w.codebook is not None
        and len(w.codebook) == 16
    )


def high_half_first(w: AbstractScaledArray) -> bool:
    """Whether the first of two numbers in a byte is in its high half."""
    return w.coding.first == "high"
