"""Run the detectors of torchvision on small images while they are read.

Their first step enlarges every image, by default to 800 pixels: seconds per forward pass for a result, the coupling of
channels, that does not depend on the size of the image. Costs are counted at the size that the detector asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

TRANSFORM = "torchvision.models.detection.transform"
"""The module of the class that enlarges images."""
PIXELS = 224
"""Largest side of an image while a detector is read."""


def enlarges_images(model: nn.Module) -> bool:
    """Whether there is a detector of torchvision in ``model``."""
    return any(type(module).__module__ == TRANSFORM for module in model.modules())


@contextmanager
def small_images(model: nn.Module) -> Iterator[None]:
    """Make the detectors in ``model`` resize images to at most `PIXELS` inside the context."""
    transforms: list[Any] = [module for module in model.modules() if type(module).__module__ == TRANSFORM]
    sizes = [(transform.min_size, transform.max_size) for transform in transforms]
    for transform in transforms:
        transform.min_size, transform.max_size = (min(PIXELS, *transform.min_size),), PIXELS
    try:
        yield
    finally:
        for transform, (smallest, largest) in zip(transforms, sizes, strict=True):
            transform.min_size, transform.max_size = smallest, largest
