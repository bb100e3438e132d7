"""Cut a detector of transformers and retrain it inside transformers' Trainer.

    python examples/scenes.py --output scenes
    python examples/detection_in_trainer.py MODEL --data scenes [--macs 0.7] [--steps 500] [--output slim]

MODEL is a name on the hub or a directory with a detector, such as RT-DETR v2, D-FINE, DETR or YOLOS. ``--data`` has
``train`` and ``val``, each with ``images`` and COCO annotations in ``annotations.json``. The detector is scored by its
own loss on these labels, cut, and retrained with the labels and with the outputs of the dense model. mAP is measured
before and after, and the slim detector is saved, loaded again by `slimming.load`, and exported to ONNX.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dense_options import options
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchmetrics.detection import MeanAveragePrecision
from torchvision.datasets import CocoDetection
from torchvision.ops import box_convert
from torchvision.transforms.functional import pil_to_tensor, resize
from transformers import AutoModelForObjectDetection, TrainingArguments

import slimming
from slimming.training.hf_trainer import DistillingTrainer


class Scenes(Dataset):
    """Images of one size, and labels as the detectors of transformers take them: boxes as shares of the image."""

    def __init__(self, place: Path, size: int) -> None:
        self.scenes = CocoDetection(str(place / "images"), str(place / "annotations.json"))
        self.number = {category: number for number, category in enumerate(sorted(self.scenes.coco.getCatIds()))}
        self.size = size

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, objects = self.scenes[index]
        whole = torch.tensor([image.width, image.height] * 2)
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).reshape(-1, 4) / whole
        labels = torch.tensor([self.number[each["category_id"]] for each in objects], dtype=torch.int64)
        pixels = resize(pil_to_tensor(image), [self.size, self.size]).float() / 255
        return {
            "pixel_values": (pixels - 0.45) / 0.225,
            "labels": {"class_labels": labels, "boxes": box_convert(boxes, "xywh", "cxcywh")},
        }


def collate(scenes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch: the labels stay a list, with one entry per image."""
    images = default_collate([scene["pixel_values"] for scene in scenes])
    return {"pixel_values": images, "labels": [scene["labels"] for scene in scenes]}


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    """Score, cut, retrain, measure, save, load and export."""
    parser = options(__doc__, model="name on the hub, or directory", size=640, macs=0.7, output="slim-detector")
    settings = parser.parse_args(words)
    torch.manual_seed(0)
    train, val = (Scenes(settings.data / split, settings.size) for split in ("train", "val"))
    dense: Any = AutoModelForObjectDetection.from_pretrained(settings.model)
    found = {"dense": mean_average_precision(dense, val)}

    # The loss and the queries for denoising are computed if there are labels, in training; so both calls are examples.
    first = collate([train[0]])
    dense.example_inputs = [{"pixel_values": first["pixel_values"]}, first]
    batches = list(DataLoader(torch.utils.data.Subset(train, range(settings.scored)), 8, collate_fn=collate))
    scored = slimming.score(dense, batches, loss=own_loss, images=settings.scored)
    plan = slimming.plan(scored, slimming.Budget(macs=settings.macs))
    small: Any = slimming.cut(scored.model, plan, images=scored.images)
    share = slimming.cost(small).macs / slimming.cost(dense).macs
    found |= {"macs": share, "cut": mean_average_precision(small, val)}

    retrain(small, dense, train, settings)
    found["retrained"] = mean_average_precision(small, val)
    slimming.save(small, settings.output)
    again = slimming.load(settings.output)
    found["loaded"] = mean_average_precision(again, val)
    found["onnx"] = onnx_difference(again, first["pixel_values"], settings.output / "model.onnx")
    print(json.dumps(found, indent=1))
    return found


def own_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """The model's own loss on its labels."""
    return model(**batch).loss


def retrain(small: nn.Module, dense: nn.Module, train: Scenes, settings: argparse.Namespace) -> None:
    """Train with the labels and the outputs of the dense model."""
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            output_dir=place,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.rate,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        teacher = copy.deepcopy(dense)
        trainer = DistillingTrainer(
            model=small, args=arguments, train_dataset=train, data_collator=collate, teacher=teacher, outputs=comparable
        )
        trainer.train()


def comparable(output: Any) -> Any:
    """What is at the same place in teacher and student: the encoder's features if queries are selected by the image."""
    if getattr(output, "enc_topk_logits", None) is not None:
        return output.encoder_last_hidden_state
    return {"logits": output.logits, "pred_boxes": output.pred_boxes}


@torch.no_grad()
def mean_average_precision(model: Any, scenes: Scenes, batch: int = 16) -> float:
    """COCO's mAP, on the device and in the dtype of the model."""
    model.eval()
    metric = MeanAveragePrecision(box_format="cxcywh")
    for each in DataLoader(scenes, batch, collate_fn=collate):
        output = model(pixel_values=each["pixel_values"].to(model.device, model.dtype))
        # One entry per class, or one more for "nothing".
        one_each = output.logits.shape[-1] == model.config.num_labels
        chances = output.logits.sigmoid() if one_each else output.logits.softmax(-1)[..., :-1]
        scores, labels = chances.max(-1)
        boxes = output.pred_boxes.clamp(0, 1)
        found = [
            {"boxes": box.float().cpu(), "scores": score.float().cpu(), "labels": label.cpu()}
            for box, score, label in zip(boxes, scores, labels, strict=True)
        ]
        wanted = [{"boxes": label["boxes"], "labels": label["class_labels"]} for label in each["labels"]]
        metric.update(found, wanted)
    return float(metric.compute()["map"])


class Plain(nn.Module):
    """The model as ONNX wants it: one tensor in, tensors out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output: Any = self.model(pixel_values=images)
        return output.logits, output.pred_boxes


def onnx_difference(model: nn.Module, images: Tensor, file: Path) -> float:
    """Export the model, and return the largest difference of its outputs in ONNX Runtime, relative to the largest."""
    import onnxruntime

    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"  # checks inside RT-DETR and D-FINE have no form in ONNX
    plain = Plain(model.cpu().float()).eval()
    torch.onnx.export(plain, (images,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        wanted = plain(images)
    pairs = [(torch.from_numpy(a), b) for a, b in zip(found, wanted, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


if __name__ == "__main__":
    main()
