"""The report: what it says equals the results, nothing of it leaves the file, and browsers open it."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from slimming.core.files import seal
from slimming.errors import SlimmingError
from slimming.report import print_table, write_report
from slimming.report.model import RESULTS

from .conftest import DEIT

VOID = {"meta", "br", "img", "input", "link", "hr", "col"}
MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """Collects text and addresses, and checks that every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.scripts = 0
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data + " "


def test_the_page_is_whole_and_shows_the_numbers_of_the_results(make_run: MakeRun) -> None:
    run = make_run()
    html = write_report(run).read_text("utf-8")
    page = Page(html)
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "url(http" not in html
    results = RESULTS.read_values(run / "results.json")
    assert f"{100 * results['dense']['top1']:.1f}" in page.text
    for row in results["rows"]:
        assert row["name"] in page.text
        assert f"{100 * row['top1']:.1f}" in page.text
        assert f"{row['speedup']['1']['median']:.2f}" in page.text


def test_a_changed_number_changes_the_page(make_run: MakeRun) -> None:
    run = make_run()
    results = RESULTS.read_values(run / "results.json")
    assert "12.3" not in Page(write_report(run).read_text("utf-8")).text.split("Accuracy against cost")[0]
    results["rows"][0]["top1"] = 0.1234
    (run / "results.json").write_text(json.dumps(seal({"format": 1, **results})))
    assert "12.3" in Page(write_report(run).read_text("utf-8")).text.split("Accuracy against cost")[0]


def test_names_and_paths_are_escaped(make_run: MakeRun) -> None:
    run = make_run()
    plain = Page(write_report(run).read_text("utf-8")).scripts
    results = RESULTS.read_values(run / "results.json")
    nasty = "<script>alert('x')</script>\"&"
    results["name"] = results["data"]["source"] = results["model"]["classes"][0] = nasty
    results["images"][0]["label"] = nasty
    (run / "results.json").write_text(json.dumps(seal({"format": 1, **results})))
    page = Page(write_report(run).read_text("utf-8"))
    assert page.scripts == plain
    assert nasty in page.text


def test_a_large_run_stays_small(make_run: MakeRun) -> None:
    path = write_report(make_run(shape=DEIT))
    Page(path.read_text("utf-8"))
    assert path.stat().st_size < 6_000_000


@pytest.mark.parametrize("damage", ["missing", "truncated", "newer", "rows"], ids=str)
def test_damaged_results_are_refused_by_a_sentence(make_run: MakeRun, damage: str) -> None:
    run = make_run()
    file = run / "results.json"
    text = file.read_text()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_text(text[: len(text) // 2])
    else:
        value = RESULTS.read_values(file)
        file.write_text(json.dumps(seal({"format": 99, **value} if damage == "newer" else {**value, "rows": []})))
    with pytest.raises(SlimmingError, match=re.escape(str(file.name)) + r"|budget|format"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("width", [100, 120], ids=lambda width: f"{width} columns")
def test_the_console_table_fits(make_run: MakeRun, width: int) -> None:
    results = RESULTS.read_values(make_run() / "results.json")
    buffer = io.StringIO()
    print_table(results, Console(file=buffer, width=width))
    lines = buffer.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for row in results["rows"]:
        assert any(f"{100 * row['top1']:.1f}" in line for line in lines)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_opens_and_prints_it(make_run: MakeRun, tmp_path: Path) -> None:
    page = write_report(make_run())
    picture, paper = tmp_path / "page.png", tmp_path / "page.pdf"
    base = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    log = ["--enable-logging=stderr", "--v=0"]
    address = page.resolve().as_uri()
    seen = subprocess.run(
        [*base, *log, "--window-size=1366,3000", f"--screenshot={picture}", address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert picture.stat().st_size > 20_000, seen.stderr
    assert "CONSOLE" not in seen.stderr
    subprocess.run([*base, f"--print-to-pdf={paper}", address], capture_output=True, timeout=120, check=False)
    assert paper.read_bytes().startswith(b"%PDF")
