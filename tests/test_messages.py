"""Sentences about arguments of the wrong type. The suite checks types with beartype, which would
speak first; users mostly do not, so these run in a process of their own."""

import subprocess
import sys
import textwrap

import pytest


PROGRAM = """
import equinox as eqx, jax, jax.numpy as jnp
import eqquant as eqq

model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
q = eqq.Array8B.quantize(jnp.ones((2, 3)))
try:
    {call}
except {error} as caught:
    print(caught)
"""

CASES = {
    "eqq.quantize(model, 'int8')": ("TypeError", ["how must be a format", "how='int8'", "Array8B.quantize"]),
    "eqq.quantize(model, {'*': 'int8'})": ("TypeError", ["The format for '*'", "'int8'", "or None"]),
    "eqq.implicit(3)": ("TypeError", ["takes a function", "given 3"]),
    "eqq.on_materialize('never').__enter__()": ("ValueError", ["one of warn, ignore, error", "'never'"]),
    "q.with_sharding(jax.sharding.PartitionSpec('a'))": ("ValueError", ["needs a mesh", "jax.set_mesh"]),
    "eqq.ArrayNF4.quantize(jnp.ones(8), scale='best')": ("ValueError", ["one of absmax, search", "'best'"]),
    "eqq.Array1B.quantize(jnp.ones(8), levels='quaternary')": ("ValueError", ["one of ternary, binary"]),
    "eqq.Array8B.quantize(jnp.ones(8), activations='int4')": ("ValueError", ["one of float, int8", "'int4'"]),
    "eqq.Array1B.quantize(jnp.ones(8), scale='max')": ("ValueError", ["absmean, least_squares", "'max'"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def sentences():
    """What each call says; one process for all, since each start takes seconds."""
    setup, rest = PROGRAM.split("try:")
    program = setup + "".join(
        f"try:{rest.format(call=call, error=error)}print('----')\n"
        for call, (error, _) in CASES.items()
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    return dict(zip(CASES, done.stdout.split("----"), strict=False))


@pytest.mark.parametrize("call", CASES)
def test_sentence(call, sentences):
    for word in CASES[call][1]:
        assert word in sentences[call]
