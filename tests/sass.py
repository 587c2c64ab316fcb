"""What the real compilers make of the kernel for GPUs, without a GPU: instructions, registers, spills,
temporaries.

    python tests/sass.py            # compiles every case for an H200, and prints what comes out
    python tests/sass.py --write    # and writes tests/data/sass.json

Needs the extra `gpu-check`. XLA and Triton compile to PTX, `ptxas` to machine code, which `nvdisasm` shows. Instructions
are counted in the innermost loop that goes along the summed axis, by thread, and divided by the weights that a
thread decodes in one step. Nothing runs: this says nothing about time.
"""

import argparse
import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple


RESULTS = Path(__file__).parent / "data" / "sass.json"
SIZE = 8192
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""


class Case(NamedTuple):
    """A product with a square weight."""

    format: str
    last: bool
    """Whether it is summed over the last axis of the weight, as `eqx.nn.Linear` does."""
    rows: int = 1
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        axis = "last" if self.last else "first"
        return f"{self.format}, {axis} axis, {self.rows} rows, {self.dtype}"


FORMATS = ("nf4", "int8 in blocks", "ternary", "binary", "rsr ternary")
CASES = [
    *(Case(format, last) for format in FORMATS for last in (True, False)),
    *(Case("nf4", last, rows) for last in (True, False) for rows in (32, 64)),
    *(Case(format, last, 1, "float32") for format in ("nf4", "ternary") for last in (True, False)),
    Case("nf4", True, 1, "float16"),
]


def tool(name: str) -> Path | None:
    """A tool of CUDA from the extra `gpu-check`."""
    found = importlib.util.find_spec("nvidia")
    folders = found.submodule_search_locations if found is not None else None
    for folder in folders or ():
        for path in Path(folder).glob(f"*/bin/{name}"):
            return path
    return None


def missing() -> list[str]:
    """What is not installed of what this needs."""
    wheels = ["jax_cuda13_plugin"]
    lacking = [name for name in wheels if importlib.util.find_spec(name) is None]
    return lacking + [name for name in ("ptxas", "nvdisasm") if tool(name) is None]


def count(case: Case, dump: Path) -> dict[str, Any]:
    """Compiles a case, and counts."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    from eqquant._registry import QUANTIZERS
    from eqquant.kernels import quantized_dot_general

    formats = QUANTIZERS | {"int8 in blocks": partial(QUANTIZERS["int8"], block_size=128)}
    quantize = formats[case.format]
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET, topology_name="", topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    dense = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
    x = jax.ShapeDtypeStruct((case.rows, SIZE), case.dtype)
    operands = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (x, jax.eval_shape(partial(quantize, dtype=jnp.dtype(case.dtype)), dense)),
    )
    contract = (((1,), (int(case.last),)), ((), ()))

    def product(x: Any, w: Any) -> Any:
        return quantized_dot_general(x, w, contract, implementation="gpu")

    h200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h200)):
        lowered = jax.jit(product).trace(*operands).lower(lowering_platforms=("cuda",))
    before = set(dump.glob("*.ptx"))
    compiled = lowered.compile()
    (ptx,) = (
        file
        for file in set(dump.glob("*.ptx")) - before
        if "quantized_dot_general" in (text := file.read_text()) and ".entry" in text
    )
    counted = machine_code(ptx)
    per_weight = round(counted["loop"] * 32 / weights_of_a_step(operands, case), 2)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {"per_weight": per_weight, "temporary_bytes": temporary} | counted


def weights_of_a_step(operands: Any, case: Case) -> float:
    """How many weights a program decodes in one step of its loop, for each of its warps."""
    import jax
    import jax.numpy as jnp

    from eqquant.kernels.matmul.axes import Axes
    from eqquant.kernels.matmul.gpu import kernel, product
    from eqquant.kernels.matmul.product import Product, Target

    seen: list[float] = []

    def look(x: Any, w: Any, scale: Any, problem: Any) -> Any:
        elements = 1 if w.packing is None else w.packing.elements
        step = problem.inputs.block * problem.outputs.block * elements
        seen.append(step / problem.blocks.warps)
        return jnp.zeros((1, problem.rows, problem.outputs.length))

    run, kernel.product = kernel.product, look
    axes = Axes((1,), (int(case.last),), (), ())
    try:
        jax.eval_shape(lambda x, w: product.compute(Product(x, w, axes), Target("cuda")), *operands)
    finally:
        kernel.product = run
    return seen[0]


def machine_code(ptx: Path) -> dict[str, Any]:
    """Assembles the kernel, and counts the instructions of its longest loop."""
    cubin = ptx.with_suffix(".cubin")
    ptxas, nvdisasm = tool("ptxas"), tool("nvdisasm")
    assert ptxas is not None and nvdisasm is not None
    command = [ptxas, "-v", "-arch=sm_90a", ptx, "-o", cubin]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    code = subprocess.run(
        [nvdisasm, "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loop: list[str] = []
    for line in code.splitlines():
        if found := re.match(r"\s*(\.L\w+):", line):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?(.*?);", line):
            instructions.append(found[1])
            target = re.search(r"^BRA.*?(\.L\w+)", found[1])
            if target and target[1] in labels:
                body = instructions[labels[target[1]] :]
                loop = max(loop, body, key=len)
    kinds = collections.Counter(re.split(r"[.\s]", text)[0] for text in loop)
    return {
        "loop": len(loop),
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spilled_bytes": int(re.findall(r"(\d+) bytes spill stores", said)[0]),
        "kinds": dict(kinds.most_common(8)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    if missing():
        sys.exit(f"not installed: {', '.join(missing())}")
    dump = Path(tempfile.mkdtemp())
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_emitter_re=.*"
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu"}
    results = {}
    for case in CASES:
        if options.only in str(case):
            results[str(case)] = count(case, dump)
            print(f"{case!s:48}", json.dumps(results[str(case)]), flush=True)
    if options.write:
        import jax

        RESULTS.write_text(json.dumps({"jax": jax.__version__, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
