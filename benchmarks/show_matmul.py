"""Turns `results/matmul.json` into the plot beside it and into the tables of docs/pages/speed.md.

python benchmarks/show_matmul.py
"""

import json
import pathlib
import re
from typing import Any


HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "pages" / "speed.md"
IMAGE = PAGE.parent / "images" / "matmul.png"
BASELINE = "dense float32"
SHAPE = "4096 square"
BLOCK = re.compile(r"(<!-- table: (.+?), (.+?) -->\n)(?:\|.*\n)*")


def rows_of(stored: Any, shape: str, orientation: str) -> list[Any]:
    """The measured products of a shape, by rows."""
    return [
        row
        for row in stored["results"]["rows"]
        if (row["name"], row["orientation"], row["dtype"]) == (shape, orientation, "float32")
    ]


def table(stored: Any, shape: str, orientation: str) -> str:
    """A Markdown table: for each format and number of rows, dense time over time."""
    rows = rows_of(stored, shape, orientation)
    lines = [
        f"| {shape}, `{orientation}` | " + " | ".join(f"{row['rows']} rows" for row in rows) + " |",
        "|---|" + "---|" * len(rows),
        "| dense float32, ms | "
        + " | ".join(f"{row['times'][BASELINE]['median'] * 1e3:.2f}" for row in rows)
        + " |",
    ]
    for name in rows[0]["times"]:
        if name != BASELINE:
            found = [1 / row["times"][name]["ratio"] for row in rows]
            lines.append(f"| {name} | " + " | ".join(f"{x:.2f}" for x in found) + " |")
    return "\n".join(lines) + "\n"


def with_tables(page: str, stored: Any) -> str:
    """The page with every table after its comment, `<!-- table: shape, orientation -->`."""
    return BLOCK.sub(lambda match: match[1] + table(stored, match[2], match[3]), page)


def plot(stored: Any, file: pathlib.Path) -> None:
    """Bars: dense time over time, for each format and number of rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = rows_of(stored, SHAPE, "w @ x")
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
        f"{rows[0]['outputs']} x {rows[0]['inputs']} float32 activations, {machine['cpu']}, "
        f"{machine['cores']} cores, JAX {machine['jax']}",
        fontsize=10,
    )
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(file, dpi=110)


def main() -> None:
    stored = json.loads((RESULTS / "matmul.json").read_text())
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), stored), encoding="utf-8")
    plot(stored, RESULTS / "matmul.png")
    IMAGE.parent.mkdir(exist_ok=True)
    IMAGE.write_bytes((RESULTS / "matmul.png").read_bytes())
    print("wrote results/matmul.png and the tables of docs/pages/speed.md")


if __name__ == "__main__":
    main()
