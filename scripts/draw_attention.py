"""The triangle of Dual Chunk Attention, docs/dual_chunk.svg: a cell for each pair of positions.

    python scripts/draw_attention.py           # writes it
    python scripts/draw_attention.py --check   # exits with 1 if it is not what the code says

Colours are the views and numbers the relative positions of `pallas_kernels.geometry`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from pallas_kernels.geometry import ChunkGeometry

PICTURE = Path(__file__).parents[1] / "docs" / "dual_chunk.svg"
GEOMETRY, TOKENS, SIZE = ChunkGeometry(chunk_size=8, local_size=2), 20, 26
COLOURS = ("#cfe3f7", "#fbe3b6", "#d6edc9")
NAMES = ("own chunk", "chunk before", "older chunks")


def cells() -> list[tuple[int, int, int, int]]:
    """Query, key, view and relative position of every causal pair."""
    found = []
    for query in np.arange(TOKENS):
        positions = GEOMETRY.query_positions(query)
        for key in np.arange(query + 1):
            view = GEOMETRY.view(query, key)
            distance = positions[view] - GEOMETRY.key_position(key)
            found.append((int(query), int(key), int(view), int(distance)))
    return found


def picture() -> str:
    left, top = 60, 30
    width, height = left + TOKENS * SIZE + 170, top + TOKENS * SIZE + 20
    body = [
        f'<rect x="{left + key * SIZE}" y="{top + query * SIZE}" width="{SIZE}" height="{SIZE}" '
        f'fill="{COLOURS[view]}" stroke="white"/>'
        f'<text x="{left + (key + 0.5) * SIZE:g}" y="{top + query * SIZE + 17}" '
        f'text-anchor="middle">{distance}</text>'
        for query, key, view, distance in cells()
    ]
    for number, (name, colour) in enumerate(zip(NAMES, COLOURS, strict=True)):
        x, y = left + TOKENS * SIZE + 10, top + number * 30
        body.append(
            f'<rect x="{x}" y="{y}" width="20" height="20" fill="{colour}"/>'
            f'<text x="{x + 28}" y="{y + 15}" font-size="13">{name}</text>'
        )
    body.append(f'<text x="{left}" y="20" font-size="13">keys</text>')
    body.append(f'<text x="4" y="{top + 15}" font-size="13">queries</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PICTURE.write_text(picture())
    elif not PICTURE.exists() or PICTURE.read_text() != picture():
        print(f"docs/{PICTURE.name} is not what the code says: run {sys.argv[0]}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
