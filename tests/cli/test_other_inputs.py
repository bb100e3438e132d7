"""Commands and Python calls go on with the weights and images with which they were started, and refuse others."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import slimming as library
from slimming.errors import ConfigError

from .conftest import ARGUMENTS, Call, settings, write_config
from .test_directories import words


@pytest.fixture
def own(site: Path, tmp_path: Path) -> Path:
    """Images, weights and settings that a test may change."""
    shutil.copytree(site / "images", tmp_path / "images")
    shutil.copy(site / "dense.safetensors", tmp_path / "dense.safetensors")
    write_config(tmp_path / "config.yaml", settings(tmp_path))
    return tmp_path


def exchange_weights(root: Path) -> None:
    tensors = load_file(root / "dense.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, root / "dense.safetensors")


def exchange_images(root: Path) -> None:
    shutil.copy(root / "images/train/dark/0.png", root / "images/train/dark/9.png")


@pytest.mark.parametrize("command", ["search", "train"], ids=str)
@pytest.mark.parametrize(
    ("exchange", "says"),
    [
        (exchange_weights, r"model.checkpoint \(dense.safetensors\) changed"),
        (exchange_images, "data.source .images. changed .'train/dark/9.png' is new"),
    ],
    ids=["weights", "images"],
)
def test_other_inputs_are_refused(
    slimming: Call, own: Path, command: str, exchange: Callable[[Path], None], says: str
) -> None:
    assert slimming(*words(own, command, own / "out")).code == 0
    exchange(own)
    again = slimming(*words(own, command, own / "out"))
    assert again.code == 2, again.out
    assert re.search(says, again.err), again.err
    assert "give another directory" in again.err


def test_a_finished_run_names_exchanged_weights_and_goes_on_when_they_are_back(slimming: Call, own: Path) -> None:
    assert slimming(*words(own, "run", own / "out")).code == 0
    before = (own / "dense.safetensors").read_bytes()
    exchange_weights(own)
    refused = slimming(*words(own, "run", own / "out"))
    assert (refused.code, "nothing to do" in refused.out) == (2, False)
    assert "'dense.safetensors' has other content" in refused.err
    (own / "out/results.json").unlink()
    assert slimming(*words(own, "run", own / "out")).code == 2
    (own / "dense.safetensors").write_bytes(before)
    assert slimming(*words(own, "run", own / "out")).code == 0
    results = json.loads((own / "out/results.json").read_text())
    inputs = results["inputs"]
    assert set(inputs) == {
        "model.checkpoint (dense.safetensors)", "data.source (images)", "the weights of the dense model",
    }  # fmt: skip
    assert inputs["data.source (images)"]["files"] == 16
    assert json.loads((own / "out/macs-0.70/slim/provenance.json").read_text())["inputs"] == inputs
    assert str(own) not in json.dumps(inputs)


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **ARGUMENTS)


def test_a_training_is_resumed_with_its_own_teacher_model_and_images(own: Path) -> None:
    config = library.TrainConfig(steps=2, batch_size=4, eval_every=0)

    def train(start: int, teacher: int) -> None:
        student = model(start)
        data = library.open_data(library.DataConfig(source=str(own / "images")), student)
        library.train(student, data, config, model(teacher), directory=own / "work", resume=True)

    train(0, 1)
    train(0, 1)
    with pytest.raises(ConfigError, match="the weights of the teacher changed"):
        train(0, 2)
    with pytest.raises(ConfigError, match="the weights of the model changed"):
        train(3, 1)
    exchange_images(own)
    with pytest.raises(
        ConfigError, match=r"the training images changed \('dark/9.png' is new\)|choice of the training"
    ):
        train(0, 1)


def test_a_search_is_resumed_with_its_own_model_and_images(own: Path) -> None:
    config = library.SearchConfig(train=library.TrainConfig(steps=2, batch_size=4, eval_every=0))

    def search(seed: int) -> None:
        dense = model(seed)
        data = library.open_data(library.DataConfig(source=str(own / "images")), dense)
        library.search(dense, data, config, directory=own / "work", resume=True)

    search(0)
    search(0)
    with pytest.raises(ConfigError, match="the weights of the model changed"):
        search(1)
    exchange_images(own)
    with pytest.raises(ConfigError, match="training images changed"):
        search(0)
