"""Which implementation computes a product: a function of what is known when it is lowered."""

from collections.abc import Callable, Mapping
from typing import Any

from jax import Array

from ..._scaled import AbstractScaledArray
from . import cpu
from .fused import fused
from .gpu import gpu, pays as pays_on_gpu, supports as supports_gpu
from .integer import DIGITS, integer, supports as supports_integer
from .reference import Axes, reference
from .tables import supports as supports_tables, tables
from .tiled import tiled
from .tpu import pays as pays_on_tpu, supports as supports_tpu, tpu


IMPLEMENTATIONS: Mapping[str, Callable[..., Array]] = {
    "reference": reference,
    "fused": fused,
    "tiled": tiled,
    "integer": integer,
    "tables": tables,
    "gpu": gpu,
    "tpu": tpu,
}
SUPPORTS = {
    "integer": supports_integer,
    "tables": supports_tables,
    "gpu": supports_gpu,
    "tpu": supports_tpu,
}
PLATFORMS = {"gpu": ("cuda", "gpu"), "tpu": ("tpu",)}
"""Where those run that do not run everywhere. Neither is chosen unless preferred: they have not run on a device yet."""
PAYS = {"gpu": pays_on_gpu, "tpu": pays_on_tpu}


def choose(
    platform: str | None,
    x: Any,
    w: AbstractScaledArray,
    axes: Axes,
    accumulate: Any,
    *,
    digits: int = DIGITS,
    plain: bool = False,
    preferred: str | None = None,
) -> str:
    """The name of the implementation that serves best: on `"cpu"`, `"cuda"`, `"tpu"`, or on any other platform.

    With `plain`, one of operations that XLA can split over devices and that run on every device. `preferred` wins
    where it runs, computes the product and pays.
    """
    if (
        preferred is not None
        and (preferred not in PLATFORMS or (platform in PLATFORMS[preferred] and not plain))
        and computes(preferred, x, w, axes, accumulate)
        and (preferred not in PAYS or PAYS[preferred](x, w, axes))
    ):
        return preferred
    if digits == 1 and supports_integer(x, w, axes, accumulate):
        return "integer"
    if plain:
        return "fused"
    if platform == "cpu":
        return cpu.choose(x, w, axes, accumulate)
    return "fused"


def computes(name: str, x: Any, w: AbstractScaledArray, axes: Axes, accumulate: Any) -> bool:
    """Whether the implementation of this name computes this product."""
    return name not in SUPPORTS or SUPPORTS[name](x, w, axes, accumulate)


def check(name: str, x: Any, w: AbstractScaledArray, axes: Axes, accumulate: Any) -> None:
    """Raises `ValueError` unless there is an implementation of this name that computes this product."""
    check_name(name)
    if not computes(name, x, w, axes, accumulate):
        able = [other for other in IMPLEMENTATIONS if computes(other, x, w, axes, accumulate)]
        raise ValueError(
            f"implementation={name!r} does not compute the product of {x.dtype}{list(x.shape)} with "
            f"{type(w).__name__} {w.dtype}{list(w.shape)} along {axes.w_contract}; {_names(able)} would."
        )


def check_name(name: str | None) -> None:
    """Raises `ValueError` unless there is an implementation of this name, or it is None."""
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be {_names(IMPLEMENTATIONS)}; it is {name!r}.")


def check_lowering(name: str, platform: str | None, plain: bool) -> None:
    """Raises `ValueError` if the implementation of this name does not run where a program is lowered for."""
    if name in PLATFORMS and (plain or platform not in PLATFORMS[name]):
        where = f"a program for {platform or 'another platform'}"
        if platform in PLATFORMS[name]:
            where = "one that is partitioned over devices, exported without custom calls, or for an older device"
        raise ValueError(
            f"implementation={name!r} runs on {PLATFORMS[name][0]}, but not in {where}."
        )


def _names(names: Any) -> str:
    return ", ".join(map(repr, names))
