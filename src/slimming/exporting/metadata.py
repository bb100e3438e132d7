"""Metadata of exported files: the preprocessing of images and the names of the classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from slimming.benchmarking.programs import INPUT, OUTPUT
from slimming.core.files import FORMAT
from slimming.models.hosts import classes_of
from slimming.training.images import ImageSpec

KEY = "slimming"
"""Key of the description in the metadata of a file; its value is JSON."""
FITS = {"center": "cover", "squash": "stretch", "border": "inside"}
"""timm's crop mode -> how an image is scaled, see `description`."""


def description(spec: ImageSpec, classes: Sequence[str], outputs: Sequence[int]) -> dict[str, Any]:
    """Return the description that is embedded in every file.

    An image is decoded as RGB (or grey) and resized: depending on ``fit``, so that it just covers ``resize`` (height,
    width), is stretched to it, or fits inside it. It is cropped at the centre, or padded with ``mean``, to ``crop``,
    divided by 255, and normalised by ``mean`` and ``std`` of each channel.

    Args:
        spec: input specification of the model.
        classes: names of the classes; empty if they are not known.
        outputs: shape of the model's output for one image.
    """
    channels, *size = spec.input_size
    return {
        "format": FORMAT,
        "input": {"name": INPUT, "shape": ["batch", channels, *size], "type": "float32"},
        "output": {"name": OUTPUT, "shape": ["batch", *outputs], "type": "float32"},
        "preprocessing": {
            "mode": "RGB" if channels == 3 else "L",
            "resize": [math.floor(side / spec.crop_pct) for side in size],
            "fit": FITS[spec.crop_mode],
            "crop": size,
            "interpolation": spec.interpolation,
            "mean": list(spec.mean),
            "std": list(spec.std),
        },
        "classes": list(classes),
    }


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classes stored in ``model``; empty if there are none, or not one for each class."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
    return tuple(map(str, names)) if len(names) == classes_of(model) else ()
