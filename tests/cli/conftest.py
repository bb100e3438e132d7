"""A tiny model, tiny images and a configuration for the command line, and one finished run of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from slimming.cli import main

ARGUMENTS = {
    "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 2,
    "pretrained_cfg_overlay": {"input_size": [3, 16, 16], "crop_pct": 1.0},
}  # fmt: skip
TRAIN = {"steps": 2, "batch_size": 4, "eval_every": 0}


class Result(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Result]


@pytest.fixture
def slimming(capfd: pytest.CaptureFixture[str]) -> Call:
    """Run a command line in this process."""

    def call(*words: object) -> Result:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Result(code, *capfd.readouterr())

    return call


def write_images(folder: Path, classes: tuple[str, ...] = ("dark", "light"), parts: tuple[str, ...] = ("train", "val")):
    for part in parts:
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for index in range(4):
                pixels = np.random.default_rng(index).integers(0, 90, (16, 16, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{index}.png")
    return folder


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with images, dense weights and config.yaml."""
    root = tmp_path_factory.mktemp("site")
    write_images(root / "images")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS)
    save_file(model.state_dict(), root / "dense.safetensors")
    write_config(root / "config.yaml", settings(root))
    return root


def settings(root: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {
            "name": "vit_tiny_patch16_224",
            "checkpoint": str(root / "dense.safetensors"),
            "arguments": ARGUMENTS,
        },
        "data": {"source": str(root / "images")},
        "search": {"train": TRAIN},
        "budgets": [{"macs": 0.7}],
        "retrain": TRAIN,
        "bench": {"batch_sizes": [1], "runs": 5, "seconds": 0.01},
    }


@pytest.fixture(scope="session")
def finished(site: Path) -> Path:
    """The directory of a finished run; not to be changed."""
    directory = site / "finished"
    assert main(["run", str(site / "config.yaml"), "--output", str(directory)]) == 0
    return directory


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))
