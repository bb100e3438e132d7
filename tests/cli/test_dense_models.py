"""Detectors and segmenters by name and directory: inspect, cut in one shot, time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import slimming as library

from .conftest import Call, write_images

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as transformers saves one, of a segmenter."""
    place = tmp_path_factory.mktemp("segformer")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
        "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16, "num_labels": 4,
    }  # fmt: skip
    transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**sizes)).save_pretrained(place)
    images = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "size": {"height": 32, "width": 48}}
    (place / "preprocessor_config.json").write_text(json.dumps(images))
    return place


def test_a_segmenter_is_inspected_cut_and_timed(slimming: Call, segformer: Path, tmp_path: Path) -> None:
    name = f"transformers:{segformer}"
    found = json.loads(slimming("inspect", name, "--json").out)
    assert found["input"] == [3, 32, 48]
    assert found["outputs"] == [{"name": "logits", "shape": [4, 8, 12], "kind": "classes"}]
    images = write_images(tmp_path / "images")
    done = slimming("cut", name, "--one-shot", "--data", images, "--budget", "macs=0.7", "--output", tmp_path / "cut")
    assert done.code == 0, done.err
    slim = tmp_path / "cut" / "macs-0.70" / "cut"
    small: Any = library.load(slim)
    assert type(small) is transformers.SegformerForSemanticSegmentation
    assert small.pretrained_cfg["mean"] == (0.5, 0.4, 0.3)
    timed = slimming(
        "bench", name, slim, "--json", "--bench.batch_sizes", "1", "--bench.runs", "1", "--bench.seconds", "0.01"
    )
    assert timed.code == 0, timed.err
    assert set(json.loads(timed.out)["models"]) == {name, str(slim)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("inspect", "{name}", "--model.arguments", "image_size=2"), "does not take one image of (3, 2, 2)"),
        (("inspect", "{name}", "--model.arguments", "image_size=wide"), "image_size is 'wide'; give the side"),
        (("inspect", "torchvision:fcn_resnet49"), "Did you mean 'fcn_resnet50'"),
        (("cut", "{name}", "--one-shot", "--data", "{name}/none", "--budget", "macs=0.7", "--output", "{out}"), "none"),
    ],
    ids=["a size that does not fit", "no size", "an unknown name", "no images"],
)
def test_nonsense_about_a_segmenter(
    arguments: tuple[str, ...], says: str, slimming: Call, segformer: Path, tmp_path: Path
) -> None:
    name = f"transformers:{segformer}"
    done = slimming(*(part.format(name=name, out=tmp_path / "out") for part in arguments))
    assert done.code == 2
    assert says in " ".join(done.err.split())


def test_a_segmenter_is_not_trained_by_a_run(segformer: Path) -> None:
    config = library.ModelConfig(name=f"transformers:{segformer}")
    from slimming.errors import UnsupportedModelError
    from slimming.runs.setup import open_start

    with pytest.raises(UnsupportedModelError, match="a model for segmentation, which slimming does not train"):
        open_start(config, library.DataConfig(source="none"), 0)
