"""Cut a detector of torchvision and retrain it in a plain loop.

    python examples/scenes.py --output scenes
    python examples/torchvision_detection.py retinanet_resnet50_fpn --data scenes [--weights FILE] [--macs 0.7]

Any detector that takes images and boxes: Faster R-CNN, RetinaNet, FCOS, SSDlite; ``--weights`` is a state dict of yours
(a detector with random weights shows the way, but detects nothing). The example calls are one for evaluation, the
images, and one for training, the images with their targets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dense_options import options
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.datasets import CocoDetection
from torchvision.models.detection import __dict__ as detectors
from torchvision.ops import box_convert
from torchvision.transforms.functional import pil_to_tensor

import slimming

Scene = tuple[Tensor, dict[str, Tensor]]
"""An image and its targets."""


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    """Score, cut, retrain, measure, save and load."""
    what = "a detector of torchvision, such as fcos_resnet50_fpn"
    parser = options(__doc__, model=what, size=320, macs=0.7, output="slim-detector", scored=64)
    parser.add_argument("--weights", type=Path, help="state dict of the dense detector")
    parser.add_argument("--classes", type=int, default=5, help="number of classes, the background included")
    settings = parser.parse_args(words)
    torch.manual_seed(0)
    train, val = (read(settings.data / split) for split in ("train", "val"))
    dense = make(settings)
    found = {"dense": mean_average_precision(dense, val)}

    image, target = train[0]
    dense.example_inputs = [([image],), ([image], [target])]  # pyright: ignore
    images = [image for image, _ in train[: settings.scored]]
    scored = slimming.score(dense, [(images[at : at + 4],) for at in range(0, len(images), 4)])
    plan = slimming.plan(scored, slimming.Budget(macs=settings.macs))
    small = slimming.cut(scored.model, plan, images=scored.images)
    found |= {"macs": slimming.cost(small).macs / slimming.cost(dense).macs, "cut": mean_average_precision(small, val)}

    fit(small, train, settings)
    found["retrained"] = mean_average_precision(small, val)
    slimming.save(small, settings.output)
    found["loaded"] = mean_average_precision(slimming.load(settings.output, dense=make(settings)), val)
    print(json.dumps(found, indent=1))
    return found


def make(settings: argparse.Namespace) -> nn.Module:
    """The dense detector."""
    sizes = {} if settings.model.startswith("ssd") else {"min_size": settings.size, "max_size": settings.size}
    model = detectors[settings.model](weights=None, weights_backbone=None, num_classes=settings.classes, **sizes)
    if settings.weights:
        model.load_state_dict(torch.load(settings.weights, weights_only=True))
    return model.eval()


def read(place: Path) -> list[Scene]:
    """Images between 0 and 1, with boxes by their corners; images without objects are left out."""
    scenes: list[Scene] = []
    for image, objects in CocoDetection(str(place / "images"), str(place / "annotations.json")):
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([each["category_id"] for each in objects], dtype=torch.int64)
        if objects:
            target = {"boxes": box_convert(boxes, "xywh", "xyxy"), "labels": labels}
            scenes.append((pil_to_tensor(image).float() / 255, target))
    return scenes


def fit(model: nn.Module, scenes: Sequence[Scene], settings: argparse.Namespace) -> None:
    """The loop of torchvision's reference: the sum of the losses that the detector returns."""
    model.train()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=settings.rate)
    for _ in range(settings.steps):
        chosen = torch.randint(len(scenes), (settings.batch,)).tolist()
        images, targets = zip(*(scenes[index] for index in chosen), strict=True)
        loss = sum(model(list(images), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def mean_average_precision(model: nn.Module, scenes: Sequence[Scene]) -> float:
    """COCO's mAP."""
    model.eval()
    metric = MeanAveragePrecision()
    for at in range(0, len(scenes), 8):
        images, targets = zip(*scenes[at : at + 8], strict=True)
        metric.update(model(list(images)), list(targets))
    return float(metric.compute()["map"])


if __name__ == "__main__":
    main()
