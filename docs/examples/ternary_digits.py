"""Train a network whose weights are -1, 0 or 1, and see what it costs in accuracy.

    pip install "eqquant[examples]"
    python ternary_digits.py

The data are scikit-learn's handwritten digits, which come with it: 1797 images of 8 x 8 pixels, a
quarter of them held out. The model is a plain `eqx.nn.MLP`. It is trained dense; rounded to ternary
weights afterwards; and trained with ternary weights in its loss, once from the same first weights
and once from the dense model. All share their batches, learning rate and epochs. The table says
what each reaches, and a plot shows how.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import eqquant as eqq


WIDTH, DEPTH = 256, 2  # 64-256-256-10
BATCH, LEARNING_RATE = 128, 3e-3
RUNS, EPOCHS = 3, 40
SHORT_RUNS, SHORT_EPOCHS = 1, 8  # --short


# ---------------------------------------------------------------------------- the formats

# One scale for a whole matrix, as in BitNet b1.58: hardly more than the 1.6 bits of the codes.
ternary = partial(eqq.Array1B.quantize, axis=(0, 1))
least_squares = partial(ternary, scale="least_squares")


def dense(model: eqx.nn.MLP) -> eqx.nn.MLP:
    """Dense training sees the weights as they are."""
    return model


def rounded(model: eqx.nn.MLP) -> eqx.nn.MLP:
    """Quantization-aware training sees them rounded, and differentiates as if they were not."""
    return eqq.quantize(model, eqq.fake_quantize(ternary))


def convert(model: eqx.nn.MLP) -> eqx.nn.MLP:
    """Pack the weights that `rounded` trained: they are the ones that the loss has seen, exactly."""
    packed = eqq.quantize(model, ternary)
    seen = eqx.filter(rounded(model), eqx.is_array)
    assert eqx.tree_equal(eqx.filter(eqq.materialize(packed), eqx.is_array), seen)
    return packed


# ---------------------------------------------------------------------------- training


class Digits(NamedTuple):
    """Images with pixels from 0 to 1, and what they show."""

    images: Float[Array, "n 64"]
    labels: Int[Array, " n"]


def load() -> tuple[Digits, Digits]:
    """The images to train on, and those held out: always the same."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    train_images, test_images = (jnp.asarray(x, jnp.float32) for x in split[:2])
    train_labels, test_labels = (jnp.asarray(x, jnp.int32) for x in split[2:])
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


@eqx.filter_jit
def train_epoch(
    model: eqx.nn.MLP,
    state: optax.OptState,
    digits: Digits,
    batches: Int[Array, "steps batch"],
    optimizer: optax.GradientTransformation,
    seen: Callable[[eqx.nn.MLP], eqx.nn.MLP],
) -> tuple[eqx.nn.MLP, optax.OptState]:
    """One pass over the images; the loss is that of `seen(model)`."""
    weights, rest = eqx.partition(model, eqx.is_inexact_array)

    def loss(weights: Any, images: Array, labels: Array) -> Array:
        logits = jax.vmap(seen(eqx.combine(weights, rest)))(images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def step(carry: tuple, batch: Array) -> tuple[tuple, None]:
        weights, state = carry
        gradient = jax.grad(loss)(weights, digits.images[batch], digits.labels[batch])
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(weights, updates), state), None

    (weights, state), _ = jax.lax.scan(step, (weights, state), batches)
    return eqx.combine(weights, rest), state


@eqx.filter_jit
def correct(model: eqx.nn.MLP, digits: Digits, seen: Callable = dense) -> Int[Array, ""]:
    """How many digits are recognized; the weights may be quantized."""
    logits = eqq.implicit(jax.vmap(seen(model)))(digits.images)
    return jnp.sum(jnp.argmax(logits, axis=-1) == digits.labels)


def accuracy(model: eqx.nn.MLP, digits: Digits, seen: Callable = dense) -> float:
    """The percentage of digits that are recognized."""
    return 100 * int(correct(model, digits, seen)) / len(digits.labels)


def train(
    model: eqx.nn.MLP,
    seen: Callable[[eqx.nn.MLP], eqx.nn.MLP],
    data: tuple[Digits, Digits],
    batches: Int[Array, "epochs steps batch"],
    optimizer: optax.GradientTransformation,
    tick: Callable[[], None],
) -> tuple[eqx.nn.MLP, list[float]]:
    """Train, and measure the accuracy on the held-out images after every epoch."""
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    curve = []
    for epoch in batches:
        model, state = train_epoch(model, state, data[0], epoch, optimizer, seen)
        curve.append(accuracy(model, data[1], seen))
        tick()
    return model, curve


# ---------------------------------------------------------------------------- the program


class Result(NamedTuple):
    """What one way to a model gives, in one run."""

    bits: float  # per weight of a matrix, scales included
    nbytes: int  # of the whole model
    accuracy: float  # in percent
    curve: list[float]  # accuracy after every epoch; empty if nothing was trained


def run(
    seed: int, epochs: int, data: tuple[Digits, Digits], say: Callable, tick: Callable
) -> dict[str, Result]:
    """Every row of the table, for one seed of the first weights and of the batches."""
    start_key, order_key = jax.random.split(jax.random.key(seed))
    start = eqx.nn.MLP(64, 10, WIDTH, DEPTH, key=start_key)
    n = len(data[0].labels)
    steps = n // BATCH  # an epoch leaves out a remainder, another one each time
    orders = jax.vmap(lambda key: jax.random.permutation(key, n))(
        jax.random.split(order_key, epochs)
    )
    batches = orders[:, : steps * BATCH].reshape(epochs, steps, BATCH)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps * epochs))

    def result(model: eqx.nn.MLP, packed: eqx.nn.MLP, curve: list[float]) -> Result:
        report = eqq.report(model, packed)
        return Result(report.bits_per_weight, report.nbytes, accuracy(packed, data[1]), curve)

    say(f"seed {seed}: dense float32")
    trained, curve = train(start, dense, data, batches, optimizer, tick)
    nbytes = eqq.report(trained, trained).nbytes
    rows = {"dense float32": Result(32, nbytes, curve[-1], curve)}
    rows["dense, rounded"] = result(trained, eqq.quantize(trained, ternary), [])
    rows["dense, least squares"] = result(trained, eqq.quantize(trained, least_squares), [])
    for name, first in (("trained ternary", start), ("ternary from dense", trained)):
        say(f"seed {seed}: {name}")
        model, curve = train(first, rounded, data, batches, optimizer, tick)
        rows[name] = result(model, convert(model), curve)
    return rows


def plot(runs: list[dict[str, Result]], path: Path) -> None:
    """Accuracy by epoch, a thin line for each run and a thick one for their mean, as PNG."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    trained = [name for name, result in runs[0].items() if result.curve]
    for colour, name in zip(("C0", "C1", "C2"), trained, strict=True):
        curves = np.array([rows[name].curve for rows in runs])
        epochs = np.arange(1, curves.shape[1] + 1)
        axes.plot(epochs, curves.T, color=colour, linewidth=0.5, alpha=0.5)
        axes.plot(epochs, curves.mean(0), color=colour, label=name)
    level = np.mean([rows["dense, rounded"].accuracy for rows in runs])
    axes.axhline(level, color="C3", linestyle="--", label="dense, rounded")
    axes.set(xlabel="epoch", ylabel="accuracy on held-out digits, %", ylim=(85, 100))
    axes.legend(loc="lower right")
    figure.savefig(path, format="png", dpi=150)


@contextmanager
def progress(epochs: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Says what is being done on stderr: as a live bar on a terminal, line by line in a log."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield console.print, lambda: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as live:
        bar = live.add_task("", total=epochs)
        yield (lambda text: live.update(bar, description=text)), (lambda: live.advance(bar))


def main(argv: list[str] | None = None) -> None:
    """Print the table and save the plot; `argv` as on the command line."""
    parser = argparse.ArgumentParser(description="Train a network with ternary weights.")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next add 1")
    parser.add_argument("--short", action="store_true", help="one run of a few epochs: a trial")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", default=Path("ternary_digits.png"), help="a PNG file"
    )
    args = parser.parse_args(argv)
    if args.plot.is_dir() or not args.plot.parent.is_dir():
        raise SystemExit(f"--plot {args.plot} must be a file in a directory that exists.")
    count, epochs = (SHORT_RUNS, SHORT_EPOCHS) if args.short else (RUNS, EPOCHS)

    began, data = time.perf_counter(), load()
    with progress(3 * count * epochs) as (say, tick):
        runs = [run(args.seed + i, epochs, data, say, tick) for i in range(count)]
    seconds = time.perf_counter() - began

    table = Table(box=box.SIMPLE)
    table.add_column("weights", overflow="fold")
    headers = ("bits/\nweight", "kB", "accuracy\nmean, %", "below\ndense", "at\nmost")
    for header in headers:
        table.add_column(header, justify="right")
    best = np.array([rows["dense float32"].accuracy for rows in runs])
    for name, result in runs[0].items():
        reached = np.array([rows[name].accuracy for rows in runs])
        numbers = reached.mean(), (best - reached).mean(), (best - reached).max()
        size = f"{result.bits:.2f}", f"{result.nbytes / 1e3:.1f}"
        table.add_row(name, *size, *(f"{number:.2f}" for number in numbers))

    print(f"digits: {len(data[0].labels)} to train on, {len(data[1].labels)} held out")
    print(f"training: {count} run(s), seed {args.seed} onwards; {epochs} epochs each time")
    print(
        f"machine: {os.cpu_count()} CPUs, jax {jax.__version__} on {jax.default_backend()}; "
        f"{seconds:.0f} s"
    )
    Console().print(table)
    print("below dense: how many points, on average and in the run where it is most.")
    print("bits/weight: of the matrices, with scales. kB: the whole model, with biases.")
    plot(runs, args.plot)
    print(f"plot: {args.plot}")


if __name__ == "__main__":
    main()
