"""Runs that lack what a run may lack are shown; what no run may hold is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from slimming.errors import CheckpointError, OutputError
from slimming.report import write_report

from .conftest import script_data, tables

MakeRun = Callable[..., Path]


def page_of(run: Path) -> str:
    return write_report(run).read_text("utf-8")


def panel(html: str, index: int) -> str:
    """The part of the page that shows one budget."""
    return html.split(f'class="choice choice-{index}"')[1].split('class="choice ')[0].split("</section>")[0]


def test_every_kept_number_stands_in_its_chart_and_in_the_table_beside_it(make_run: MakeRun) -> None:
    run = make_run()
    html = page_of(run)
    for index, row in enumerate(json.loads((run / "results.json").read_text())["rows"]):
        shown = tables(panel(html, index))
        for role, title in (("qk", "Query and key dimensions, per head"), ("v", "Value dimensions, per head")):
            wanted = [
                [str(depth), str(place), f"{head[role]} of {head['of']}" if head[role] else "gone whole"]
                for depth, layer in enumerate(row["layers"])
                for place, head in enumerate(layer["heads"])
            ]
            assert shown[title] == wanted
            drawn = chart_data(html, panel(html, index), title)["units"]
            assert [[one["layer"], str(one["head"]), one["told"]] for one in drawn] == wanted
        hidden = [[str(i), f"{one['mlp']['kept']} of {one['mlp']['of']}"] for i, one in enumerate(row["layers"])]
        assert shown["MLP hidden units"] == hidden
        maps = dict(shown["Token positions, block by block"])
        for depth, layer in enumerate(row["layers"]):
            kept = f"{len(layer['tokens']['kept'])} of 64" if "tokens" in layer else "all positions"
            assert maps[f"block {depth}"] == kept


def chart_data(html: str, part: str, title: str) -> dict[str, Any]:
    """What the chart of this title draws in a part of a page."""
    found = re.search(rf'<h4>{title}</h4>.*?<div id="(chart-\d+)">', part, re.DOTALL)
    assert found is not None
    return script_data(html, "charts")[found[1]]["datasets"]


def test_every_embedding_width_is_shown(make_run: MakeRun) -> None:
    def several(results: dict[str, Any]) -> None:
        names = ("layers.0.blocks.0.mlp.fc2.width", "layers.1.blocks.0.mlp.fc2.width")
        for row in results["rows"]:
            row["widths"] = [{"name": n, "kept": 40 + 8 * i, "of": 96 * (i + 1)} for i, n in enumerate(names)]

    shown = tables(panel(page_of(make_run(several)), 0))
    assert shown["Embedding width"] == [["layers.0", "40 of 96"], ["layers.1", "48 of 192"]]

    def one(results: dict[str, Any]) -> None:
        results["rows"][0]["widths"] = [{"name": "embedding", "kept": 64, "of": 96}]
        results["rows"][1]["widths"] = [{"name": "embedding", "kept": 96, "of": 96}]

    html = page_of(make_run(one))
    assert tables(panel(html, 0))["Embedding width"] == [["all", "64 of 96"]]
    assert "Embedding width" not in tables(panel(html, 1))


def test_darkened_cells_are_those_that_are_cut(make_run: MakeRun) -> None:
    def change(results: dict[str, Any]) -> None:
        kept = [p for p in range(64) if p not in (0, 1, 63)]
        results["rows"] = results["rows"][:1]
        for layer in results["rows"][0]["layers"]:
            layer["tokens"] = {"grid": [8, 8], "kept": kept}

    html = page_of(make_run(change))
    data = chart_data(html, panel(html, 0), "Token positions, block by block")
    places = {(tile["column"], tile["row"]) for tile in data["tiles"]}
    assert len(places) == len(data["tiles"]) == 9  # six blocks, and the last of them over three other images
    cut = {(0.0, 0.0), (0.125, 0.0), (0.875, 0.875)}
    assert sorted((cell["x"], cell["y"]) for cell in data["cells"]) == sorted(
        (column + x, row + y) for column, row in places for x, y in cut
    )
    assert {round(cell["x2"] - cell["x"], 3) for cell in data["cells"]} == {0.125}


def test_a_position_once_cut_stays_cut_where_a_block_names_none(make_run: MakeRun) -> None:
    def change(results: dict[str, Any]) -> None:
        results["rows"][0]["layers"][3]["tokens"] = None

    run = make_run(change)
    before = json.loads((run / "results.json").read_text())["rows"][0]["layers"][2]["tokens"]["kept"]
    maps = dict(tables(panel(page_of(run), 0))["Token positions, block by block"])
    assert maps["block 3"] == maps["block 2"] == f"{len(before)} of 64"


def lack_heads(row: dict[str, Any]) -> None:
    row["layers"][0]["heads"] = row["layers"][0]["heads"][:2]
    row["layers"][1]["heads"] = [{"qk": 0, "v": 0, "of": 32}] * 4


def lack_kinds(row: dict[str, Any]) -> None:
    for layer in row["layers"]:
        layer.pop("heads")
        layer.pop("tokens", None)


@pytest.mark.parametrize(
    "lack",
    [
        lack_heads,
        lack_kinds,
        lambda row: row.update(layers=[]),
        lambda row: row.update(top1=None),
        lambda row: row.update(top1=None, top1_cut=None),
        lambda row: (row["latency_ms"].pop("32"), row["speedup"].pop("32")),
        lambda row: row.update(latency_ms={}, speedup={}),
        lambda row: row.update(budget={"keep": {"head_dim": 0.7, "mlp": 0.6}}),
    ],
    ids=["heads", "kinds", "layers", "top1", "top1 of the cut", "a batch size", "latency", "a budget by kinds"],
)
def test_a_run_may_lack(make_run: MakeRun, lack: Callable[[dict[str, Any]], Any]) -> None:
    html = without_program(page_of(make_run(lambda results: lack(results["rows"][0]))))
    assert not re.search(r"\b(nan|None|inf)\b", html)
    assert page_of(make_run(lambda results: [lack(row) for row in results["rows"]]))


def without_program(html: str) -> str:
    """A page without images and without the libraries that it brings."""
    return re.sub('base64,[^"]*', "", html.rpartition("<script>")[0])


def test_a_run_may_lack_images_masks_and_search(make_run: MakeRun) -> None:
    html = page_of(make_run(lambda results: (results.pop("images"), results.pop("search"))))
    assert "no image of its data" in html
    assert 'id="search"' not in html


def test_a_log_that_is_gone_is_named(make_run: MakeRun) -> None:
    run = make_run()
    (run / "search/log.jsonl").unlink()
    assert re.search(r"were not there[^<]*\n<code>search/log\.jsonl", page_of(run))


def test_a_log_line_cut_off_at_the_end_is_left_out_and_one_inside_is_refused(make_run: MakeRun) -> None:
    log = (run := make_run()) / "search/log.jsonl"
    text = log.read_text()
    log.write_text(text + '{"step": 12')
    assert "Penalty on the masks" in page_of(run)
    log.write_text('{"step": 12\n' + text)
    with pytest.raises(CheckpointError, match="line 1, is truncated or not JSON"):
        write_report(run)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: r["rows"][1].pop("macs"), "rows[1]: object missing required field `macs`"),
        (lambda r: r["rows"][0].update(params="many"), "rows[0].params: expected `int`, got `str`"),
        (lambda r: r["rows"][0].update(top1=95.0), "rows[0].top1: expected `float` <= 1.0"),
        (lambda r: r["dense"]["latency_ms"]["1"].pop("p75"), "dense.latency_ms.1: object missing required"),
        (lambda r: r["rows"][0].update(budget={"macs": 7}), "budget.macs is neither a share"),
        (lambda r: r["rows"][0]["layers"][1]["tokens"]["kept"].append(64), "kept is not inside a grid of 8 by 8"),
        (lambda r: r["rows"][0]["layers"][0]["heads"][0].update(qk=99), "layers[0].heads[0]: 99 is not a part of 32"),
        (lambda r: r["images"][0].update(png="aGVsbG8="), "png is not a PNG"),
        (lambda r: r["images"][0].update(png='"><script>'), "png is not base64"),
        (lambda r: r["search"].update(log="../elsewhere.jsonl"), "does not lie in"),
    ],
    ids=["missing", "words", "percent", "quartile", "budget", "position", "dimensions", "no PNG", "markup", "outside"],
)
def test_what_no_run_holds_is_refused_by_place(
    make_run: MakeRun, change: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(complaint)):
        write_report(make_run(change))


def test_class_names_reach_the_reader_as_they_are(make_run: MakeRun) -> None:
    nasty = '</title><script>alert("1")</script>\'&amp;'

    def change(results: dict[str, Any]) -> None:
        results["model"]["classes"][0] = results["images"][0]["label"] = results["settings"]["path"] = nasty

    html = page_of(make_run(change))
    assert html.count("<script>") == 1
    assert nasty in unescape(html)


def test_the_report_goes_where_it_is_asked_to(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    target = tmp_path / "elsewhere" / "page.html"
    assert write_report(run, target) == target
    assert target.is_file()
    assert not (run / "report.html").exists()
    with pytest.raises(OutputError):
        write_report(run, tmp_path)
