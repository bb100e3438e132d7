"""The explorer: every control works in a browser, and nothing in it comes from or goes to anywhere else."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slimming.core.files import seal
from slimming.report import read_results, write_comparison, write_report
from slimming.report.explored import Explored

from .conftest import Shape, fabricate, script_data
from .explored import VIT_B, explored

CHROMIUM = shutil.which("chromium")
NASTY = '</script><script>document.title="gone"</script><!--<img src=x onerror=alert(1)>&amp;\u2028'
WAIT = 60_000
"""Milliseconds: a busy machine may be slow, and no test here is of speed."""

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Explored]:
    directory = tmp_path_factory.mktemp("explorer") / "run"
    results = fabricate(directory)
    results["images"][0]["label"] = NASTY
    (directory / "results.json").write_text(json.dumps(seal(results)), "utf-8")
    return directory, explored(directory, Shape())


@pytest.fixture(scope="module")
def single(run: tuple[Path, Explored]) -> Path:
    return write_report(run[0], None, run[1])


@pytest.fixture(scope="module")
def several(run: tuple[Path, Explored]) -> Path:
    directory, one = run
    other = replace(explored(directory, Shape(), latency=False, seed=1), name="the other")
    results = read_results(directory)
    return write_comparison([results, replace(results, name="the other")], [one, other], directory / "both.html")


def test_the_page_holds_every_plan_and_no_text_leaves_its_place(single: Path, run: tuple[Path, Explored]) -> None:
    html = single.read_text("utf-8")
    (found,) = script_data(html, "explorer-data")
    assert {metric: len(steps) for metric, steps in found["steps"].items()} == {"macs": 81, "params": 81, "latency": 81}
    assert found["pictures"][0]["label"] == NASTY
    assert NASTY not in html
    assert html.count("<script>") == 1
    step = found["steps"]["macs"][30]
    wanted = run[1].steps["macs"][30]
    assert (step["share"], step["name"], step["macs"]) == (0.5, "macs-0.50", wanted.costs.macs)
    assert step["kept"]["qk"] == [head.qk for layer in wanted.layers for head in layer.heads or ()]
    assert step["kept"]["mlp"] == [layer.mlp.kept for layer in wanted.layers if layer.mlp]
    for number, layer in zip(step["positions"], wanted.layers, strict=True):
        assert layer.tokens is not None
        bits = bin(int(number, 16))[3:]
        assert {place for place, bit in enumerate(bits) if bit == "1"} == layer.tokens.kept


def test_a_large_model_stays_small(tmp_path: Path) -> None:
    fabricate(tmp_path / "run", VIT_B)
    page = write_report(tmp_path / "run", None, explored(tmp_path / "run", VIT_B))
    assert page.stat().st_size < 4_000_000


def test_the_program_asks_no_one(single: Path) -> None:
    html = single.read_text("utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in html.replace("&#39;", "'")
    program = html.rpartition("<script>")[2]
    ours = program[program.index('"use strict";\n(() => {') :]
    assert "explorer-data" in ours
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import\(|innerHTML|eval\(|://", ours)
    # Vega would make functions of texts; the policy forbids it, and its interpreter is asked for.
    assert "ast: true" in ours
    program, end, _ = program.partition("</script>\n</body>\n</html>\n")
    assert end
    assert "</script" not in program


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=WAIT)
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a page from its file, and fails when it asked for anything else or complained."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(WAIT)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: asked.append(f"error {error}"))
    page.on("console", lambda message: asked.append(f"console {message.text}"))

    def open_file(path: Path) -> Any:
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-explorer=ready]")
        return page

    yield open_file
    context.close()
    assert [one for one in asked if not one.startswith(("file:", "data:"))] == []
    assert len({one for one in asked if one.startswith("file:")}) == 1


def text(page: Any, selector: str) -> str:
    return (page.text_content(selector) or "").replace("\u00a0", " ")


@needs_browser
def test_the_slider_redraws_everything_by_keyboard(opened: Any, single: Path) -> None:
    page = opened(single)
    assert text(page, "#share-a") == "70 %"
    assert page.title() != "gone"
    before = {
        part: page.inner_html(part) for part in ("#structure-a", "#tokens-a", "#numbers", "#frontier", "#table-a")
    }
    page.focus("#slider-a")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    page.keyboard.press("ArrowLeft")
    assert outline == "solid"
    assert text(page, "#share-a") == "69 %"
    assert page.get_attribute("#slider-a", "aria-valuetext").replace("\u00a0", " ") == "69 % of the MACs"
    assert "macs=0.69" in text(page, "#command-a")
    assert "macs=0.69" in text(page, "#python-a")
    for part, html in before.items():
        assert page.inner_html(part) != html, part
    page.wait_for_selector("#said:has-text('Budget A')")
    assert page.get_attribute("#said", "aria-live") == "polite"
    page.keyboard.press("Home")
    assert text(page, "#share-a") == "20 %"
    assert page.is_disabled("#less-a")
    page.keyboard.press("End")
    assert text(page, "#share-a") == "100 %"
    page.click("#less-a")
    assert text(page, "#share-a") == "99 %"
    page.click("#more-a")
    assert page.is_disabled("#more-a")
    page.click("#goto-a button:has-text('30')")
    assert text(page, "#share-a") == "30 %"


@needs_browser
def test_limits_axes_and_images_are_chosen(opened: Any, single: Path) -> None:
    page = opened(single)
    page.select_option("#limit-a", "latency")
    assert "latency=0.7" in text(page, "#command-a")
    assert text(page, "#goto-a") == ""  # no budget of time was measured
    page.select_option("#limit-a", "params")
    assert text(page, "#title-a") == "70 % of the parameters"
    for axis, name in {"params": "parameters", "memory": "of memory", "time": "predicted time", "macs": "MACs"}.items():
        page.select_option("#axis", axis)
        assert name in text(page, "#frontier")
    before = page.inner_html("#tokens-a")
    page.select_option("#image", "1")
    assert page.inner_html("#tokens-a") != before
    page.click("#view-a summary")
    assert page.locator("#table-a tbody tr").count() == 6


@needs_browser
def test_two_budgets_stand_side_by_side(opened: Any, single: Path) -> None:
    page = opened(single)
    assert not page.is_visible("#view-b")
    assert not page.is_visible("#slider-b")
    page.focus("#compare")
    page.keyboard.press("Space")
    assert page.is_visible("#view-b")
    left, right = page.locator("#view-a").bounding_box(), page.locator("#view-b").bounding_box()
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    page.focus("#slider-b")
    page.keyboard.press("ArrowRight")
    assert (text(page, "#share-a"), text(page, "#share-b")) == ("70 %", "41 %")
    assert [cell.count("of dense") for cell in page.locator("#numbers tr").first.all_text_contents()] == [2]
    page.click("#more-b")
    page.click("#less-b")
    assert text(page, "#share-b") == "41 %"
    page.select_option("#limit-b", "params")
    assert "params=0.41" in text(page, "#command-b")
    page.uncheck("#compare")
    assert not page.is_visible("#view-b")


@needs_browser
def test_commands_are_copied_by_buttons_and_from_the_frontier(opened: Any, single: Path) -> None:
    page = opened(single)

    def clipboard() -> str:
        return page.evaluate("navigator.clipboard.readText()")

    for kind in ("command", "python"):
        page.click(f"#copy-{kind}-a")
        page.wait_for_selector("#said:has-text('Copied')")
        assert clipboard() == page.text_content(f"#{kind}-a")
        page.evaluate("document.getElementById('said').textContent = ''")
    page.check("input[name=copies][value=command]")
    click_frontier(page, 0.5)
    page.wait_for_selector("#said:has-text('Copied')")
    share = int(text(page, "#share-a").split()[0])
    assert 35 < share < 60
    assert f"--budget macs={share / 100:g} " in clipboard()
    page.check("input[name=copies][value=python]")
    click_frontier(page, 0.8)
    page.wait_for_selector("#said:has-text('Copied the Python')")
    assert "slimming.Budget(macs=" in clipboard()


def click_frontier(page: Any, across: float) -> None:
    box = page.locator("#frontier svg").bounding_box()
    page.locator("#frontier svg").click(position={"x": box["width"] * across, "y": box["height"] * 0.85})


@needs_browser
def test_runs_are_compared_in_one_page(opened: Any, several: Path) -> None:
    page = opened(several)
    assert page.is_visible("#view-b")
    assert "the other" in text(page, "#title-b")
    # The other run has no latency table: its times are not known, and its limits are fewer.
    assert page.locator("#limit-b option:not([disabled])").count() == 2
    assert page.locator("#limit-a option:not([disabled])").count() == 3
    page.select_option("#run-b", "0")
    assert "the other" not in text(page, "#title-b")
    page.select_option("#run-a", "1")
    assert "the other" in text(page, "#title-a")
    assert "the other: retrained" in text(page, "#frontier")
    assert page.locator("table.budgets").count() == 2


@needs_browser
def test_controls_have_names_and_print_leaves_them_out(opened: Any, several: Path) -> None:
    page = opened(several)
    nameless = page.evaluate(
        "[...document.querySelectorAll('#explorer :is(input, select, button)')].filter((one) => "
        "!(one.labels && one.labels.length) && !one.getAttribute('aria-label') && !one.textContent.trim())"
        ".map((one) => one.id)"
    )
    assert nameless == []
    assert page.locator("#explorer svg[role=img]:not([aria-label])").count() == 0
    page.emulate_media(media="print")
    assert not page.is_visible("#slider-a")
    assert page.is_visible("#structure-a svg")
    assert page.is_visible("#command-a")


@needs_browser
def test_a_run_without_images_accuracy_or_tokens_is_explored(opened: Any, run: tuple[Path, Explored]) -> None:
    directory, one = run
    bare = replace(one, pictures=(), measured=())
    page = opened(write_comparison([], [bare], directory / "bare.html"))
    assert page.locator("#tokens-a image").count() == 0
    assert "block 5" in text(page, "#tokens-a")
    assert not page.is_visible("#image")
    assert "not measured yet" in text(page, "#numbers")
    steps = tuple(
        replace(step, layers=tuple(replace(layer, tokens=None, heads=None) for layer in step.layers))
        for step in one.steps["macs"]
    )
    page = opened_again(page, write_comparison([], [replace(bare, steps={"macs": steps})], directory / "bare.html"))
    assert text(page, "#tokens-a") == ""
    assert text(page, "#structure-a h4") == "MLP hidden units"


def opened_again(page: Any, path: Path) -> Any:
    del path  # written over what the page shows
    page.reload()
    page.wait_for_selector("html[data-explorer=ready]")
    return page


@needs_browser
def test_a_large_model_opens(opened: Any, tmp_path: Path) -> None:
    fabricate(tmp_path / "run", VIT_B)
    began = time.monotonic()
    page = opened(write_report(tmp_path / "run", None, explored(tmp_path / "run", VIT_B)))
    assert [f"block {block}" in text(page, "#tokens-a") for block in (0, 11, 12)] == [True, True, False]
    assert time.monotonic() - began < 120
