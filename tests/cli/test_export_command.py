"""`slimming export` from a checkpoint of a run."""

from __future__ import annotations

import json
from pathlib import Path

import slimming as library

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


def test_export_takes_the_data_as_the_run_split_it(finished: Path, site: Path, tmp_path: Path, slimming: Call) -> None:
    slim = library.load(finished / "macs-0.70" / "slim")
    data = {"source": str(site / "images" / "train"), "split_fraction": 0.25, "train_limit": 3, "augment": "light"}
    library.save(slim, tmp_path / "own", {"data": data})
    for more in ((), ("--data", data["source"])):
        done = slimming("export", tmp_path / "own", "--to", "pt2", "--output", tmp_path / f"out{len(more)}", *more)
        assert done.code == 0, done.err
        assert "compared on 2 images" in done.out
    done = slimming("export", tmp_path / "own", "--to", "pt2", "--output", tmp_path / "all", "--data", site / "images")
    assert "compared on 4 images" in done.out


def test_export_fails_without_parity_and_leaves_nothing(
    finished: Path, site: Path, tmp_path: Path, slimming: Call
) -> None:
    slim = finished / "macs-0.70" / "slim"
    place = ("--output", tmp_path / "out", "--data", site / "images")
    done = slimming("export", slim, "--to", "onnx", *place, "--tolerance", "0")
    assert done.code == 2
    assert "slimming: error: The outputs of the onnx file differ from those of the model" in done.err
    assert list(tmp_path.iterdir()) == []
    done = slimming("export", slim, "--to", "tensorrt", *place)
    assert done.code == 2
    assert "examples/export" in done.err
    done = slimming("export", finished, *place)
    assert done.code == 2
    assert "give a checkpoint in it" in done.err
