"""Maps and plans as PNG files and in terminals, with colours and without; the command."""

import io
import re
import sys

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from rich.console import Console
from support.plan_pictures import small_picture
from support.plot_files import record, write_log, write_report

from qwen_jax.cli import main
from qwen_jax.eval import plan_picture, plot, sources, terminal

ESCAPE = re.compile(r"\x1b\[[\d;]*m")


@pytest.fixture
def log(tmp_path):
    records = [
        record(1000 * length, depth, length < 4 * depth, variant=variant)
        for length in (1, 2, 3)
        for depth in (0.1, 0.5, 0.9)
        for variant in ("rope", "dca")
        if (length, depth) != (3, 0.9)
    ]
    records.append(record(3000, 0.9, True, variant="dca"))
    return write_log(tmp_path / "log.jsonl", records)


@pytest.fixture
def run(capsys):
    def run(*arguments):
        code = main(["plot", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def printed(show, what, *, width=80, colours=False):
    file = io.StringIO()
    more = {"force_terminal": True, "color_system": "truecolor"} if colours else {}
    show(what, Console(file=file, width=width, no_color=not colours, **more))
    return file.getvalue().splitlines()


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def nearly(image, colour):
    return (np.abs(image - np.asarray(colour)).max(-1) <= 3).sum()


def test_a_png_holds_the_colours_of_the_cells(log, tmp_path, run):
    out, numbers = tmp_path / "map.png", tmp_path / "map.csv"
    code, stdout, stderr = run("eval", log, "--out", out, "--csv", numbers)
    assert (code, stdout) == (0, "")
    assert stderr == f"wrote {out}\nwrote {numbers}\n"
    assert len(numbers.read_text().splitlines()) == 1 + 2 * 9
    image = pixels(out)
    assert image.shape[1] == 1200
    assert 200 < image.shape[0] < 600
    assert tuple(image[0, 0]) == (255, 255, 255)
    # One cell was not asked: as many pixels are grey as each cell has.
    values = [shown.values for shown in sources.scores([log]).maps]
    right = sum(int((each == 1).sum()) for each in values)
    wrong = sum(int((each == 0).sum()) for each in values)
    top, bottom = (np.multiply(colormaps["viridis"](share)[:3], 255) for share in (1.0, 0.0))
    cell = nearly(image, (0xDD, 0xDD, 0xDD))
    assert cell > 5000
    for colour, count in ((top, right), (bottom, wrong)):
        assert nearly(image, colour) == pytest.approx(count * cell, rel=0.2)


def test_names_are_text_and_nothing_else(tmp_path):
    records = [record(1000, 0.5, True, task="$x [red] 针 \\frac")]
    log = write_log(tmp_path / "log.jsonl", records, model="$^[/]")
    panels = sources.scores([log])
    plot.save_heat_maps(panels, tmp_path / "map.png")
    assert "$x [red] 针 \\frac, dca (1 answer a cell)" in printed(terminal.show_heat_maps, panels)


@pytest.mark.parametrize("shape", [(48, 40), (7, 9)])
def test_a_report_of_any_shape_is_drawn(tmp_path, shape):
    path = tmp_path / "report.json"
    write_report(path, *shape)
    panels = sources.recall(path)
    plot.save_heat_maps(panels, tmp_path / "map.png")
    image = pixels(tmp_path / "map.png")
    assert image.shape[1] == 1200
    assert 400 < image.shape[0] < 1300
    assert len(np.unique(image[::5, ::5].reshape(-1, 3), axis=0)) > 50
    plain = printed(terminal.show_heat_maps, panels)
    assert max(map(len, plain)) <= 80
    assert "\x1b" not in "".join(plain)
    for line in printed(terminal.show_heat_maps, panels, colours=True):
        assert len(ESCAPE.sub("", line)) <= 80


def test_numbers_stand_in_the_cells_of_a_plain_terminal(log, run):
    code, out, err = run("eval", log)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "tiny: mean score",
        "",
        "passkey, rope (1 answer a cell)",
        "depth    1k   2k   3k tokens",
        "  10%  0.00 0.00 0.00",
        "  50%  1.00 0.00 0.00",
        "  90%  1.00 1.00    -",
        "- was not measured",
        "",
        "passkey, dca (1 answer a cell)",
        "depth    1k   2k   3k tokens",
        "  10%  0.00 0.00 0.00",
        "  50%  1.00 0.00 0.00",
        "  90%  1.00 1.00 1.00",
    ]


def test_digits_stand_for_tenths_of_the_scale_where_numbers_find_no_room(tmp_path):
    records = [
        record(length * 1000, 0.5, True, score=length / 20)
        for length in range(1, 21)
        if length != 7
    ]
    records.append(record(7000, 0.9, False))
    panels = sources.scores([write_log(tmp_path / "log.jsonl", records)])
    lines = printed(terminal.show_heat_maps, panels)
    shares = "0 1 1 2 2 3 - 4 4 5 5 6 6 7 7 8 8 9 9 9"
    assert lines[4].rstrip() == f"  50% {shares}"
    assert lines[5].split()[1:] == [*"------", "0", *"-" * 13]
    assert lines[3].split()[:4] == ["depth", "1k", "3k", "5k"]
    assert lines[-1] == "- was not measured"


def test_columns_that_do_not_fit_are_told(tmp_path):
    write_report(tmp_path / "report.json", 3, 40)
    panels = sources.recall(tmp_path / "report.json")
    lines = printed(terminal.show_heat_maps, panels, width=30)
    note = " ".join(line.strip() for line in lines)
    assert (
        "16 of 40 columns do not fit 30 characters (head 24 and on): --out FILE.png shows all"
    ) in note
    assert max(map(len, lines)) <= 30


def test_cells_have_their_colours_in_a_terminal_with_colours(log, tmp_path):
    lines = printed(terminal.show_heat_maps, sources.scores([log]), colours=True)
    [middle] = [line for line in lines if line.startswith("  50%")][:1]
    assert "\x1b[30;48;2;253;231;37m 1.00\x1b[0m" in middle
    assert middle.count("\x1b[37;48;2;68;1;84m 0.00\x1b[0m") == 2
    write_report(tmp_path / "report.json", 5, 28)
    panels = sources.recall(tmp_path / "report.json")
    recall = panels.maps[0]
    lines = printed(terminal.show_heat_maps, panels, colours=True)
    cell = r"\x1b\[\d+;48;2;(\d+);(\d+);(\d+)m(\d) "
    viridis = colormaps["viridis"]
    for line, row in zip(lines[4:9], recall.values, strict=True):
        for (*colour, digit), value in zip(re.findall(cell, line), row, strict=True):
            share = (value - recall.low) / (recall.high - recall.low)
            expected = np.multiply(viridis(float(share))[:3], 255)
            np.testing.assert_allclose(np.array(colour, int), expected, atol=7)
            assert int(digit) == int(10 * share + 1e-9)


def test_a_plan_is_drawn_with_its_borders(tmp_path):
    picture = small_picture()
    plot.save_plan(picture, tmp_path / "plan.png")
    image = pixels(tmp_path / "plan.png")
    assert image.shape == (1180, 1200, 3)
    square = image[100:1100, 130:1130]
    raster = plan_picture.rasterise(picture, 1000, 1000)
    expected = plan_picture.colours(raster).astype(int).repeat(5, 0).repeat(5, 1)
    # Away from the diagonal, the borders of chunks and the frame, pixels are those of the plan.
    inside = np.tril(np.ones((1000, 1000), bool), -8)
    for border in (0, 450, 900, 1000):
        inside[max(0, border - 4) : border + 4] = False
        inside[:, max(0, border - 4) : border + 4] = False
    np.testing.assert_array_equal(square[inside], expected[inside])
    assert (square[450, 5:400].sum(-1) < 600).mean() > 0.4  # a dashed line


def test_a_plan_in_a_plain_terminal_is_letters_of_its_pixels():
    picture = small_picture()
    lines = printed(terminal.show_plan, picture)
    assert lines[0] == "layer 2, head 5: budgets of 12 columns and 3 diagonals, 200 tokens"
    assert lines[1] == "density 0.250, recall 0.875, tiles of 16 queries and 8 keys"
    assert max(map(len, lines)) <= 80
    drawn = [line[4:].rstrip() for line in lines[3:-1]]
    raster = plan_picture.rasterise(picture, 38, 76)
    assert len(drawn) == 38
    for line, blocks, columns in zip(drawn, raster.blocks, raster.columns, strict=True):
        for letter, block, column in zip(line.ljust(76), blocks, columns, strict=True):
            expected = {
                " ": np.isnan(block),
                ".": block == column == 0,
                "|": column > block,
                "+": 0 < block <= 0.5 and column <= block,
                "#": block > 0.5 and column <= block,
            }
            assert expected[letter]


def test_a_plan_in_a_terminal_with_colours_has_two_pixels_a_character():
    picture = small_picture()
    lines = printed(terminal.show_plan, picture, colours=True)
    assert max(len(ESCAPE.sub("", line)) for line in lines) <= 80
    image = plan_picture.colours(plan_picture.rasterise(picture, 76, 76))
    last = lines[-2]
    above, below = (";".join(map(str, image[row, 0])) for row in (74, 75))
    assert f"\x1b[38;2;{above};48;2;{below}m▀" in last


def test_without_matplotlib_the_way_out_is_told(log, tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("eval", log, "--out", tmp_path / "map.png")
    way_out = "pip install -e '.[plot]' in a checkout of qwen-jax"
    assert (code, err) == (2, f"error: --out needs matplotlib: {way_out}\n")
    assert run("eval", log)[0] == 0


def test_what_cannot_be_done_is_told_in_a_line(log, tmp_path, run):
    write_report(tmp_path / "report.json")
    for arguments, named in (
        (("eval", log, "--out", tmp_path / "map.pdf"), "the name must end in .png"),
        (("eval", log, "--out", tmp_path / "report.json" / "map.png"), "it is not a directory"),
        (("eval", tmp_path / "none.jsonl"), "none.jsonl is missing"),
        (("recall", log), "no report of `qwen-jax calibrate`"),
        (("recall", tmp_path / "report.json", "--length", "4K"), "holds no length 4096"),
        (("recall", tmp_path / "report.json", "--length", "long"), "length 'long'"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert named in err
        assert err.count("\n") == 1


def test_a_length_of_a_report_is_chosen(tmp_path, run):
    write_report(tmp_path / "report.json")
    code, out, _ = run("recall", tmp_path / "report.json", "--length", "8K")
    assert code == 0
    assert out.startswith("tiny: sparse prefill of 8,192 tokens")
