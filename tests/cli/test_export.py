"""`slimming export` from a checkpoint of a run."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import Call


def test_export_compares_on_the_data_of_the_run(finished: Path, tmp_path: Path, slimming: Call) -> None:
    slim = finished / "macs-0.70" / "slim"
    done = slimming("export", slim, "--to", "pt2", "--output", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)
    assert row["images"] == 4
    assert row["agreement"] == 1.0
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    assert about["classes"] == ["dark", "light"]
    again = slimming("export", slim, "--to", "pt2", "--output", tmp_path / "out")
    assert again.code == 2
    assert "not empty" in again.err


def test_export_fails_without_parity_and_leaves_nothing(
    finished: Path, site: Path, tmp_path: Path, slimming: Call
) -> None:
    slim = finished / "macs-0.70" / "slim"
    place = ("--output", tmp_path / "out", "--data", site / "images")
    done = slimming("export", slim, "--to", "onnx", *place, "--tolerance", "0")
    assert done.code == 2
    assert "slimming: error: The onnx file does not say what the model says" in done.err
    assert list(tmp_path.iterdir()) == []
    done = slimming("export", slim, "--to", "tensorrt", *place)
    assert done.code == 2
    assert "examples/export" in done.err
    done = slimming("export", finished, *place)
    assert done.code == 2
    assert "give a checkpoint in it" in done.err
