"""Export of models with several inputs and outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import slimming
from slimming.errors import DataError, UnsupportedModelError


class Two(nn.Module):
    """An image and a mask by name; classes and boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classes, self.boxes = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Any:
        masked = pixel_values if pixel_mask is None else pixel_values * pixel_mask[:, None]
        x = self.body(masked)
        return {"logits": self.classes(x), "pred_boxes": self.boxes(x).sigmoid(), "count": x.shape[1]}


def call(images: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(images, 3, 8, 8), "pixel_mask": torch.ones(images, 8, 8, dtype=torch.int64)}


def test_every_output_of_a_model_of_images_is_compared(tmp_path: Path) -> None:
    made = slimming.export(Two().eval(), tmp_path / "out", to=["pt2", "onnx"], images=[torch.randn(4, 3, 224, 224)])
    assert [entry.relative < 1e-4 for entry in made] == [True, True]
    assert [entry.agreement for entry in made] == [None, None]
    words = json.loads((tmp_path / "out" / "model.json").read_text())
    assert words["input"]["name"] == "image"
    assert [(output["name"], output["shape"]) for output in words["outputs"]] == [
        ("logits", ["batch", 3]),
        ("pred_boxes", ["batch", 4]),
    ]
    session = ort.InferenceSession(made[1].file)
    assert [output.name for output in session.get_outputs()] == ["logits", "pred_boxes"]


def test_a_model_of_several_inputs_is_exported_for_its_example(tmp_path: Path) -> None:
    model = Two().eval()
    (made,) = slimming.export(model, tmp_path / "out", to="onnx", images=[call(3)], example_inputs=call(1))
    assert made.relative < 1e-4
    session = ort.InferenceSession(made.file)
    assert {each.name for each in session.get_inputs()} == {"pixel_values", "pixel_mask"}
    words = json.loads((tmp_path / "out" / "model.json").read_text())
    assert [(each["name"], each["type"]) for each in words["inputs"]] == [
        ("pixel_values", "float32"),
        ("pixel_mask", "int64"),
    ]
    with pytest.raises(DataError, match="Give batches of images of shape"):
        slimming.export(model, tmp_path / "other", to="onnx", images=[torch.randn(1, 3, 9, 9)])


def test_a_detector_of_torchvision_is_refused(tmp_path: Path) -> None:
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    body: Any = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1))
    body.out_channels = 16
    anchors = AnchorGenerator(((16,),), ((1.0,),))
    model: Any = RetinaNet(body, 3, min_size=32, max_size=32, anchor_generator=anchors).eval()
    model.image_size = 32
    with pytest.raises(UnsupportedModelError, match="returns selected boxes, whose number changes"):
        slimming.export(model, tmp_path / "out", to="pt2", images=[torch.rand(1, 3, 32, 32)])
