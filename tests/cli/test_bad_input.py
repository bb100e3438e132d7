"""Bad input: one clear sentence, exit code 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from slimming.core.files import seal

from .conftest import ARGUMENTS, Call, Result, settings, write_images


def refused(result: Result, *words: str) -> None:
    """Exit code 2 and one line on stderr that holds ``words``."""
    errors = [line for line in result.err.splitlines() if line.startswith("slimming: ")]
    assert result.code == 2, result
    assert len(errors) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in errors[0]


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """An output place that must not exist afterwards, nor what lies above it."""
    place = tmp_path / "made" / "out"
    yield place
    assert not place.parent.exists()


SETTINGS: list[tuple[list[str], list[str]]] = [
    (["--model.name", "vit_tiny_patch16_225"], ["no model 'vit_tiny_patch16_225'", "Did you mean"]),
    (["--search.preset", "papr"], ["no preset 'papr'", "Did you mean 'paper'?"]),
    (["--search.kinds", "mlp,tokn"], ["no kind 'tokn'", "Did you mean 'token'?"]),
    (["--data.source", "nowhere"], ["no data at nowhere"]),
    (["--data.source", "hf:"], ["hf:"]),
    (["--budget", "macs=0"], ["macs=0.0 is not a share"]),
    (["--budget", "macs=1.5"], ["macs=1.5 is not a share"]),
    (["--budget", "macs=-0.5"], ["macs=-0.5 is not a share"]),
    (["--budget", "mcs=0.5"], ["no setting budgets[0].mcs"]),
    (["--budget", "macs=0.01"], ["cannot be reached", "the smallest reachable is macs 0."]),
    (["--budget", "keep.mlp=0.001"], ["cannot be reached", "the smallest reachable is 0."]),
    (["--model.arguments", "img_size=4"], ["is of another model", "image size"]),
    (["--model.arguments", "img_size=-8"], ["img_size"]),
    (["--model.arguments", "img_size=32"], ["is of another model", "image size"]),
    (["--model.arguments", "img_siz=32"], ["img_siz"]),
    (["--model.checkpoint", "nowhere.pth"], ["nowhere.pth is not a file"]),
    (["--retrain.epoch", "1"], ["no option --retrain.epoch", "Did you mean '--retrain.epochs'?"]),
    (["--retrain.epochs", "ten"], ["retrain.epochs is 'ten'; it must be a number"]),
    (["--retrain.trackers", "wandbb"], ["no tracker 'wandbb'"]),
    (["--retrain.optimizer", "adamwq"], ["adamwq"]),
    (["--search.train.warmup_epochs", "1.9"], ["search.train: warmup_epochs 1.9 is all of the 2 steps"]),
    (["--retrain.batch_size", "9"], ["retrain: batch_size 9 is more than the 8 training images"]),
]


@pytest.mark.parametrize(("flags", "words"), SETTINGS, ids=[" ".join(flags) for flags, _ in SETTINGS])
def test_settings_that_cannot_be(slimming: Call, site: Path, output: Path, flags: list[str], words: list[str]) -> None:
    """Found before anything is written, whichever stage would meet them first."""
    refused(slimming("run", site / "config.yaml", "--output", output, *flags), *words)


def test_a_misspelt_key(slimming: Call, site: Path, output: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text((site / "config.yaml").read_text().replace("retrain:", "retrian:"))
    refused(slimming("run", path, "--output", output), "no setting retrian", "Did you mean 'retrain'?")


def broken_data(root: Path, how: str) -> Path:
    if how == "one class":
        return write_images(root, classes=("only",))
    if how in ("out of range", "negative"):
        image = {"bytes": (write_images(root / "x") / "train" / "dark" / "0.png").read_bytes(), "path": "0.png"}
        features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b"], "_type": "ClassLabel"}}
        (root / "p").mkdir()
        for part in ("train", "val"):
            table = pa.table({"image": [image] * 3, "label": pa.array([0, 1, 2 if how == "out of range" else -1])})
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
            pq.write_table(table, root / "p" / f"{part}.parquet")
        return root / "p"
    write_images(root)
    if how == "empty class":
        (root / "train" / "zebra").mkdir()
        (root / "val" / "zebra").mkdir()
    elif how == "other classes":
        (root / "val" / "dark").rename(root / "val" / "bright")
    elif how == "unreadable":
        for path in (root / "train").rglob("*.png"):
            path.write_bytes(path.read_bytes()[:60])
    elif how == "no validation":
        shutil.rmtree(root / "val")
    elif how == "no images":
        shutil.rmtree(root)
        root.mkdir()
    return root


DATA = {
    "one class": ["one class only"],
    "empty class": ["zebra holds no images"],
    "out of range": ["label 2", "out of range"],
    "negative": ["label -1", "out of range"],
    "other classes": ["different classes", "dark", "bright"],
    "no validation": ["no validation part", "split_fraction"],
    "no images": ["holds no class folders"],
}


@pytest.mark.parametrize(("how", "words"), DATA.items(), ids=DATA)
def test_data_that_cannot_be(
    slimming: Call, site: Path, output: Path, tmp_path: Path, how: str, words: list[str]
) -> None:
    source = broken_data(tmp_path / "images", how)
    refused(slimming("search", site / "config.yaml", "--output", output, "--data.source", source), *words)


def test_too_many_unreadable_images(slimming: Call, site: Path, tmp_path: Path) -> None:
    source = broken_data(tmp_path / "images", "unreadable")
    result = slimming("search", site / "config.yaml", "--output", tmp_path / "o", "--data.source", source)
    refused(result, "could not be read", "max_unreadable")
    result = slimming("search", site / "config.yaml", "--output", tmp_path / "o", "--data.source", source,
                      "--search.rotate", "false")  # fmt: skip
    refused(result, "could not be read", "max_unreadable")
    model = ["vit_tiny_patch16_224", "--model.checkpoint", site / "dense.safetensors"]
    model += ["--model.arguments", ",".join(f"{key}={value}" for key, value in ARGUMENTS.items())]
    result = slimming("cut", *model, "--one-shot", "--data", source, "--budget", "macs=0.5", "--output", tmp_path / "o")
    refused(result, "could not be read", "max_unreadable")


class Surprise:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch ran",))


def test_a_pickle_as_a_checkpoint(
    slimming: Call, site: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth"
    torch.save({"a": Surprise()}, path)
    words = ["never executed: it names", "system"]
    refused(slimming("run", site / "config.yaml", "--output", output, "--model.checkpoint", path), *words)
    path.write_bytes(pickle.dumps(Surprise()))
    refused(slimming("run", site / "config.yaml", "--output", output, "--model.checkpoint", path), "without checksums")
    for command in ("eval", "inspect", "bench"):
        refused(slimming(command, path), "pickle is never loaded")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "structure.json"], ids=str)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"], ids=str)
def test_a_damaged_checkpoint(slimming: Call, copied: Path, name: str, damage: str) -> None:
    place = copied / "macs-0.70" / "slim"
    harm(place / name, damage)
    refused(slimming("inspect", place), str(place / name))


def harm(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
        return
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"], ids=str)
@pytest.mark.parametrize(
    "name", ["weights.safetensors", "masks.safetensors", "scores.safetensors", "search.json"], ids=str
)
def test_a_damaged_search(slimming: Call, output: Path, copied: Path, name: str, damage: str) -> None:
    harm(copied / "search" / name, damage)
    words = () if name == "search.json" and damage == "missing" else (name,)
    refused(slimming("cut", copied, "--budget", "macs=0.9", "--output", output), *words)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "newer", "another", "outside"], ids=str)
def test_a_bad_plan(slimming: Call, output: Path, copied: Path, damage: str) -> None:
    path = copied / "macs-0.70" / "plan.json"
    value = {key: entry for key, entry in json.loads(path.read_text()).items() if key != "sha256"}
    words = [str(path)]
    if damage == "newer":
        value["format"] = 99
        words = ["99"]
    elif damage == "another":
        value["groups"] = {f"x{name}": group for name, group in value["groups"].items()}
        words = ["another model"]
    elif damage == "outside":
        value["groups"]["blocks.0.mlp.hidden"]["kept"] = [5000]
        words = ["blocks.0.mlp.hidden"]
    else:
        harm(path, damage)
    if damage in ("newer", "another", "outside"):
        path.write_text(json.dumps(seal(value)))
    refused(slimming("cut", copied, "--plan", path, "--output", output), *words)


def test_a_newer_checkpoint(slimming: Call, copied: Path) -> None:
    path = copied / "macs-0.70" / "slim" / "structure.json"
    value = {key: entry for key, entry in json.loads(path.read_text()).items() if key != "sha256"}
    path.write_text(json.dumps(seal({**value, "format": 99})))
    refused(slimming("eval", path.parent), "99")


def test_weights_of_another_model(slimming: Call, copied: Path) -> None:
    slim, cut = copied / "macs-0.70" / "slim", copied / "macs-0.70" / "cut"
    shutil.copy(cut / "weights.safetensors", slim / "weights.safetensors")
    refused(slimming("inspect", slim), "checksum")


@pytest.mark.parametrize(
    "budget", ["macs=0", "macs=2", "macs=-1", "macs=0.01", "macs", "keep.mpl=0.5", "macs=half"], ids=str
)
def test_a_bad_budget_of_a_cut(slimming: Call, output: Path, finished: Path, budget: str) -> None:
    refused(slimming("cut", finished, "--budget", budget, "--output", output))


def test_other_misuse(slimming: Call, output: Path, finished: Path, site: Path, tmp_path: Path) -> None:
    refused(slimming("serch"), "no command 'serch'", "Did you mean 'search'?")
    refused(slimming("cut", finished), "--output")
    refused(slimming("cut", finished, "--output", output), "--budget")
    refused(slimming("cut", tmp_path, "--budget", "macs=0.5", "--output", output), "holds no finished search")
    plan = finished / "macs-0.70" / "plan.json"
    assert plan.exists()
    for flag, value in (("--layout.multiple", 8), ("--layout.equal_heads", "true"), ("--solver", "exact"),
                        ("--latency-table", "nosuch.json")):  # fmt: skip
        refused(
            slimming("cut", finished, "--plan", plan, flag, value, "--output", output), f"{flag} has no effect with"
        )
    refused(slimming("cut", finished, "--plan", plan, "--images", 3, "--output", output), "no effect without --data")
    refused(slimming("cut", finished, "--budget", "macs=0.5,macs=0.3", "--output", output), "macs is given twice")
    refused(slimming("inspect", finished), "give a checkpoint in it", "macs-0.70/slim")
    refused(slimming("inspect", "no/such/place"), "no checkpoint directory")
    refused(slimming("inspect", "resnet81"), "has no model", "Did you mean")
    slim = finished / "macs-0.70" / "slim"
    more, other = write_images(tmp_path / "i", ("a", "b", "c")), write_images(tmp_path / "j", ("a", "b"))
    refused(slimming("eval", slim, "--data.source", more), "knows 2 classes", "has 3")
    refused(slimming("eval", slim, "--data.source", other), "trained for other classes")
    refused(slimming("bench", "test_vit", slim), "takes images of")
    refused(slimming("bench", "test_vit", "--device", "nothing"), "no device 'nothing'")
    refused(slimming("bench", "test_vit", "--bench.runs", "0"), "bench.runs")


def test_the_output_holds_something(slimming: Call, site: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for words in (
        ("run", site / "config.yaml"), ("search", site / "config.yaml"), ("cut", finished, "--budget", "macs=0.9"),
        ("train", "--model.name", finished / "macs-0.70" / "cut", "--data.source", site / "images"), ("demo",),
    ):  # fmt: skip
        refused(slimming(*words, "--output", tmp_path), "is not empty")
        refused(slimming(*words, "--output", tmp_path / "notes.txt"), "is a file")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_output_is_not_writable(
    slimming: Call, site: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*given: Any, **more: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr("slimming.core.locks.FileLock", denied)
    for words in (("run", site / "config.yaml"), ("cut", finished, "--budget", "macs=0.9")):
        refused(slimming(*words, "--output", tmp_path / "out"), "Permission denied", "may write to")
    monkeypatch.undo()
    monkeypatch.setattr(Path, "mkdir", denied)
    refused(slimming("run", site / "config.yaml", "--output", tmp_path / "out"), "Permission denied")
    assert list(tmp_path.iterdir()) == []


def test_the_disk_is_full(
    slimming: Call, site: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    space = {"left": 0}

    def full(descriptor: int) -> None:
        if space["left"] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        space["left"] -= 1
        fsync(descriptor)

    monkeypatch.setattr("slimming.core.files.os.fsync", full)
    refused(slimming("run", site / "config.yaml", "--output", tmp_path / "a" / "out"), "disk is full", "config.yaml")
    assert list(tmp_path.iterdir()) == []
    space["left"] = 2
    refused(slimming("cut", finished, "--budget", "macs=0.9", "--output", tmp_path / "b"), "disk is full")
    assert list(tmp_path.iterdir()) == []
    space["left"] = 4
    refused(slimming("search", site / "config.yaml", "--output", tmp_path / "c"), "disk is full")
    assert not [path for path in (tmp_path / "c").rglob("*") if path.name.startswith(".")]
    monkeypatch.undo()
    assert slimming("search", site / "config.yaml", "--output", tmp_path / "c").code == 0


def test_out_of_memory(
    slimming: Call, site: Path, output: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*given: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("slimming.runs.results.paired_times", lacking)
    refused(slimming("bench", finished / "macs-0.70" / "slim"), "Out of memory", "bench.batch_sizes")
    monkeypatch.setattr("slimming.training.evaluation.validation_batches", lacking)
    refused(slimming("eval", finished / "macs-0.70" / "slim"), "Out of memory", "smaller")
    refused(slimming("run", site / "config.yaml", "--output", output), "Out of memory")
    monkeypatch.setattr("slimming.training.loop.TrainingRun.train_step", lacking)
    refused(slimming("search", site / "config.yaml", "--output", output), "Out of memory", "accumulate")


def test_a_state_of_another_run(slimming: Call, site: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert slimming("search", site / "config.yaml", "--output", output).code == 0
    (output / "search.json").unlink()
    harm(output / "state.pt", "truncated")
    refused(slimming("search", site / "config.yaml", "--output", output), "state.pt")
    (output / "config.yaml").write_text("model: [")
    refused(slimming("search", site / "config.yaml", "--output", output), "config.yaml")


def test_a_loss_that_is_not_finite(slimming: Call, site: Path, tmp_path: Path) -> None:
    words = ("--search.train.lr", "1e30", "--search.train.steps", "20", "--search.train.clip_grad", "null")
    refused(slimming("search", site / "config.yaml", "--output", tmp_path / "o", *words), "at step", "lower lr")


def test_images_of_odd_kinds_are_fine(slimming: Call, site: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "images")
    Image.fromarray(np.zeros((7, 200), np.uint8)).save(source / "train" / "dark" / "grey.png")
    done = slimming("search", site / "config.yaml", "--output", tmp_path / "o", "--data.source", source)
    assert done.code == 0, done.err


def test_settings_of_the_tests_are_whole(site: Path) -> None:
    assert set(settings(site)) >= {"model", "data", "budgets"}
