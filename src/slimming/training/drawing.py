"""Draw what a model predicts on an image: boxes, masks, maps of classes, depth, and images."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimming.errors import ConfigError

THRESHOLD = 0.5
"""Boxes and masks with a smaller score are not drawn."""


def draw_prediction(image: Tensor, prediction: Any, classes: Sequence[str] = ()) -> Tensor:
    """Return a copy of an image with a prediction drawn into it, uint8 (3, H, W).

    Args:
        image: uint8 (C, H, W) with one or three channels.
        prediction: a mapping with ``boxes`` (N, 4) as x1, y1, x2, y2 in pixels, and optionally ``labels``, ``scores``
            and ``masks`` (N, H, W) or (N, 1, H, W); class numbers (H, W); a map of numbers (H, W), such as depth; or an
            image (C, H, W) with values between 0 and 1.
        classes: names of the classes.

    Raises:
        ConfigError: the image or the prediction has another form.
    """
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.dim() != 3 or len(image) not in (1, 3):
        raise ConfigError("An image to draw on must be a uint8 tensor (C, H, W) with one or three channels.")
    canvas = image.cpu().expand(3, -1, -1).clone()
    size = canvas.shape[1:]
    if isinstance(prediction, Mapping) and "boxes" in prediction:
        return _objects(canvas, prediction, classes)
    if isinstance(prediction, Tensor) and prediction.shape == size:
        prediction = prediction.detach().cpu()
        return _depth(prediction) if prediction.is_floating_point() else _classes(canvas, prediction)
    if isinstance(prediction, Tensor) and prediction.dim() == 3 and prediction.shape[1:] == size:
        return (prediction.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1)
    raise ConfigError(
        f"A prediction to draw on an image of {size[0]} x {size[1]} pixels must be a mapping with boxes, class numbers "
        f"or a map of this size, or an image; this is {type(prediction).__name__}"
        f"{f' of shape {tuple(prediction.shape)}' if isinstance(prediction, Tensor) else ''}."
    )


def _objects(canvas: Tensor, found: Mapping[str, Any], classes: Sequence[str]) -> Tensor:
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    count = len(found["boxes"])
    scores = found.get("scores", torch.ones(count)).detach().cpu()
    shown = scores >= THRESHOLD
    if not bool(shown.any()):
        return canvas
    if found.get("masks") is not None:
        masks = found["masks"].detach().cpu().reshape(count, *canvas.shape[1:])[shown]
        canvas = draw_segmentation_masks(canvas, masks > 0.5 if masks.is_floating_point() else masks.bool(), alpha=0.5)
    labels = found.get("labels")
    words, numbers = None, [0] * int(shown.sum())
    if labels is not None:
        numbers = [int(label) for label in labels[shown.to(labels.device)]]
        words = [classes[number] if number < len(classes) else str(number) for number in numbers]
    boxes, colours = found["boxes"].detach().cpu()[shown], [_colour(number) for number in numbers]
    return draw_bounding_boxes(canvas, boxes, labels=words, colors=colours, width=2)


def _classes(canvas: Tensor, numbers: Tensor) -> Tensor:
    from torchvision.utils import draw_segmentation_masks

    every = torch.unique(numbers)
    colours = [_colour(int(each)) for each in every]
    return draw_segmentation_masks(canvas, torch.stack([numbers == each for each in every]), alpha=0.5, colors=colours)


def _colour(number: int) -> str | tuple[int, int, int]:
    """The colour of a class, whichever others are in the image: hues that are far apart for consecutive numbers."""
    red, green, blue = colorsys.hsv_to_rgb(0.06 + number * 0.618 % 1, 0.9, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _depth(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return ((values - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8).expand(3, -1, -1)
