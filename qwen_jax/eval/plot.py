"""PNG pictures of heat maps and plans, by matplotlib."""

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.eval.heatmap import HeatMap, Panels, PlotError
from qwen_jax.eval.plan_picture import BLOCKS, COLUMNS, PlanPicture, colours, rasterise
from qwen_jax.storage import atomic

_SOFTWARE = "qwen-jax plot"
_DPI = 100
_WIDTH = 12.0  # inches
_MOST_NUMBERED = 12  # columns of a map whose cells carry their numbers
_COLOURS = "viridis"  # even in lightness, and safe for the colour-blind
_UNMEASURED = "#dddddd"
_GREY = "#555555"
_PLAN_PIXELS = 1000


def save_heat_maps(panels: Panels, path: Path) -> None:
    """Writes the maps side by side, 1,200 pixels wide.

    Raises:
        PlotError: if matplotlib is not installed, or the file is not to be a PNG.
        OSError: if the file cannot be written.
    """
    figures = check_picture(path)
    maps = panels.maps
    widest = max(each.values.shape[1] for each in maps)
    across = min(panels.across, 3 if widest <= 8 else 2)
    lines = [maps[first : first + across] for first in range(0, len(maps), across)]
    heights = [max(_height(each, across) for each in line) for line in lines]
    size = _WIDTH, sum(heights) + 0.9 * len(lines) + 0.5
    figure = figures.Figure(size, dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    grid = figure.subplots(len(lines), across, squeeze=False, height_ratios=heights)
    for row, (line, height) in enumerate(zip(lines, heights, strict=True)):
        for axes, shown in zip(grid[row], line, strict=False):
            image = _draw_map(axes, shown)
            # Equal scales of a line are drawn once, at its end.
            scale = shown.what, shown.low, shown.high
            if shown is line[-1] or scale != (line[-1].what, line[-1].low, line[-1].high):
                bar = figure.colorbar(image, ax=axes, label=shown.what, aspect=height / 0.18)
                bar.outline.set_visible(False)
        for axes in grid[row, len(line) :]:
            axes.set_axis_off()
    figure.suptitle(panels.title, fontsize=15, fontweight="bold", parse_math=False)
    _save(figure, path)


def _height(shown: HeatMap, across: int) -> float:
    """Returns the height in inches at which cells are about square, within bounds."""
    rows, columns = shown.values.shape
    cell = (_WIDTH - 1.5) / across / columns
    return max(1.0, rows * min(max(cell, 0.2), 0.5 if rows <= 12 else 0.3))


def _draw_map(axes: Any, shown: HeatMap) -> Any:
    """Draws a map without its colour bar; returns the image for the colour bar."""
    rows, columns = shown.values.shape
    axes.set_facecolor(_UNMEASURED)
    image = axes.imshow(
        np.ma.masked_invalid(shown.values),
        cmap=_COLOURS,
        vmin=shown.low,
        vmax=shown.high,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_title(shown.title, fontsize=12, parse_math=False)
    for axis, names, count, most in (
        (axes.xaxis, shown.columns, columns, 16),
        (axes.yaxis, shown.rows, rows, 32),
    ):
        step = math.ceil(count / most)
        axis.set_ticks(range(0, count, step), names.labels[::step])
        axis.set_label_text(names.name, fontsize=11)
    if np.isnan(shown.values).any():
        axes.set_xlabel(f"{shown.columns.name} (grey was not measured)", fontsize=11)
    axes.tick_params(length=0, labelsize=10)
    if max(map(len, shown.columns.labels)) * min(columns, 16) > 90:
        axes.tick_params(axis="x", rotation=30)
    axes.spines[:].set_visible(False)
    if columns <= _MOST_NUMBERED:
        # White lines part the cells; the ticks that carry them are not seen.
        axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
        _write_numbers(axes, image, shown.values)
    return image


def _write_numbers(axes: Any, image: Any, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        if math.isnan(value):
            axes.text(column, row, "-", ha="center", va="center", color=_GREY)
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        color = "white" if dark else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=10)


def save_plan(picture: PlanPicture, path: Path) -> None:
    """Writes the picture of a plan, 1,200 pixels wide; a pixel is one or more tokens.

    Raises:
        PlotError: if matplotlib is not installed, or the file is not to be a PNG.
        OSError: if the file cannot be written.
    """
    figures = check_picture(path)
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    T = picture.tokens
    left, bottom, width, height = 130, 80, 1200, 1180
    figure = figures.Figure((width / _DPI, height / _DPI), dpi=_DPI)
    # A pixel of the raster is a pixel of the file: resampling would swallow single columns.
    axes = figure.add_axes(
        (left / width, bottom / height, _PLAN_PIXELS / width, _PLAN_PIXELS / height)
    )
    raster = rasterise(picture, _PLAN_PIXELS, _PLAN_PIXELS)
    image = colours(raster)
    image[np.isnan(raster.blocks)] = 242
    axes.imshow(image, extent=(0, T, T, 0), interpolation="nearest", aspect="equal")
    axes.plot([0, T], [0, T], color=_GREY, linewidth=0.8)
    handles = [
        Patch(color=_hex(BLOCKS), label="whole blocks: diagonals and what is beside them"),
        Patch(color=_hex(COLUMNS), label="single columns"),
        Patch(facecolor="white", edgecolor=_GREY, label="not read"),
    ]
    if picture.chunk_len is not None:
        borders = range(picture.chunk_len, T, picture.chunk_len)
        for border in borders:
            axes.plot([0, border], [border, border], color=_GREY, linewidth=0.7, dashes=(6, 4))
            axes.plot([border, border], [border, T], color=_GREY, linewidth=0.7, dashes=(6, 4))
        if borders:
            handles += axes.plot(
                [], [], color=_GREY, linewidth=0.7, dashes=(6, 4), label="borders of DCA chunks"
            )
    axes.legend(
        handles=handles,
        loc="upper right",
        fontsize=12,
        frameon=False,
        borderaxespad=1.5,
        title="the darker a pixel, the more of its pairs are read",
        title_fontsize=12,
        alignment="left",
    )
    axes.set_xlim(0, T)
    axes.set_ylim(T, 0)
    for axis, name in ((axes.xaxis, "key, in tokens"), (axes.yaxis, "query, in tokens")):
        axis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda token, _: f"{token:,.0f}"))
        axis.set_label_text(name, fontsize=12)
    axes.tick_params(labelsize=11, color=_GREY)
    axes.spines[:].set_color("#bbbbbb")
    first, second = picture.title.split("\n")
    axes.text(0, 1.05, first, transform=axes.transAxes, fontsize=15, fontweight="bold")
    axes.text(0, 1.018, second, transform=axes.transAxes, fontsize=12, color=_GREY)
    _save(figure, path)


def _hex(colour: tuple[int, int, int]) -> str:
    return "#" + bytes(colour).hex()


def check_picture(path: Path) -> Any:
    """Checks, before long work, that a picture can be written to a path.

    Returns:
        The module `matplotlib.figure`; figures made from it need no display.

    Raises:
        PlotError: if it is not installed, or `path` is no name of a PNG.
        FileExistsError: if something else than a picture of ours is at `path`.
        FileError: if there is a directory of that name.
        OSError: if nothing can be written there.
    """
    if path.suffix.lower() != ".png" and not atomic.is_stream(path):
        raise PlotError(f"--out {path}: pictures are PNG files, so the name must end in .png")
    try:
        from matplotlib import figure
    except ImportError:
        raise PlotError(
            "--out needs matplotlib: pip install -e '.[plot]' in a checkout of qwen-jax"
        ) from None
    atomic.prepare(path, streams=True)
    atomic.check_ours(path, _is_ours, streams=True)
    return figure


def _save(figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # A name in letters that the font lacks is drawn as boxes; the figures are what counts.
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        figure.savefig(picture, format="png", facecolor="white", metadata={"Software": _SOFTWARE})
    atomic.write(path, picture.getvalue(), streams=True)


def _is_ours(path: Path) -> bool:
    """Returns True if this module wrote a PNG, by its `Software` text."""
    with path.open("rb") as file:
        head = file.read(4096)
    return head.startswith(b"\x89PNG") and f"Software\0{_SOFTWARE}".encode() in head
