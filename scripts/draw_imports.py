"""The graph of imports between rooms, as docs/architecture.md and docs/architecture.svg show it.

    python scripts/draw_imports.py           # writes both
    python scripts/draw_imports.py --check   # exits with 1 if one is not what the code says

Rooms of qwen_jax stand in the order of the import contract in pyproject.toml; arrows are imports,
those that follow from others left out of the picture and kept in the table.
"""

import argparse
import ast
import sys
import tomllib
from pathlib import Path
from xml.sax.saxutils import escape

import grimp

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "architecture.svg"
BEGIN, END = "<!-- imports: scripts/draw_imports.py -->\n", "<!-- end of imports -->\n"
OUTSIDE = ("convert", "pallas_kernels")
Edges = dict[str, set[str]]


def layers() -> list[list[str]]:
    """Rooms of qwen_jax from top to bottom; those of a row do not import each other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    found = next(each for each in contracts if each["name"] == "The layers of qwen_jax")
    return [[room.strip() for room in row.split("|")] for row in found["layers"]]


def imports() -> Edges:
    """From room to the rooms that it imports; convert and pallas_kernels are one room each."""
    graph = grimp.build_graph("qwen_jax", *OUTSIDE)

    def room(module: str) -> str:
        words = module.split(".")
        return words[0] if words[0] in OUTSIDE else words[1] if len(words) > 1 else ""

    found: Edges = {}
    for module in sorted(graph.modules):
        into = found.setdefault(room(module), set())
        into |= {room(each) for each in graph.find_modules_directly_imported_by(module)}
    return {each: into - {each, ""} for each, into in found.items() if each}


def reduced(edges: Edges) -> Edges:
    """The arrows that do not follow from others."""

    def reached(room: str, seen: set[str]) -> set[str]:
        for each in edges[room] - seen:
            seen.add(each)
            reached(each, seen)
        return seen

    below = {room: reached(room, set()) for room in edges}
    return {
        room: {each for each in into if not any(each in below[other] for other in into - {each})}
        for room, into in edges.items()
    }


def summary(room: str) -> str:
    """First line of a room's docstring."""
    inside = ROOT / "qwen_jax" / room
    path = ROOT / room if room in OUTSIDE else inside
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.split("\n")[0].rstrip(".")


def mermaid(edges: Edges) -> str:
    """The graph for pages that draw Mermaid, and the table of all arrows."""
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"    {room} --> {each}" for room in edges for each in sorted(reduced(edges)[room])]
    lines += ["```", "", "| package | what it is | imports |", "|---|---|---|"]
    order = [room for row in layers() for room in row] + list(OUTSIDE)
    lines += [
        f"| `{room}` | {summary(room)} | {', '.join(sorted(edges[room])) or 'none of these'} |"
        for room in order
        if room in edges
    ]
    return "\n".join(lines) + "\n"


def picture() -> str:
    """The layers as SVG: each row may import the rows under it."""
    rows = [row for row in layers() if row != ["__main__"]]
    width, height, gap = 860, 34, 6
    body = []
    for number, row in enumerate(rows):
        top = 8 + number * (height + gap)
        each = (width - 16 - gap * (len(row) - 1)) / len(row)
        for place, room in enumerate(row):
            left = 8 + place * (each + gap)
            said = escape(summary(room)) if len(row) == 1 else ""
            body += [
                f'<rect x="{left:g}" y="{top}" width="{each:g}" height="{height}" rx="4" '
                'fill="#eef3fb" stroke="#4a6fa5"/>',
                f'<text x="{left + 10:g}" y="{top + 22}" font-weight="bold">{room}</text>',
                f'<text x="{left + 110:g}" y="{top + 22}">{said}</text>',
            ]
    top = 8 + len(rows) * (height + gap)
    body += [
        f'<rect x="8" y="{top}" width="{width - 16}" height="{height}" rx="4" '
        'fill="#fbf3ea" stroke="#b9772b"/>',
        f'<text x="18" y="{top + 22}" font-weight="bold">pallas_kernels</text>',
        f'<text x="148" y="{top + 22}">{escape(summary("pallas_kernels"))}</text>',
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + height + 8}" '
        'font-family="sans-serif" font-size="13">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def drawn() -> dict[Path, str]:
    """Both files as they should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return {PAGE: before + BEGIN + mermaid(imports()) + END + after, PICTURE: picture()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check, stale = parser.parse_args().check, 0
    for path, text in drawn().items():
        if check and (not path.exists() or path.read_text() != text):
            print(f"{path.relative_to(ROOT)} is not what the code says: run {sys.argv[0]}")
            stale = 1
        elif not check:
            path.write_text(text)
    return stale


if __name__ == "__main__":
    sys.exit(main())
