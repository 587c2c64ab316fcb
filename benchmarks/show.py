"""Turns the files in `results/` into the tables of docs/pages/speed.md and results.md, and `native.json` into their plot.

python benchmarks/show.py
"""

import json
import math
import pathlib
import re
from typing import Any


HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
PAGES = [HERE.parent / "docs" / "pages" / name for name in ("speed.md", "results.md")]
IMAGE = PAGES[0].parent / "images" / "matmul.png"
BASELINE = "dense float32"
SHAPE = "4096 square"
# What the first table of speed.md shows: formats, and shapes with numbers of rows.
SUMMARY = (
    "Array8B",
    "Array8B, int8 activations",
    "ArrayNF4",
    "ArrayInt4",
    "ArrayNVFP4",
    "ArrayFP8",
    "Array1B, ternary",
    "Array1B, binary",
    "RSROperatorTernary",
)
CASES = (
    ("4096 square", 1),
    ("4096 square", 4),
    ("4096 square", 16),
    ("4096 square", 512),
    ("MiniLM up", 1),
)
# The format of eqquant, and what is next to it in eformer and qwix.
SAME = {
    "Array8B": ("eformer Array8B", "qwix int8"),
    "Array8B, int8 activations": ("", "qwix int8, int8 activations"),
    "ArrayNF4": ("eformer ArrayNF4", "qwix nf4"),
    "ArrayNF4, column-major": ("eformer ArrayNF4", "qwix nf4"),
    "Array1B, ternary": ("eformer Array1B", ""),
    "Array1B, ternary, column-major": ("eformer Array1B", ""),
    "RSROperatorBinary": ("eformer RSROperatorBinary", ""),
    "RSROperatorTernary": ("eformer RSROperatorTernary", ""),
}
BLOCK = re.compile(r"(<!-- table: (.+?) -->\n)(?:\|.*\n)*")


def stored_as(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows_of(stored: Any, shape: str, orientation: str, dtype: str = "float32") -> list[Any]:
    """The measured products of a shape, by rows."""
    return [
        row
        for row in stored["results"]["rows"]
        if (row["name"], row["orientation"], row["dtype"]) == (shape, orientation, dtype)
    ]


def size_of(row: Any) -> str:
    return f"{row['outputs']} \u00d7 {row['inputs']}"


def rows_as_text(count: int) -> str:
    return f"{count} row" + "s" * (count != 1)


def summary_table() -> str:
    """A Markdown table: a few formats in a few cases, dense time over time."""
    stored = stored_as("native")
    cases = [
        next(row for row in rows_of(stored, shape, "w @ x") if row["rows"] == count)
        for shape, count in CASES
    ]
    heads = [f"{size_of(row)}, {row['rows']} vector" + "s" * (row["rows"] != 1) for row in cases]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(cases)]
    for name in SUMMARY:
        cells = [f"{1 / row['times'][name]['ratio']:.2f}" for row in cases]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def model_table() -> str:
    """A Markdown table: a transformer with each format, dense time over time, and the bytes of its weights."""
    found = stored_as("model")["results"]
    step, prompt = found["decoding step"], found["prompt"]
    lines = [
        f"| | one decoding step | a prompt of {found['tokens']} tokens | MB of weights |",
        "|---|---|---|---|",
    ]
    for name, size in found["bytes"].items():
        cells = [f"{1 / times[name]['ratio']:.2f}" for times in (step, prompt)]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{size / 1e6:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def training_table() -> str:
    """A Markdown table: a step of training over each base, time and memory over those of the dense one."""
    bases = stored_as("training")["results"]["bases"]
    lines = ["| base | time / dense | memory / dense |", "|---|---|---|"]
    for name, found in bases.items():
        memory = found["bytes"] / bases[BASELINE]["bytes"]
        lines.append(f"| {name} | {found['ratio']:.2f} | {memory:.2f} |")
    return "\n".join(lines) + "\n"


def formats_of(rows: list[Any]) -> list[str]:
    """What was measured in all of these rows, next to the baseline."""
    names = (name for name in rows[0]["times"] if all(name in row["times"] for row in rows))
    return [name for name in names if name != BASELINE]


def table(stored: Any, shape: str, orientation: str, dtype: str = "float32") -> str:
    """A Markdown table: for each format and number of rows, dense time over time."""
    rows = rows_of(stored, shape, orientation, dtype)
    title = f"{size_of(rows[0])}, `{orientation}`" + f", {dtype}" * (dtype != "float32")
    lines = [
        f"| {title} | " + " | ".join(rows_as_text(row["rows"]) for row in rows) + " |",
        "|---|" + "---|" * len(rows),
        "| dense float32, ms | "
        + " | ".join(f"{row['times'][BASELINE]['median'] * 1e3:.2f}" for row in rows)
        + " |",
    ]
    for name in formats_of(rows):
        found = [1 / row["times"][name]["ratio"] for row in rows]
        lines.append(f"| {name} | " + " | ".join(f"{x:.2f}" for x in found) + " |")
    return "\n".join(lines) + "\n"


def fastest(candidates: Any, dtype: str) -> dict[str, Any]:
    """The fastest way of each library and format with such activations; dense float32 and bfloat16 always."""
    best: dict[str, Any] = {}
    for name, row in candidates.items():
        key = name if row["library"] == "dense" else f"{row['library']} {row['format']}"
        if row["library"] != "dense" and row["dtype"] != dtype:
            continue
        if key not in best or row.get("ratio", math.inf) < best[key].get("ratio", math.inf):
            best[key] = row
    return best


def peers_table(files: list[str], dtype: str) -> str:
    """A Markdown table: for each library and format, dense time over time, by file and number of rows."""
    heads, columns = [], []
    for file in files:
        for row in stored_as(file)["results"]["rows"]:
            heads.append(", ".join([rows_as_text(row["rows"]), *file.split("_")[1:]]))
            columns.append(fastest(row["candidates"], dtype))
    times = [f"{column[BASELINE]['median'] * 1e3:.2f}" for column in columns]
    lines = [
        f"| {dtype} activations | " + " | ".join([*heads, "temporaries, MB", "error"]) + " |",
        "|---|" + "---|" * (len(heads) + 2),
        "| dense float32, ms | " + " | ".join([*times, "0.0", ""]) + "|",
    ]
    for name, first in columns[0].items():
        if name != BASELINE:
            cells = [f"{1 / column[name]['ratio']:.2f}" for column in columns]
            cells += [f"{first['temp_bytes'] / 1e6:.1f}", f"{first['error']:.0e}"]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def against_table(files: list[str], dtype: str) -> str:
    """A Markdown table: with one row, the time of dense bfloat16 and of the peers over that of eqquant."""
    lines = [
        "| | large temporaries | dense bfloat16 | eformer | qwix |",
        "|---|---|---|---|---|",
    ]
    for ours, theirs in SAME.items():
        for file in files:
            first = stored_as(file)["results"]["rows"][0]
            best = fastest(first["candidates"], dtype)
            mine = best[f"eqquant {ours}"]["ratio"]
            cells = [
                f"{best[name]['ratio'] / mine:.1f}" if name else ""
                for name in ("dense bfloat16", *theirs)
            ]
            memory = "kept" if file.endswith("kept") else "returned"
            lines.append(f"| {ours} | {memory} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_tables(page: str) -> str:
    """The page with every table after its comment: `<!-- table: [native ]shape, orientation[, dtype] -->`,
    `<!-- table: peers of files, dtype -->`, `<!-- table: against peers of files, dtype -->`,
    `<!-- table: summary -->`, `<!-- table: model -->` or `<!-- table: training -->`."""
    alone = {"summary": summary_table, "model": model_table, "training": training_table}

    def replaced(match: re.Match[str]) -> str:
        what, *how = match[2].split(", ")
        if what in alone:
            return match[1] + alone[what]()
        for kind, of in {"peers of ": peers_table, "against peers of ": against_table}.items():
            if what.startswith(kind):
                return match[1] + of(what.removeprefix(kind).split(), *how)
        file = "native" if what.startswith("native ") else "matmul"
        return match[1] + table(stored_as(file), what.removeprefix("native "), *how)

    return BLOCK.sub(replaced, page)


def plot(stored: Any, file: pathlib.Path) -> None:
    """Bars: dense time over time, for each format and number of rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = rows_of(stored, SHAPE, "w @ x")
    names = formats_of(rows)
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
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    plot(stored_as("native"), RESULTS / "matmul.png")
    IMAGE.parent.mkdir(exist_ok=True)
    IMAGE.write_bytes((RESULTS / "matmul.png").read_bytes())
    print("wrote results/matmul.png and the tables of docs/pages")


if __name__ == "__main__":
    main()
