"""One definition of a chart serves page, SVG and PNG; one table of budgets serves page, console and file."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from slimming.report import figures, kept_picture, print_table, read_results, write_figures, write_report, write_table
from slimming.report.charts import Figure
from slimming.report.model import Head, Kept, Layer, Tokens
from slimming.report.rendering import files, svg
from slimming.report.rows import budget_table

from .conftest import script_data

MakeRun = Callable[..., Path]
NASTY = "</script><b>&amp;\u2028var(--ink) datum.x $1"


def one_of_each(run: Path) -> list[Figure]:
    results = read_results(run)
    row = results.rows[0]
    maps = figures.tokens(row.layers or (), row.label, results.images or ())
    assert maps is not None
    structure = figures.structure(row.layers or (), (), row.label)
    return [*figures.accuracy(results)[:1], structure["qk"], structure["mlp"], maps, figures.masks(results)[0]]


def test_one_definition_gives_page_svg_and_png(make_run: MakeRun) -> None:
    run = make_run()
    html = write_report(run).read_text("utf-8")
    drawn = script_data(html, "charts").values()
    plain = [json.dumps({**spec, "params": None}).replace("view_", "") for spec in drawn]
    for figure in one_of_each(run):
        assert figure.told in html
        assert marks(svg(figure)) in [marks(part) for part in html.split('<div class="drawing"')]
        assert any(json.dumps(figure.spec()["datasets"][name])[1:-1] in spec for name in figure.data for spec in plain)
        made = files([figure], 3)
        text = made["svg"].decode()
        # Long words end where the font of a page, or of a file, fills the room that they have.
        assert {word[:8] for word in marks(text)} == {word[:8] for word in (*marks(svg(figure)), figure.title)}
        assert "var(--" not in text
        width, height = re.search(r'width="(\d+)" height="(\d+)"', text).groups()  # type: ignore[union-attr]
        with Image.open(io.BytesIO(made["png"])) as picture:
            assert picture.size == (3 * int(width), 3 * int(height))
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096) or range(9)) > 3


def marks(text: str) -> list[str]:
    """The words that a drawing holds: labels of axes, legends and points."""
    return sorted(re.findall(r"<text[^>]*>([^<]+)</text>", text.partition("<details")[0]), key=str)


def test_texts_of_users_are_never_part_of_a_definition(make_run: MakeRun) -> None:
    results = read_results(make_run())
    row = replace(results.rows[0], name=NASTY, budget=None)
    assert row.label == NASTY
    figure = figures.accuracy(replace(results, rows=(row,)))[0]
    drawn = svg(figure)
    assert NASTY not in drawn
    assert "<b>" not in drawn
    assert NASTY in [record["row"] for record in figure.data["points"]]


def test_figures_are_written_as_svg_and_png(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    written = write_figures(read_results(run), tmp_path / "figures")
    assert [path.name for path in written] == [
        f"{name}.{ending}" for name in ("structure", "accuracy", "tokens") for ending in ("svg", "png")
    ]
    text = (tmp_path / "figures" / "structure.svg").read_text("utf-8")
    assert "MLP hidden units" in text
    assert "50\u00a0%\u00a0MACs" in text


def test_a_model_that_is_whole_has_no_picture_of_what_it_kept() -> None:
    whole = Layer(name="0", label="0", heads=(Head(qk=8, v=8, of=8),), mlp=Kept(kept=4, of=4))
    assert kept_picture([whole], ()) is None
    cut = replace(whole, mlp=Kept(kept=1, of=4), tokens=Tokens(grid=(2, 2), kept=frozenset({0, 3})))
    picture = kept_picture([cut], ())
    assert picture is not None
    with Image.open(io.BytesIO(picture)) as opened:
        assert opened.size[0] > 300


def add_one_shot(results: dict[str, Any]) -> None:
    results["rows"][0]["top1_one_shot"] = 0.4321


@pytest.mark.parametrize("change", [None, add_one_shot], ids=["plain", "with one shot"])
def test_page_console_and_markdown_show_the_same_table(
    make_run: MakeRun, change: Callable[[dict[str, Any]], Any] | None, tmp_path: Path
) -> None:
    run = make_run(change)
    table = budget_table(read_results(run))
    shown = io.StringIO()
    print_table(json.loads((run / "results.json").read_text()), Console(file=shown, width=100))
    html = write_report(run).read_text("utf-8").split('<section id="accuracy">')[0]
    lines = write_table(read_results(run), tmp_path / "table.md").read_text("utf-8").splitlines()
    in_file = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]
    for line, cells in zip(table.lines, in_file, strict=True):
        assert len(cells) == 1 + len(table.columns)
        for cell, text in zip(line.cells, cells[1:], strict=True):
            below = cell.below.replace("\u00a0", " ")
            assert text == (f"{cell.text} ({below})" if below else cell.text)
            assert cell.text in shown.getvalue()
            assert below in shown.getvalue()
            assert f">{cell.text}<" in html
