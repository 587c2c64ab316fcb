"""Kernels for CPUs, compiled from C++: what is loaded, and what is not.

XLA calls them as foreign functions, on its own threads. The source is in `src`; `build.py` compiles it when the package
is installed, if there is a compiler.
"""

import contextlib
import ctypes
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np


TARGET = "eqquant_product"
"""The name by which XLA's programs call the products."""
SWITCH = "EQQUANT_NATIVE"
"""The environment variable that turns the kernels off (`0`), or allows those of a lower level only (its name)."""
_LIBRARY = Path(__file__).parent / "libeqquant.so"
_COST = "products on CPU take XLA's operations, which are several times slower for few rows"


class Info(NamedTuple):
    """What there is of the native kernels."""

    loaded: bool
    """Whether products can use them."""
    level: str | None
    """The level of processors whose kernels serve here; None if none are loaded."""
    reason: str
    """Why they are loaded or not."""


class NativeKernelsMissing(UserWarning):
    """The package was built without its native kernels."""


@functools.cache
def info() -> Info:
    """What is loaded of the native kernels, and why not the rest.

    !!! example

        ```python
        import eqquant.native

        print(eqquant.native.info())  # Info(loaded=True, level='x86_64_v4', reason=...)
        ```
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted == "0":
        return Info(False, None, f"{SWITCH}=0 turns them off")
    try:
        library = _library()
    except OSError as error:
        if _LIBRARY.exists():
            return Info(False, None, f"the library does not load: {error}")
        return Info(False, None, "the package was built without them, for want of a C++ compiler")
    level = _use_level("" if wanted == "1" else wanted)
    if level is None:
        asked = f" at the level {SWITCH}={wanted} or below" if wanted not in ("", "1") else ""
        return Info(False, None, f"there are none for this processor{asked}")
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.eqquant_product), platform="cpu")
    return Info(True, level, "the library and this processor fit")


@contextlib.contextmanager
def at_level(name: str) -> Iterator[None]:
    """Inside, the kernels of this level of processors serve, in the whole process: for tests and benchmarks.

    Raises `ValueError` if there are none that run here.
    """
    before = info().level
    if before is None or _use_level(name) != name:
        if before is not None:
            _use_level(before)
        raise ValueError(f"there are no native kernels of the level name={name!r} here; {info()}.")
    try:
        yield
    finally:
        _use_level(before)


@functools.cache
def _library() -> Any:
    return ctypes.CDLL(str(_LIBRARY))


def _use_level(at_most: str) -> str | None:
    """The name of the best level of this name or below that runs here, which is used from now on; any level, if the name is
    empty."""
    choose = _library().eqquant_use_level
    choose.restype = ctypes.c_char_p
    level = choose(at_most.encode())
    return level and level.decode()


@functools.cache
def tell_if_missing() -> None:
    """Warns, once, if the kernels are not there though nobody turned them off."""
    found = info()
    if not found.loaded and os.environ.get(SWITCH) != "0":
        warnings.warn(
            f"eqquant runs without its native kernels: {found.reason}. Without them {_COST}. Install a C++ compiler "
            f"and eqquant again, or set {SWITCH}=0 to do without.",
            NativeKernelsMissing,
            stacklevel=2,
        )


def call_product(
    x: Any, codes: Any, scales: Any, levels: Any, *, outputs: int, **attributes: int
) -> Any:
    """The call of the kernels, as `src/ffi.cpp` takes it: y (m, outputs)."""
    out = jax.ShapeDtypeStruct((x.shape[0], outputs), np.dtype("float32"))
    call = jax.ffi.ffi_call(TARGET, out, vmap_method="expand_dims")
    return call(x, codes, scales, levels, **{k: np.int64(v) for k, v in attributes.items()})


info()  # a serialized executable may call the kernels before any product does
