"""The example `ternary_digits.py`: training with ternary weights, in its short mode."""

import importlib.util
import sys
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

import eqquant as eqq


pytestmark = pytest.mark.usefixtures("fully_optimized")


for needed in ("matplotlib", "optax", "rich", "sklearn"):
    pytest.importorskip(needed, reason="the example needs eqquant[examples]")

FILE = Path(__file__).parent.parent / "docs" / "examples" / "ternary_digits.py"
SPEC = importlib.util.spec_from_file_location("ternary_digits", FILE)
example = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)

NAMES = [
    "dense float32",
    "dense, rounded",
    "dense, least squares",
    "trained ternary",
    "ternary from dense",
]


@pytest.fixture(autouse=True)
def log_of_width_80(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model():
    return eqx.nn.MLP(64, 10, 32, 2, key=jax.random.key(0))


def table_rows(output):
    """The rows of the printed table, by name: the numbers to the right of it."""
    rows = (line.split() for line in output.splitlines() if line.strip().startswith(tuple(NAMES)))
    return {" ".join(row[:-5]): [float(x) for x in row[-5:]] for row in rows}


def test_short_mode_prints_the_table_and_saves_the_plot(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with eqq.strict():  # nothing becomes dense
        example.main(["--short"])
    output, progress = capsys.readouterr()
    rows = table_rows(output)
    assert list(rows) == NAMES
    assert rows["dense float32"][0] == 32 and rows["dense float32"][2] > 90
    for name in NAMES[1:]:
        bits, _, accuracy, below, at_most = rows[name]
        assert 1.6 <= bits < 1.65
        assert below == at_most == pytest.approx(rows["dense float32"][2] - accuracy, abs=0.011)
    assert rows["ternary from dense"][3] < 1.5
    assert (tmp_path / "ternary_digits.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, output.splitlines())) <= 80
    assert progress.count("seed 0: ") == 3
    assert "\x1b" not in output + progress


def test_the_split_is_fixed_and_the_parts_are_disjoint():
    train, test = example.load()
    again = example.load()
    assert (len(train.labels), len(test.labels)) == (1347, 450)
    assert eqx.tree_equal((train, test), again)
    assert train.images.min() == 0 and train.images.max() == 1
    known = {image.tobytes() for image in np.asarray(train.images)}
    assert not any(image.tobytes() in known for image in np.asarray(test.images))


def test_converted_weights_are_those_of_the_loss(model):
    packed = example.convert(model)
    seen = eqx.filter_jit(example.rounded)(model)  # as in a training step
    for layer, seen_layer in zip(packed.layers, seen.layers, strict=True):
        np.testing.assert_array_equal(layer.weight.materialize(), seen_layer.weight)
        assert isinstance(layer.weight, eqq.Array1B) and layer.weight.scale.shape == (1, 1)
        np.testing.assert_array_equal(layer.bias, seen_layer.bias)


def test_conversion_to_other_weights_is_noticed(model, monkeypatch):
    monkeypatch.setattr(example, "rounded", example.dense)
    with pytest.raises(AssertionError):
        example.convert(model)


@pytest.mark.parametrize("path", [".", "missing/plot.png"])
def test_a_plot_that_cannot_be_saved_stops_before_training(path, tmp_path):
    with pytest.raises(SystemExit, match=r"must be a file in a directory that exists\.$"):
        example.main(["--plot", str(tmp_path / path)])
