"""Compiles `native_edges.cpp` with the kernels of each level, under the sanitizers of the compiler, and runs it.

python tests/native_edges.py [levels]
"""

import concurrent.futures
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from eqquant.native import build


SANITIZERS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(level: str, scratch: Path) -> tuple[str, int]:
    """What the products of a level print, and their exit status."""
    program, compiler = scratch / level, os.environ.get("CXX", "g++")
    flags = [flag for flag in build.FLAGS if flag != "-O2"]
    sources = [build.HERE / "src" / "level.cpp", Path(__file__).with_suffix(".cpp")]
    options = [f"-DEQQUANT_LEVEL={level}", f"-I{build.HERE / 'src'}", "-Werror", *SANITIZERS]
    command = [compiler, *flags, *options, *build.LEVELS[level], *sources, "-o", program]
    compiled = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if compiled.returncode:
        return compiled.stderr[:4000], compiled.returncode
    done = subprocess.run([str(program)], capture_output=True, text=True)
    return done.stdout + done.stderr[:4000], done.returncode


def main() -> None:
    levels = sys.argv[1:] or sorted({*build.levels_here(), "portable"})
    with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor() as pool:
        results = [*pool.map(lambda level: run(level, Path(scratch)), levels)]
    for text, _ in results:
        print(text, end="")
    sys.exit(any(status for _, status in results))


if __name__ == "__main__":
    main()
