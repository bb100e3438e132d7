"""Evaluate detectors and segmenters on COCO annotations and on folders of masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from slimming.core.argument_types import checked_arguments
from slimming.core.metric import PERCENT, Metric
from slimming.core.modules import in_evaluation
from slimming.errors import DataError, MissingExtraError, UnsupportedModelError
from slimming.models.hosts import classes_of
from slimming.models.predictions import DETECTION, SEGMENTATION, class_names_of, predict
from slimming.models.transformers_tasks import task_of
from slimming.runs.setup import image_spec
from slimming.training.annotations import Annotated, coco_images, masked_images
from slimming.training.config import DataConfig
from slimming.training.images import make_transform

DENSE_METRICS: Mapping[str, Metric] = {
    DETECTION: Metric(name="mAP", unit=PERCENT),
    SEGMENTATION: Metric(name="mIoU", unit=PERCENT),
}
"""Task -> the metric that `evaluate_dense` returns for it."""
IGNORED = 255
"""Value of pixels in masks that do not count."""


@checked_arguments
def evaluate_dense(
    model: nn.Module, images: str | Path, annotations: str | Path, *, batch_size: int = 8, limit: int | None = None
) -> dict[str, float]:
    """Return the mean average precision of a detector, or the mean intersection over union of a segmenter.

    Args:
        model: a detector or segmenter of transformers or torchvision, dense or slim.
        images: a folder of images.
        annotations: for a detector, a JSON file of COCO with boxes; for a segmenter, a folder of masks with the names
            of the images, which hold class numbers of the model, and 255 where nothing counts.
        batch_size: images per forward pass.
        limit: number of images; None takes all.

    Returns:
        For a detector, ``mAP`` (over thresholds of 0.50 to 0.95), ``mAP50`` and ``images``; for a segmenter, ``mIoU``,
        ``accuracy`` (of pixels) and ``images``.

    Raises:
        UnsupportedModelError: the model is of another task.
        DataError: a file is missing or damaged, an image has no mask, or the classes differ.
        MissingExtraError: torchmetrics or pycocotools is not installed.
    """
    task = task_of(model)
    if task not in DENSE_METRICS:
        raise UnsupportedModelError(
            f"This {type(model).__name__} is a model for {task}. Boxes of detectors and masks of segmenters are "
            "evaluated; measure it with a function of your own: slimming.compare(models, evaluate=...)."
        )
    check_metrics()
    folder, where = Path(images), Path(annotations)
    found = coco_images(folder, where) if task == DETECTION else masked_images(folder, where)
    with in_evaluation(model), torch.no_grad():
        batches = _batches(model, found[:limit], batch_size)
        return (_detection if task == DETECTION else _segmentation)(model, batches, len(found[:limit]))


def check_classifies(model: nn.Module) -> None:
    """Check that ``model`` is no detector or segmenter, whose top-1 is not defined.

    Raises:
        UnsupportedModelError: it is.
    """
    if (task := task_of(model)) in DENSE_METRICS:
        raise UnsupportedModelError(
            f"This {type(model).__name__} is a model for {task}, which has no top-1. Give --annotations: a JSON file "
            "of COCO for a detector, a folder of masks for a segmenter, and --data.source, the folder of the images."
        )


def check_metrics() -> None:
    """Check that the libraries of the metrics are installed.

    Raises:
        MissingExtraError: one is not.
    """
    try:
        import pycocotools  # pyright: ignore # noqa: F401
        import torchmetrics  # pyright: ignore # noqa: F401
    except ImportError as error:
        raise MissingExtraError("mAP and mIoU need an extra: pip install 'slimming[dense]'.") from error


def _batches(
    model: nn.Module, images: list[Annotated], batch_size: int
) -> Iterator[tuple[Tensor, list[tuple[int, int]], list[Annotated]]]:
    """Preprocessed images, their sizes in the files, and what is known of them."""
    transform = make_transform(image_spec(DataConfig(source="files"), model), None)
    like = next(model.parameters())
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        opened = [each.open() for each in part]
        tensors = torch.stack([transform(image) for image in opened]).to(like.device, like.dtype)
        yield tensors, [(image.height, image.width) for image in opened], part


def _detection(model: nn.Module, batches: Any, count: int) -> dict[str, float]:
    from torchmetrics.detection import MeanAveragePrecision  # pyright: ignore

    metric, numbers = MeanAveragePrecision(box_format="xyxy", iou_type="bbox"), None
    for images, sizes, known in batches:
        numbers = numbers or _label_numbers(model, known[0].categories)
        found = [
            {key: each[key].cpu() for key in ("boxes", "scores", "labels")} for each in predict(model, images, sizes)
        ]
        targets = [
            {
                "boxes": torch.tensor([box for box, _, _ in each.objects], dtype=torch.float32).reshape(-1, 4),
                "labels": torch.tensor([numbers[label] for _, label, _ in each.objects], dtype=torch.int64),
                "iscrowd": torch.tensor([crowd for _, _, crowd in each.objects], dtype=torch.int64),
            }
            for each in known
        ]
        metric.update(found, targets)
    result = metric.compute()
    return {"mAP": float(result["map"]), "mAP50": float(result["map_50"]), "images": count}


def _label_numbers(model: nn.Module, categories: Mapping[int, str]) -> dict[int, int]:
    """The model's number of each category of the annotations: by name, else by id or in order.

    Raises:
        DataError: the model has other classes.
    """
    names = {name.lower(): label for label, name in class_names_of(model).items()}
    if names and all(name.lower() in names for name in categories.values()):
        return {key: names[name.lower()] for key, name in categories.items()}
    if type(model).__module__.startswith("torchvision."):
        return {key: key for key in categories}  # they are trained on the ids of COCO
    if not names and classes_of(model) == len(categories):
        return {key: number for number, key in enumerate(sorted(categories))}
    shown = ", ".join(list(categories.values())[:3])
    raise DataError(
        f"The model knows {classes_of(model)} classes{' by name' if names else ''}, the annotations have "
        f"{len(categories)} ({shown}, ...) that are not all among them; give the data that it was trained for."
    )


def _segmentation(model: nn.Module, batches: Any, count: int) -> dict[str, float]:
    from torchmetrics import Accuracy, JaccardIndex  # pyright: ignore

    classes = classes_of(model)
    options: dict[str, Any] = {"task": "multiclass", "num_classes": classes, "ignore_index": IGNORED}
    overlap, right = JaccardIndex(**options), Accuracy(**options, average="micro")
    for images, sizes, known in batches:
        for prediction, each in zip(predict(model, images, sizes), known, strict=True):
            mask = torch.from_numpy(np.array(Image.open(each.mask), dtype=np.int64))
            if mask.shape != prediction.shape:
                raise DataError(
                    f"{each.mask} has another size than {each.file.name}; masks have the size of the images."
                )
            wrong = (mask != IGNORED) & ((mask < 0) | (mask >= classes))
            if bool(wrong.any()):
                raise DataError(
                    f"{each.mask} holds class {int(mask[wrong][0])}, the model knows 0 to {classes - 1} (and {IGNORED} "
                    "for pixels that do not count). Give masks with the numbers of the model's classes."
                )
            overlap.update(prediction.cpu(), mask)
            right.update(prediction.cpu(), mask)
    return {"mIoU": float(overlap.compute()), "accuracy": float(right.compute()), "images": count}
