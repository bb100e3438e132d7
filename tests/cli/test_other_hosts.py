"""Models of transformers and torchvision by name: the same commands as for timm's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import slimming as library
from slimming.models.create import create_dense
from slimming.models.hosts import classes_of

from .conftest import TRAIN, Call, write_config, write_images

transformers = pytest.importorskip("transformers")

TINY = {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_labels": 3,
}  # fmt: skip
PROCESSOR = {"image_processor_type": "BitImageProcessor", "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as transformers saves one, of a model for three classes."""
    place = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**TINY)).save_pretrained(place)
    (place / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return place


def test_a_run_of_a_model_of_transformers(slimming: Call, dino: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    config = {
        "model": {"name": f"transformers:{dino}"},
        "data": {"source": str(images)},
        "budgets": [{"macs": 0.8}],
        "search": {"train": TRAIN},
        "retrain": TRAIN,
        "bench": {"batch_sizes": [1], "runs": 2, "seconds": 0.01},
    }
    done = slimming("run", write_config(tmp_path / "run.yaml", config), "--output", tmp_path / "run")
    assert done.code == 0, done.err
    assert "has 3 classes; its classifier was replaced by an untrained one for 2" in done.out + done.err
    slim = tmp_path / "run" / "macs-0.80" / "slim"
    small: Any = library.load(slim)
    assert type(small) is transformers.Dinov2ForImageClassification
    assert classes_of(small) == small.config.num_labels == 2
    assert small.pretrained_cfg["mean"] == (0.5, 0.4, 0.3)
    assert list(small.pretrained_cfg["label_names"]) == ["dark", "light"]
    checked = slimming("eval", slim, "--data.source", images)
    assert checked.code == 0, checked.err
    assert "top-1" in checked.out


def test_names_of_other_hosts_are_inspected(slimming: Call, dino: Path) -> None:
    found = json.loads(slimming("inspect", f"transformers:{dino}", "--json").out)
    assert found["kinds"]["head"]["units"] == 4
    shown = slimming("inspect", "swin_tiny_patch4_window7_224", "--model.arguments", "depths=[1,1,1,1]")
    assert shown.code == 0, shown.err
    assert "heads" in shown.out
    shown = slimming("inspect", "torchvision:mobilenet_v3_small")
    assert shown.code == 0, shown.err
    assert "channels" in shown.out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("torchvision:resnet19", "detector or segmenter 'resnet19'. Did you mean 'resnet1"),
        ("torchvision:raft_large", "torchvision has no classifier"),
        ("transformers:/no/such/place", "could not be loaded"),
    ],
    ids=["misspelt", "no classifier", "no directory"],
)
def test_names_that_a_host_does_not_know(slimming: Call, name: str, says: str) -> None:
    shown = slimming("inspect", name)
    assert shown.code == 2
    assert says in shown.err


def test_a_pickle_in_a_directory_of_transformers_is_refused(slimming: Call, dino: Path, tmp_path: Path) -> None:
    place = tmp_path / "pickled"
    place.mkdir()
    (place / "config.json").write_text((dino / "config.json").read_text())
    torch.save({"a": Path("x")}, place / "pytorch_model.bin")
    config = {"model": {"name": f"transformers:{place}"}, "data": {"source": str(write_images(tmp_path / "images"))}}
    shown = slimming("search", write_config(tmp_path / "c.yaml", config), "--output", tmp_path / "out")
    assert shown.code == 2
    assert "weights in other formats are not read" in shown.err


def test_local_weights_of_torchvision_and_another_number_of_classes(tmp_path: Path) -> None:
    model = torchvision.models.mobilenet_v3_small(num_classes=7)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    made, notes = create_dense("torchvision:mobilenet_v3_small", checkpoint=tmp_path / "w.safetensors", classes=3)
    assert classes_of(made) == 3
    assert "classifier for 7 classes" in notes[0]
    assert torch.equal(made.get_submodule("features.0.0").weight, model.features[0][0].weight)  # type: ignore[index]
    same, notes = create_dense("torchvision:mobilenet_v3_small", checkpoint=tmp_path / "w.safetensors", classes=7)
    assert not notes
    last = same.get_submodule("classifier.3")
    assert isinstance(last, nn.Linear)
    assert torch.equal(last.weight, model.classifier[3].weight)  # type: ignore[arg-type]
