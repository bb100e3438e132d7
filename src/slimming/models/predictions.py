"""What detectors and segmenters predict on images: boxes with labels and scores, or a map of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.modules import run_on_images
from slimming.errors import UnsupportedModelError
from slimming.models.transformers_tasks import task_of

DETECTION, SEGMENTATION = "object detection", "segmentation"


def predict(model: nn.Module, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Any]:
    """Return the predictions of a model of transformers or torchvision for a batch of images.

    Outputs are turned into predictions by the code of the host.

    Args:
        model: a detector or segmenter in evaluation mode.
        images: preprocessed images (B, C, H, W).
        sizes: height and width of each image before it was scaled, in which predictions are given.

    Returns:
        For each image of a detector, a dict with ``boxes`` (N, 4) as x1, y1, x2, y2, ``scores`` (N,) and ``labels``
        (N,); for each image of a segmenter, the class of each pixel (height, width).

    Raises:
        UnsupportedModelError: the model is of another task, or its host has no code for this.
        DataError: the model fails on the images.
    """
    task = task_of(model)
    if task not in (DETECTION, SEGMENTATION):
        raise UnsupportedModelError(
            f"The predictions of this {type(model).__name__}, a model for {task}, are not read; measure it with a "
            "function of your own: slimming.compare(models, evaluate=...)."
        )
    output = run_on_images(model, images)
    if type(model).__module__.startswith("torchvision."):
        if task == SEGMENTATION:
            return [_resized(logits, size) for logits, size in zip(output["out"], sizes, strict=True)]
        return [_scaled(found, images.shape[2:], size) for found, size in zip(output, sizes, strict=True)]
    processor = _processor(model)
    if task == DETECTION:
        scales = torch.tensor(sizes, device=images.device)
        return processor.post_process_object_detection(output, threshold=0.0, target_sizes=scales)
    return processor.post_process_semantic_segmentation(output, target_sizes=list(sizes))


def class_names_of(model: nn.Module) -> dict[int, str]:
    """Return the names of the classes in the configuration of a model of transformers; empty if it names none."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    found = {int(label): str(name) for label, name in names.items()}
    return {} if all(name == f"LABEL_{label}" for label, name in found.items()) else found


def _processor(model: nn.Module) -> Any:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    found: Any = IMAGE_PROCESSOR_MAPPING.get(type(model.config), None)
    options = list(found.values()) if isinstance(found, dict) else list(found) if isinstance(found, tuple) else [found]
    name = "post_process_object_detection" if task_of(model) == DETECTION else "post_process_semantic_segmentation"
    for option in options:
        if getattr(option, name, None) is not None:
            return option()
    raise UnsupportedModelError(
        f"transformers has no image processor for {type(model).__name__} with {name}; measure the model with a "
        "function of your own: slimming.compare(models, evaluate=...)."
    )


def _scaled(found: Any, given: Sequence[int], size: tuple[int, int]) -> dict[str, Tensor]:
    height, width = size[0] / given[0], size[1] / given[1]
    factors = torch.tensor([width, height, width, height], device=found["boxes"].device)
    return {"boxes": found["boxes"] * factors, "scores": found["scores"], "labels": found["labels"]}


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return nn.functional.interpolate(logits[None].float(), size, mode="bilinear", align_corners=False)[0].argmax(0)
