"""Detectors and segmenters by name and directory: inspect, cut in one shot, time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import slimming as library
from slimming.errors import DataError, UnsupportedModelError

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
    from slimming.runs.setup import open_start

    with pytest.raises(UnsupportedModelError, match="a model for segmentation, which slimming does not train"):
        open_start(config, library.DataConfig(source="none"), 0)


def test_a_segmenter_is_evaluated_on_masks(slimming: Call, segformer: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    model: Any = library.open_model(library.ModelConfig(name=f"transformers:{segformer}"))[0]
    library.save(model, tmp_path / "model")
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.jpg")
        Image.fromarray(generator.integers(0, 4, (20, 30), dtype=np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    where = ("--data.source", tmp_path / "images", "--annotations", tmp_path / "masks")
    done = slimming("eval", tmp_path / "model", *where, "--json")
    assert done.code == 0, done.err
    values = json.loads(done.out)[str(tmp_path / "model")]
    assert values["images"] == 2
    assert 0 < values["mIoU"] < 0.5
    refused = slimming("eval", tmp_path / "model", "--data.source", tmp_path / "images")
    assert "a model for segmentation, which has no top-1. Give --annotations" in " ".join(refused.err.split())
    (tmp_path / "masks" / "b.png").unlink()
    assert "has no mask in" in slimming("eval", tmp_path / "model", *where).err


def test_a_detector_is_evaluated_on_annotations_of_coco(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], out_features=["stage4"], layer_type="basic"
    )
    config = transformers.DetrConfig(
        backbone_config=backbone, use_pretrained_backbone=False, use_timm_backbone=False, backbone=None,
        num_queries=5, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_labels=2,
    )  # fmt: skip
    model: Any = transformers.DetrForObjectDetection(config).eval()
    model.image_size = 32
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    boxes = [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [2, 3, 9, 8], "area": 72, "iscrowd": 0}]
    images = [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    values = library.evaluate_dense(model, tmp_path, file)
    assert values["images"] == 1
    assert 0 <= values["mAP"] <= values["mAP50"] <= 1
    for name, says in (("b.png", "1 of 1 images are not in"), ("../a.png", "is outside"), ("/etc/hosts", "is outside")):
        elsewhere = [{**images[0], "file_name": name}]
        file.write_text(json.dumps({"images": elsewhere, "annotations": boxes, "categories": categories}))
        with pytest.raises(DataError, match=says):
            library.evaluate_dense(model, tmp_path, file)
    file.write_text(json.dumps({"images": images}))
    with pytest.raises(DataError, match="names no images or no categories"):
        library.evaluate_dense(model, tmp_path, file)
    with pytest.raises(DataError, match=r"is not a file\. Give the JSON file"):
        library.evaluate_dense(model, tmp_path, tmp_path / "none.json")
