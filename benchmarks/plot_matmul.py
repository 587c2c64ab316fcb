"""Draws `results/matmul.json`: how much faster than dense float32 each format is, by the number of rows.

python benchmarks/plot_matmul.py [--shape "4096 square"] [--name matmul]
"""

import argparse
import json

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from _measure import RESULTS


BASELINE = "dense float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="4096 square")
    parser.add_argument("--name", default="matmul")
    args = parser.parse_args()
    stored = json.loads((RESULTS / f"{args.name}.json").read_text())
    rows = [
        row
        for row in stored["results"]["rows"]
        if (row["name"], row["orientation"], row["dtype"]) == (args.shape, "w @ x", "float32")
    ]
    if not rows:
        raise SystemExit(f"{args.name}.json has no rows for {args.shape!r}")
    names = [name for name in rows[0]["times"] if name != BASELINE]
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        times = [row["times"][name] for row in rows]
        speed = [1 / t["ratio"] for t in times]
        spread = [
            [s - 1 / t["high"] for s, t in zip(speed, times, strict=True)],
            [1 / t["low"] - s for s, t in zip(speed, times, strict=True)],
        ]
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(rows))]
        axes.bar(places, speed, width, yerr=spread, label=name, error_kw={"linewidth": 0.7})
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [str(row["rows"]) for row in rows])
    axes.set_xlabel("rows: vectors that meet the weight at once")
    axes.set_ylabel("dense float32 time / time")
    machine = stored["machine"]
    axes.set_title(
        f"{rows[0]['outputs']} x {rows[0]['inputs']}, {machine['cpu']}, {machine['cores']} cores, "
        f"JAX {machine['jax']}",
        fontsize=10,
    )
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(RESULTS / f"{args.name}.png", dpi=130)
    print(f"wrote results/{args.name}.png")


if __name__ == "__main__":
    main()
