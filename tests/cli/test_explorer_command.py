"""What the explorer of a report tells a reader to run does run, and makes the model that it showed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import slimming as package
from slimming.checkpoints import checkpoint

from .conftest import Call


def packed(page: Path) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="explorer-data">(.*?)</script>', page.read_text("utf-8"))
    assert found is not None
    return json.loads(found[1])


def filled(parts: list[str], metric: str, step: dict[str, Any]) -> str:
    """What the page makes of a recipe, see `recipe` in explorer.js of its templates."""
    return f"{parts[0]}{metric}={step['share']:g}{parts[1]}{step['name']}{parts[2]}"


def test_a_run_ends_with_plans_to_choose_from(finished: Path) -> None:
    (run,) = packed(finished / "report.html")
    assert set(run["steps"]) == {"macs", "params"}
    for metric, steps in run["steps"].items():
        assert len(steps) >= 50
        assert steps[-1]["share"] == 1.0
        assert all(step[metric] <= step["share"] * run["dense"][metric] for step in steps)
    assert [one["label"] for one in run["measured"]] == ["dense", "70\u00a0%\u00a0MACs"]
    assert "70 % MACs" in (finished / "table.md").read_text("utf-8")


def test_the_command_makes_the_model_that_was_shown(
    copied: Path, site: Path, slimming: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command names no directory of this machine, so it works where the run and its images are.
    monkeypatch.chdir(copied.parent)
    (copied.parent / "images").symlink_to(site / "images")
    assert slimming("report", copied).code == 0
    (run,) = packed(copied / "report.html")
    step = next(step for step in run["steps"]["macs"] if step["share"] == 0.6)
    words = shlex.split(filled(run["recipe"]["command"], "macs", step))
    assert words[0] == "slimming"
    assert slimming(*words[1:]).code == 0
    small = checkpoint.load(Path(words[words.index("--output") + 1]) / step["name"] / "cut")
    found = package.cost(small)
    assert (found.params, found.macs) == (step["params"], step["macs"])


def test_the_program_makes_the_model_that_was_shown(
    copied: Path, site: Path, slimming: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied.parent)
    (copied.parent / "images").symlink_to(site / "images")
    assert slimming("report", copied).code == 0
    (run,) = packed(copied / "report.html")
    step = next(step for step in run["steps"]["params"] if step["share"] == 0.8)
    text = filled(run["recipe"]["python"], "params", step)
    exec(compile(text, "copied from the page", "exec"), {})
    assert package.cost(checkpoint.load(copied.parent / f"{copied.name}-{step['name']}")).params == step["params"]


def test_a_search_alone_is_explored_over_its_own_images(copied: Path, slimming: Call, tmp_path: Path) -> None:
    search = Path(shutil.copytree(copied / "search", tmp_path / "search"))
    assert slimming("report", search, "--output", tmp_path / "bare.html").code == 0
    (run,) = packed(tmp_path / "bare.html")
    assert run["measured"] == run["pictures"] == []
    shutil.copy(copied / "config.yaml", search)
    assert slimming("report", search).code == 0
    (run,) = packed(search / "report.html")
    assert [picture["label"] for picture in run["pictures"]] == ["dark", "light"]


def test_runs_share_a_page_and_figures_go_to_folders(copied: Path, slimming: Call, tmp_path: Path) -> None:
    other = Path(shutil.copytree(copied, tmp_path / "other"))
    page, folder = tmp_path / "both.html", tmp_path / "figures"
    assert slimming("report", copied, other, "--output", page, "--figures", folder).code == 0
    assert len(packed(page)) == 2
    for name in ("copied", "other"):
        drawn = {f"{what}.{kind}" for what in ("structure", "accuracy", "tokens") for kind in ("svg", "png")}
        assert {path.name for path in (folder / name).iterdir()} == drawn | {"table.md"}
        assert (folder / name / "structure.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_whose_search_is_gone_has_a_report_still(copied: Path, slimming: Call) -> None:
    shutil.rmtree(copied / "search")
    done = slimming("report", copied)
    assert done.code == 0
    assert "holds no search" in done.out
    assert "explorer-data" not in (copied / "report.html").read_text("utf-8")


def test_what_cannot_be_done_is_said(copied: Path, slimming: Call, tmp_path: Path) -> None:
    for words, complaint in {
        (copied, copied): "given twice",
        (tmp_path / "nowhere",): "no results.json and no search",
        (copied / "search", "--figures", tmp_path): "needs a finished",
        (copied, "--latency-table", tmp_path / "none.json"): "none.json does not exist",
    }.items():
        done = slimming("report", *words)
        assert (done.code, complaint in done.err) == (2, True), done.err


def test_figures_of_runs_with_one_name_lie_apart(copied: Path, slimming: Call, tmp_path: Path) -> None:
    places = [tmp_path / part / "run" for part in ("one", "two")]
    for place in places:
        shutil.copytree(copied, place)
    words = ("--output", tmp_path / "both.html", "--figures", tmp_path / "figures")
    assert slimming("report", *places, *words).code == 0
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["run-1", "run-2"]


def test_reading_results_does_not_load_what_draws_images(finished: Path) -> None:
    program = (
        "import pathlib, sys; from slimming.report import read_results; read_results(pathlib.Path(sys.argv[1])); "
        "print('vl_convert' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, finished], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
