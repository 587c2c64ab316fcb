"""The workloads that benchmarks, tuning and measurements in the documentation speak of, by name."""

from typing import NamedTuple


class Linear(NamedTuple):
    """A weight `[outputs, inputs]`, as `eqx.nn.Linear` holds it."""

    name: str
    outputs: int
    inputs: int

    @property
    def elements(self) -> int:
        return self.outputs * self.inputs


LINEAR = [
    Linear("MiniLM attention", 384, 384),
    Linear("MiniLM up", 1536, 384),
    Linear("MiniLM down", 384, 1536),
    Linear("BERT up", 3072, 768),
    Linear("BERT down", 768, 3072),
    Linear("1024 square", 1024, 1024),
    Linear("2048 square", 2048, 2048),
    Linear("1B up", 8192, 2048),
    Linear("1B down", 2048, 8192),
    Linear("4096 square", 4096, 4096),
    Linear("8B up", 14336, 4096),
    Linear("8B down", 4096, 14336),
    Linear("8192 square", 8192, 8192),
]

ROWS = (1, 4, 16, 64, 512)
"""How many vectors meet the weight at once: decoding one sequence, a few, …, reading a prompt."""
