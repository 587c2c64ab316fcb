"""Compiles the kernels in `src` to one shared library, beside this file: `python -m eqquant.native.build`.

It is also the build hook of the package, which Hatch loads from this file: where there is no C++ compiler, the
package is built without the library.
"""

import argparse
import concurrent.futures
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
LIBRARY = HERE / "libeqquant.so"
LEVELS = {
    "x86_64_v4": ["-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"],
    "x86_64_v3": ["-march=x86-64-v3"],
    "portable": [],
}
"""The levels of processors that there are kernels for, best first, and how they are asked for."""
FLAGS = (
    "-O2 -std=c++17 -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -Wall -Wextra "
    # The compiler's own headers of intrinsics do not pass these, and no vector crosses a function that is not inlined.
    "-Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi"
).split()


class CannotCompile(Exception):
    """There is no compiler, or it does not compile the kernels."""


def levels_here() -> list[str]:
    """The levels that make sense for the processors of this kind of machine."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return ["x86_64_v4", "x86_64_v3"]
    return ["portable"]


def compile_library(
    to: Path = LIBRARY, levels: Sequence[str] | None = None, flags: Sequence[str] = ()
) -> Path:
    """Compiles the library, with more flags for the compiler; returns its path. Raises `CannotCompile`.

    A level that the compiler is too old for is left out, unless there are flags: then it raises.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None or shutil.which(compiler) is None:
        raise CannotCompile("there is no C++ compiler (g++ or clang++, or as CXX says)")
    if sys.platform == "win32":
        raise CannotCompile("it is not compiled on Windows yet")
    levels = levels_here() if levels is None else levels
    with tempfile.TemporaryDirectory() as scratch:

        def compile_file(source: str, name: str, *more: str) -> str:
            out = str(Path(scratch) / f"{name}.o")
            _run([compiler, *FLAGS, *more, *flags, "-c", str(HERE / "src" / source), "-o", out])
            return out

        def compile_level(level: str) -> str | CannotCompile:
            try:
                return compile_file("level.cpp", level, f"-DEQQUANT_LEVEL={level}", *LEVELS[level])
            except CannotCompile as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            found = dict(zip(levels, pool.map(compile_level, levels), strict=True))
        served = {level: made for level, made in found.items() if isinstance(made, str)}
        errors = [error for error in found.values() if isinstance(error, CannotCompile)]
        if errors and (flags or not served):
            raise errors[0]
        listed = f"-DEQQUANT_LEVELS(X)={''.join(f'X({level})' for level in served)}"
        objects = [*served.values(), compile_file("ffi.cpp", "ffi", f"-I{_headers()}", listed)]
        # The C++ library goes in, so that the only one that it needs is that of C.
        static = ["-static-libgcc", "-static-libstdc++"] if sys.platform == "linux" else []
        made = Path(scratch) / to.name
        _run([compiler, "-shared", *objects, *static, *flags, "-o", str(made)])
        shutil.copyfile(made, to.with_suffix(".new"))
        to.with_suffix(".new").replace(to)  # never half a file, and never into one that is loaded
    return to


def _headers() -> Path:
    """Where XLA's header of foreign functions is, in jaxlib."""
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or not spec.submodule_search_locations:
        raise CannotCompile(
            "jaxlib, which has the header of XLA's foreign functions, is not installed"
        )
    return Path(spec.submodule_search_locations[0]) / "include"


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotCompile(f"{' '.join(command)} failed:\n{done.stderr[:2000]}")


try:
    from hatchling.builders.hooks.plugin.interface import (  # pyright: ignore[reportMissingImports]
        BuildHookInterface,
    )
except ImportError:  # not in a build
    pass
else:

    class BuildHook(BuildHookInterface):
        """Compiles the library for a wheel, which then is one for this platform."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            if self.target_name != "wheel":
                return
            try:
                compile_library()
            except CannotCompile as error:
                self.app.display_warning(f"eqquant is built without its native kernels: {error}.")
                return
            build_data["artifacts"].append(f"eqquant/native/{LIBRARY.name}")
            build_data["pure_python"] = False
            where = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{where}"


def main() -> None:
    """Compiles the library, and says where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m eqquant.native.build", description=main.__doc__
    )
    parser.add_argument("--levels", default=",".join(levels_here()), help=f"of {', '.join(LEVELS)}")
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    parser.add_argument("--output", type=Path, default=LIBRARY, help="the file to write")
    options = parser.parse_args()
    flags = ["-Werror"] if options.strict else []
    print(compile_library(options.output, options.levels.split(","), flags))


if __name__ == "__main__":
    main()
