"""Draws how tiles hold elements: `pages/images/tiles.svg`.

    python docs/draw_tiles.py

A column is one stored number. Stored number `j` of a `Tile(size, stored)` holds the elements `j`, `j + stored`,
`j + 2 stored`, ... of the tile, one in each row.
"""

from pathlib import Path


IMAGE = Path(__file__).parent / "pages" / "images" / "tiles.svg"
WIDTH, HEIGHT = 760, 650
CELL, ROW = 28, 20
CROSS = "\u00d7"
STYLE = """\
  text { font: 12px sans-serif; fill: #222 }
  .title { font: 600 14px monospace }
  .cell { text-anchor: middle; font-size: 11px }
  .side { text-anchor: end; fill: #555 }
  .note { fill: #555 }
  .back { fill: #fff; stroke: #ccc }
  rect { stroke: #888 }
  .p0 { fill: #cfe2ff } .p1 { fill: #ffe0b3 } .p2 { fill: #d3f0d0 } .p3 { fill: #e6d6f5 } .p4 { fill: #ffd6dc }
  .p5 { fill: #d0f0f0 } .p6 { fill: #f5efc0 } .p7 { fill: #e2e2e2 }
  .empty { fill: none }
  .byte { fill: none; stroke: #222; stroke-width: 1.6 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e8e8e8 }
    .side, .note { fill: #b5b5b5 }
    .back { fill: #1e2029; stroke: #444 }
    .p0 { fill: #264a80 } .p1 { fill: #7a4d10 } .p2 { fill: #2a5e2a } .p3 { fill: #55397a } .p4 { fill: #7a2f40 }
    .p5 { fill: #1f5c5c } .p6 { fill: #5e5618 } .p7 { fill: #4a4a4a }
    .byte { stroke: #e8e8e8 }
  }
"""


def text(x: float, y: float, what: object, kind: str = "note") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{what}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind}"/>'


def column(x: float, y: float, elements: list[int], places: int, length: int) -> list[str]:
    """One stored number, with its elements from top to bottom; a place without an element has a cross."""
    out = []
    for i in range(places):
        found = i < len(elements) and elements[i] < length
        out.append(box(x, y + i * ROW, CELL, ROW, f"p{i}" if found else "empty"))
        out.append(text(x + CELL / 2, y + i * ROW + 14, elements[i] if found else CROSS, "cell"))
    return [*out, box(x, y, CELL, places * ROW, "byte")]


def tile(
    x: float, y: float, size: int, stored: int, first: int, length: int, show: list[int]
) -> list[str]:
    """The stored numbers `show` of one tile that begins at the element `first`; -1 stands for dots."""
    out, places = [], -(-size // stored)
    for j in show:
        if j < 0:
            out.append(text(x + CELL / 2, y + places * ROW / 2 + 4, "…", "cell"))
        else:
            elements = [first + i for i in range(j, size, stored)]
            out += column(x, y, elements, places, length)
        x += CELL
    return out


def drawing() -> str:
    """The text of the image."""
    out = [box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "back")]
    left, y = 96, 30
    out.append(text(20, y, "A column is one byte. The numbers in it say which elements it holds."))

    y += 34
    out.append(text(20, y, "Tile(64, 32)", "title"))
    out.append(text(140, y, "ArrayNF4, blocks of 64: byte j holds the elements j and j + 32"))
    out += tile(left, y + 12, 64, 32, 0, 64, [*range(7), -1, 29, 30, 31])
    out += [text(left - 8, y + 26, "high half", "side"), text(left - 8, y + 46, "low half", "side")]
    out.append(text(left + 11.5 * CELL, y + 26, "each row is one plane:"))
    out.append(
        text(left + 11.5 * CELL, y + 46, "neighbours stay neighbours, so it is read in one piece")
    )

    y += 94
    out.append(text(20, y, "Tile(5)", "title"))
    out.append(text(140, y, "Array1B, ternary: five digits in a byte"))
    for k in range(4):
        out += tile(left + k * (CELL + 10), y + 12, 5, 1, 5 * k, 17, [0])
    out.append(text(left + 3 * (CELL + 10) + CELL + 10, y + 40, "17 elements:"))
    out.append(text(left + 3 * (CELL + 10) + CELL + 10, y + 57, "the last tile is partial,"))
    out.append(text(left + 3 * (CELL + 10) + CELL + 10, y + 74, "and its byte is stored in full"))
    x = 430
    out.append(text(x, y, "Tile(8)", "title"))
    out.append(text(x + 74, y, "Array1B, binary: eight bits in a byte"))
    for k in range(2):
        out += tile(x + 62 + k * (CELL + 10), y + 12, 8, 1, 8 * k, 16, [0])
    out += [text(x + 54, y + 26, "lowest bit", "side"), text(x + 54, y + 166, "highest", "side")]

    y += 206
    out.append(text(20, y, "Tile(64, 13)", "title"))
    out.append(text(140, y, "64 ternary digits in 13 bytes: 13 · 5 = 65 places for 64 digits"))
    out += tile(left, y + 12, 64, 13, 0, 64, list(range(13)))
    x = left + 13 * CELL + 12
    out.append(text(x, y + 12 + 4.7 * ROW, "← slack: one place of every tile"))
    out.append(text(x, y + 12 + 4.7 * ROW + 17, "never holds an element"))

    y += 150
    out.append(text(20, y, "Scales", "title"))
    out.append(
        text(
            140,
            y,
            "a scale holds for a block of consecutive elements; here blocks of 64 cover 160 elements",
        )
    )
    unit = 3.2
    for row, name in enumerate(("scales", "elements", "bytes")):
        top = y + 14 + row * 34
        out.append(text(left - 8, top + 16, name, "side"))
        for k in range(3):
            start, stop = 64 * k, 64 * (k + 1) if name == "bytes" else min(64 * (k + 1), 160)
            label = {
                "scales": f"scale {k}",
                "elements": f"{start} to {stop - 1}",
                "bytes": f"{start // 2} to {stop // 2 - 1}" + ", stored in full" * (k == 2),
            }[name]
            out.append(box(left + start * unit, top, (stop - start) * unit, 24, f"p{k}"))
            out.append(text(left + (start + stop) / 2 * unit, top + 16, label, "cell"))
    lines = "\n".join(out)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">\n'
        f"<title>How a tile holds elements</title>\n<style>\n{STYLE}</style>\n{lines}\n</svg>\n"
    )


if __name__ == "__main__":
    IMAGE.write_text(drawing(), encoding="utf-8")
