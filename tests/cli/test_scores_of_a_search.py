"""`slimming search` and `slimming run` when the score of the trained search cannot be computed, or is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import Call


def steps(directory: Path) -> list[int]:
    lines = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("slimming.scoring.fisher.fisher_scores", exhausted)


def test_a_search_goes_on_with_another_score(
    site: Path, tmp_path: Path, slimming: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("search", site / "config.yaml", "--output", tmp_path / "out")
    fail(monkeypatch)
    done = slimming(*words)
    assert done.code == 2
    assert "Score 'compensated' could not be computed: Out of memory" in done.err
    assert "search.score set to one that needs no images (taylor, contribution, mask)" in done.err
    assert not (tmp_path / "out" / "search.json").exists()
    trained = (tmp_path / "out" / "state.pt").stat().st_mtime_ns
    assert slimming(*words, "--search.score", "taylor").code == 0
    record = json.loads((tmp_path / "out" / "search.json").read_text())
    assert (record["config"]["score"], record["scored_by"]) == ("taylor", "taylor")
    assert "score: taylor" in (tmp_path / "out" / "config.yaml").read_text()
    assert (tmp_path / "out" / "state.pt").stat().st_mtime_ns == trained
    # A search that is scored is scored again; with the same settings, there is nothing to do.
    assert slimming(*words, "--search.score", "contribution").code == 0
    assert json.loads((tmp_path / "out" / "search.json").read_text())["scored_by"] == "contribution"
    assert "nothing to do" in slimming(*words, "--search.score", "contribution").out
    other = slimming(*words, "--search.score", "contribution", "--search.mask_lr", "3")
    assert other.code == 2
    assert "search.mask_lr" in other.err
    (tmp_path / "out" / "state.pt").unlink()
    gone = slimming(*words, "--search.score", "taylor")
    assert gone.code == 2
    assert "state.pt is missing" in gone.err


@pytest.mark.slow
def test_a_run_goes_on_with_another_score_until_models_are_cut_by_it(
    site: Path, tmp_path: Path, slimming: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run", site / "config.yaml", "--output", tmp_path / "out")
    fail(monkeypatch)
    assert slimming(*words).code == 2
    assert slimming(*words, "--search.score", "taylor").code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["search"]["score"] == "taylor"
    changed = slimming(*words, "--search.score", "mask")
    assert changed.code == 2
    assert "search.score" in changed.err
