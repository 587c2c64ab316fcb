"""The example `docs/examples/finetune_lora.py`, in a short mode, on the real model."""

import importlib.util
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest


EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("finetune_lora", EXAMPLES / "finetune_lora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(EXAMPLES))


def test_main_trains_adapters_over_an_unchanged_base(example, capsys, tmp_path):
    adapters = tmp_path / "adapters.eqx"
    example.main(["--steps", "4", "--save", str(adapters)])
    output, said = capsys.readouterr()
    first, last = map(
        float, re.search(r"loss: ([\d.]+) at first, ([\d.]+) after 4", output).groups()
    )
    assert last < first - 0.2
    assert "step 4 of 4" in said and "\x1b" not in output + said
    before, after = map(int, re.search(r"mood: (\d+)% before, (\d+)% after", output).groups())
    assert before < after
    # 6 layers, 2 weights, factors of 384 x 8 in float32.
    factors = 6 * 2 * 2 * 384 * 8 * 4
    assert factors < adapters.stat().st_size < factors + 6 * 2 * 1024  # each says what it is
    weights = re.search(r"weights +([\d.]+) MB +([\d.]+) MB", output).groups()
    assert float(weights[0]) < float(weights[1]) / 7
    assert max(map(len, output.splitlines())) <= 80


def test_the_loss_is_least_when_moods_are_apart(example):
    labels = jnp.asarray([0, 0, 1, 1])
    apart = jnp.asarray([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert float(example.contrastive_loss(apart, labels)) < 1e-3
    assert float(example.contrastive_loss(apart, jnp.asarray([0, 1, 0, 1]))) > 5
    assert example.accuracy(np.asarray(apart), np.asarray(labels), np.ones(4, bool)) == 1


def test_each_sentence_has_a_twin(example):
    assert len(example.PLEASED) == len(example.DISPLEASED) > 2 * example.HELD_OUT
