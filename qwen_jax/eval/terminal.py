"""Pictures in a terminal: in colours if it has them, else in digits and letters."""

import math
from collections.abc import Iterator

import numpy as np
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from qwen_jax.eval.heatmap import HeatMap, Panels
from qwen_jax.eval.plan_picture import PlanPicture, Raster, colours, rasterise

_MOST_NUMBERED = 12  # columns of a map whose cells carry their numbers
_NUMBER_WIDTH = 5
_PLAN_PIXELS = 100
# Seventeen even steps of matplotlib's viridis.
_VIRIDIS = np.array(
    [
        list(bytes.fromhex(colour))
        for colour in (
            "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c "
            "1f9f88 27ad81 3dbc74 5cc863 81d34d aadc32 d5e21a fde725"
        ).split()
    ]
)


def show_heat_maps(panels: Panels, console: Console) -> None:
    """Prints the maps below each other; columns that do not fit are left out, with a note."""
    lines = [Text(panels.title, style="bold")]
    for shown in panels.maps:
        lines += [Text(), *_heat_map(shown, console)]
    for line in lines:
        console.print(line)


def _heat_map(shown: HeatMap, console: Console) -> list[Text]:
    indent = max(len(label) for label in (*shown.rows.labels, shown.rows.name)) + 1
    room = console.width - indent
    count = shown.values.shape[1]
    number_width = max(_NUMBER_WIDTH, 1 + max(len(label) for label in shown.columns.labels))
    numbered = count <= _MOST_NUMBERED and count * number_width <= room
    width = number_width if numbered else 2 if 2 * count <= room else 1
    fitting = max(1, min(count, room // width))
    labels = shown.columns.labels[:fitting]
    head = Text(f"{shown.rows.name:>{indent - 1}} ")
    head.append(
        "".join(f"{label:>{width}}" for label in labels) if numbered else _ruler(labels, width)
    )
    head.append(
        f" {shown.columns.name}" if len(head) + len(shown.columns.name) < console.width else ""
    )
    values = shown.values[:, :fitting]
    lines = [Text(shown.title), head, *_rows(shown, values, indent, width, console, numbered)]
    if not numbered:
        step = (shown.high - shown.low) / 10
        lines.append(
            Text(
                f"{shown.what}: 0 is below {shown.low + step:.3g}, 1 below "
                f"{shown.low + 2 * step:.3g}, and so on to 9, from {shown.high - step:.3g} to "
                f"{shown.high:.3g}"
            )
        )
    if np.isnan(values).any():
        lines.append(Text("- was not measured"))
    if fitting < count:
        lines.append(
            Text(
                f"{count - fitting} of {count} columns do not fit {console.width} characters "
                f"({shown.columns.name} {shown.columns.labels[fitting]} and on): "
                "--out FILE.png shows all"
            )
        )
    return lines


def _ruler(labels: tuple[str, ...], width: int) -> str:
    """Lays out labels over their columns, as many as fit."""
    text, room = "", len(labels) * width
    for index, label in enumerate(labels):
        at = index * width
        if (at > len(text) or not text) and at + len(label) <= room:
            text = text.ljust(at) + label
    return text.ljust(room)


def _rows(
    shown: HeatMap, values: np.ndarray, indent: int, width: int, console: Console, numbered: bool
) -> Iterator[Text]:
    """A line for each row: numbers, or the digits of their tenths, on their colours."""
    for label, row in zip(shown.rows.labels, values, strict=True):
        line = Text(f"{label:>{indent - 1}} ")
        for value in row:
            measured = not math.isnan(value)
            style = _cell_style(shown, value) if measured and _coloured(console) else ""
            if not measured:
                cell = "-"
            elif numbered:
                cell = f"{value:.2f}"
            else:
                tenth = 10 * (value - shown.low) / (shown.high - shown.low)
                cell = str(min(9, max(0, math.floor(tenth + 1e-9))))
            line.append(cell.rjust(width) if numbered else cell.ljust(width), style)
        yield line


def show_plan(picture: PlanPicture, console: Console) -> None:
    """Prints the plan, queries downwards and keys to the right, at most 100 characters wide."""
    last = f"{picture.tokens:,}"
    indent = len(last) + 1
    pixels = max(2, min(console.width - indent, _PLAN_PIXELS, picture.tokens))
    head = "0".ljust(pixels - len(last)) + last if len(last) < pixels else last
    lines = [Text(picture.title), Text(" " * indent + head)]
    if _coloured(console):
        drawn = _plan_in_colours(rasterise(picture, pixels, pixels))
        legend = Text("blue: whole blocks, vermilion: single columns, white: not read")
    else:
        drawn = _plan_in_letters(rasterise(picture, math.ceil(pixels / 2), pixels))
        legend = Text(
            "whole blocks: # over half of the pairs, + some; | single columns; . not read"
        )
    for number, line in enumerate(drawn):
        label = "0" if number == 0 else last if number == len(drawn) - 1 else ""
        lines.append(Text(f"{label:>{indent - 1}} ") + line)
    for line in [*lines, legend]:
        console.print(line)


def _plan_in_colours(raster: Raster) -> list[Text]:
    image, outside = colours(raster), np.isnan(raster.blocks)
    lines = []
    for upper in range(0, len(image), 2):
        line = Text()
        for column in range(image.shape[1]):
            halves = [
                None if outside[row, column] else _rgb(image[row, column])
                for row in range(upper, min(upper + 2, len(image)))
            ]
            above, below = (*halves, None)[:2]
            if above is None:  # then only the lower half, if any, holds causal pairs
                line.append("▄" if below else " ", Style(color=below))
            else:
                line.append("▀", Style(color=above, bgcolor=below))
        lines.append(line)
    return lines


def _plan_in_letters(raster: Raster) -> list[Text]:
    def letter(blocks: float, columns: float) -> str:
        if math.isnan(blocks):
            return " "
        if columns > blocks:
            return "|"
        return "#" if blocks > 0.5 else "+" if blocks > 0 else "."

    return [
        Text("".join(map(letter, blocks, columns)))
        for blocks, columns in zip(raster.blocks.tolist(), raster.columns.tolist(), strict=True)
    ]


def _coloured(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


def _cell_style(shown: HeatMap, value: float) -> Style:
    at = (value - shown.low) / (shown.high - shown.low) * (len(_VIRIDIS) - 1)
    steps = np.arange(len(_VIRIDIS))
    colour = np.array([np.interp(at, steps, channel) for channel in _VIRIDIS.T])
    dark = colour @ (0.299, 0.587, 0.114) < 128
    return Style(color="white" if dark else "black", bgcolor=_rgb(colour))


def _rgb(colour: np.ndarray) -> Color:
    red, green, blue = (round(float(channel)) for channel in colour)
    return Color.from_rgb(red, green, blue)
