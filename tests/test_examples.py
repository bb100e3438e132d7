"""The examples run, and write what they say they write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("encoder_without_labels", ["--steps", "2", "--images", "40"]), ("dense_prediction", ["--steps", "4"])],
    ids=["encoder", "dense prediction"],
)
def test_an_example(name: str, arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["dense", "70%", "50%", "30%"]
    assert all(row["macs"] <= limit + 1e-9 for row, limit in zip(rows, (1, 0.7, 0.5, 0.3), strict=True))
    assert (tmp_path / f"{name}.md").read_text().count("\n| ") == 6
