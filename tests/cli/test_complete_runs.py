"""A run is complete when every file of it is there and whole; otherwise the same command makes it so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimming.core.budget import Budget
from slimming.errors import CheckpointError
from slimming.runs.config import ModelConfig, RunConfig
from slimming.runs.files import missing_files
from slimming.training.config import DataConfig

from .conftest import Call
from .test_directories import tree, watch_writes, words

slow = pytest.mark.slow
BUDGET = "macs-0.70"
QUICK = ("report.html", f"{BUDGET}/slim/weights.safetensors", "search/masks.safetensors")
THOROUGH = (
    "table.md",
    "dense/metrics.json",
    "search/search.json",
    f"{BUDGET}/row.json",
    f"{BUDGET}/cut/structure.json",
)
FILES = (
    *QUICK, *("table.md", "inputs.json", "settings.json", "dense/metrics.json", "results.json"),
    "search/weights.safetensors", "search/scores.safetensors", "search/search.json", "search/seconds.json",
    "search/log.jsonl",
    *(f"{BUDGET}/{name}" for name in ("plan.json", "row.json", "log.jsonl")),
    *(f"{BUDGET}/{place}/{name}" for place in ("cut", "slim") for name in ("weights.safetensors", "structure.json",
                                                                           "provenance.json")),
)  # fmt: skip
CASES = [*QUICK, *(pytest.param(name, marks=slow, id=name) for name in THOROUGH)]
"""Files for which the command is run again; for the others it is tested that they are missed."""


def test_the_list_above_is_that_of_a_run(finished: Path) -> None:
    states = {"config.yaml", "search/state.pt", f"{BUDGET}/state.pt"}
    assert {name for name, content in tree(finished).items() if content is not None} == {*FILES} | states


@pytest.mark.parametrize("name", list(dict.fromkeys(FILES)), ids=str)
def test_a_missing_or_damaged_file_is_noticed(copied: Path, name: str) -> None:
    model, data = ModelConfig(name="vit_tiny_patch16_224"), DataConfig(source="images")
    config = RunConfig(model=model, data=data, budgets=(Budget(macs=0.7),))
    assert missing_files(copied, config) == []
    content = bytearray((copied / name).read_bytes())
    (copied / name).unlink()
    assert missing_files(copied, config) == [name]
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    try:
        found = missing_files(copied, config)
    except CheckpointError as error:
        found = [name] if str(copied / name) in str(error) else [str(error)]
    assert found == [name]


def accuracies(directory: Path) -> dict[str, tuple[float, float]]:
    rows = json.loads((directory / "results.json").read_text())["rows"]
    return {row["name"]: (row["top1_cut"], row["top1"]) for row in rows}


@pytest.mark.parametrize("name", CASES, ids=str)
def test_a_missing_file_is_made_again(slimming: Call, site: Path, finished: Path, copied: Path, name: str) -> None:
    (copied / name).unlink()
    shown = slimming(*words(site, "run", copied))
    assert shown.code == 0, shown.err
    assert "nothing to do" not in shown.out
    assert {*tree(copied)} == {*tree(finished)}
    if name.endswith(".safetensors"):
        assert (copied / name).read_bytes() == (finished / name).read_bytes()
    assert accuracies(copied) == accuracies(finished)
    assert "nothing to do" in slimming(*words(site, "run", copied)).out


@pytest.mark.parametrize("name", CASES, ids=str)
def test_a_damaged_file_is_named_or_made_again(
    slimming: Call, site: Path, finished: Path, copied: Path, name: str
) -> None:
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    shown = slimming(*words(site, "run", copied))
    if shown.code == 2:
        assert str(copied / name) in shown.err
        assert "Traceback" not in shown.err
        (copied / name).unlink()  # as the message says, for the file or for the directory that it is in
        shown = slimming(*words(site, "run", copied))
    assert shown.code == 0, shown.err
    assert "nothing to do" not in shown.out
    assert {*tree(copied)} == {*tree(finished)}
    assert accuracies(copied) == accuracies(finished)


@pytest.mark.parametrize(
    "late", [True, pytest.param(False, marks=slow)], ids=["before the last files", "before any file"]
)
def test_killed_between_two_files_the_same_command_completes_the_run(
    slimming: Call, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        copies = watch_writes(patch, output, tmp_path / "copies")
        assert slimming(*words(site, "run", output)).code == 0
    assert len(copies) > 20
    for copy in copies[-2:] if late else copies[::8]:
        shown = slimming(*words(site, "run", copy))
        assert shown.code == 0, f"{copy.name}: {shown.err}"
        assert {*tree(copy)} == {*tree(output)}, copy.name
        assert accuracies(copy) == accuracies(output), copy.name
        for name in ("search/weights.safetensors", f"{BUDGET}/slim/weights.safetensors"):
            assert (copy / name).read_bytes() == (output / name).read_bytes(), copy.name


@pytest.mark.parametrize(
    ("command", "name"),
    [("search", "masks.safetensors"), ("search", "log.jsonl"), ("train", "model/weights.safetensors")],
    ids=str,
)
def test_a_missing_file_of_a_search_or_a_training_is_made_again(
    slimming: Call, site: Path, tmp_path: Path, command: str, name: str
) -> None:
    output = tmp_path / "out"
    assert slimming(*words(site, command, output)).code == 0
    whole = (output / name).read_bytes()
    (output / name).unlink()
    shown = slimming(*words(site, command, output))
    assert (shown.code, "nothing to do" in shown.out) == (0, False), shown.err
    assert (output / name).read_bytes() == whole
    assert "nothing to do" in slimming(*words(site, command, output)).out
