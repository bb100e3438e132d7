"""The examples run, and write what they say they write."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


RUNS = [
    pytest.param("encoder_without_labels", ["--steps", "2", "--images", "40"], id="encoder"),
    pytest.param("dense_prediction", ["--steps", "4"], id="dense prediction"),
]


@pytest.mark.parametrize(("name", "arguments"), RUNS, ids=None)
def test_an_example(name: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["dense", "70%", "50%", "30%"]
    assert all(row["macs"] <= limit + 1e-9 for row, limit in zip(rows, (1, 0.7, 0.5, 0.3), strict=True))
    assert (tmp_path / f"{name}.md").read_text().count("\n| ") == 6
