"""Cut a segmenter of transformers and retrain it inside transformers' Trainer.

    python examples/scenes.py --output scenes
    python examples/segmentation_in_trainer.py MODEL --data scenes [--macs 0.5] [--steps 500] [--output slim]

MODEL is a name on the hub or a directory with a model for semantic segmentation, such as SegFormer. ``--data`` has
``train`` and ``val``, each with ``images`` and ``masks``, whose pixels are classes. The model is scored on images
alone, cut with compensation, and retrained with the masks and with the outputs of the dense model. The mean
intersection over union is measured before and after, and the slim model is saved and loaded by `slimming.load`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dense_options import options
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize
from transformers import AutoModelForSemanticSegmentation, TrainingArguments

import slimming
from slimming.training.hf_trainer import DistillingTrainer


class Scenes(Dataset):
    """Images of one size with their masks."""

    def __init__(self, place: Path, size: int) -> None:
        self.place, self.size = place, size
        self.names = sorted(file.name for file in (place / "images").iterdir())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, mask = (pil_to_tensor(Image.open(self.place / kind / self.names[index])) for kind in ("images", "masks"))
        pixels = resize(image, [self.size, self.size]).float() / 255
        labels = resize(mask, [self.size, self.size], InterpolationMode.NEAREST)[0].long()
        return {"pixel_values": (pixels - 0.45) / 0.225, "labels": labels}


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    """Score, cut, retrain, measure, save and load."""
    parser = options(__doc__, model="name on the hub, or directory", size=512, macs=0.5, output="slim-segmenter")
    settings = parser.parse_args(words)
    torch.manual_seed(0)
    train, val = (Scenes(settings.data / split, settings.size) for split in ("train", "val"))
    dense: Any = AutoModelForSemanticSegmentation.from_pretrained(settings.model)
    dense.image_size = settings.size
    found = {"dense": mean_iou(dense, val)}

    images = [train[index]["pixel_values"] for index in range(min(settings.scored, len(train)))]
    scored = slimming.score(dense, list(torch.stack(images).split(8)))
    plan = slimming.plan(scored, slimming.Budget(macs=settings.macs))
    small: Any = slimming.cut(scored.model, plan, images=scored.images)
    share = slimming.cost(small).macs / slimming.cost(dense).macs
    found |= {"macs": share, "cut": mean_iou(small, val)}

    retrain(small, dense, train, settings)
    found["retrained"] = mean_iou(small, val)
    slimming.save(small, settings.output)
    found["loaded"] = mean_iou(slimming.load(settings.output), val)
    print(json.dumps(found, indent=1))
    return found


def retrain(small: nn.Module, dense: nn.Module, train: Scenes, settings: argparse.Namespace) -> None:
    """Train with the masks and the logits of the dense model."""
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            output_dir=place,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.rate,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        DistillingTrainer(model=small, args=arguments, train_dataset=train, teacher=dense).train()


@torch.no_grad()
def mean_iou(model: Any, scenes: Scenes, batch: int = 16) -> float:
    """Intersection over union of each class over all pixels, averaged over the classes that occur."""
    model.eval()
    classes = model.config.num_labels
    confusion = torch.zeros(classes, classes)
    for each in DataLoader(scenes, batch):
        logits = model(each["pixel_values"].to(model.device, model.dtype)).logits
        found = F.interpolate(logits.float(), size=each["labels"].shape[1:], mode="bilinear").argmax(1).cpu()
        inside = each["labels"] < classes  # 255 stands for no class
        pairs = each["labels"][inside] * classes + found[inside]
        confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    unions = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return float((confusion.diag()[unions > 0] / unions[unions > 0]).mean())


if __name__ == "__main__":
    main()
