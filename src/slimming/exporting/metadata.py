"""What a file has to say besides its weights: how an image becomes its input, and what its outputs are called."""

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
"""Under which the description lies in a file, as JSON."""
FITS = {"center": "cover", "squash": "stretch", "border": "inside"}
"""How an image is scaled, by timm's name of it."""


def description(spec: ImageSpec, classes: Sequence[str], outputs: Sequence[int]) -> dict[str, Any]:
    """The description that travels with every file.

    An image is decoded as RGB (or grey), scaled until it just covers ``resize`` (height, width), or as ``fit`` says
    stretched to it or just inside of it, cut or padded with ``mean`` to the middle ``crop``, divided by 255, and
    normalised by ``mean`` and ``std`` of each channel.

    Args:
        spec: what the model takes.
        classes: names of the classes, or nothing if they have none.
        outputs: the shape of what the model gives for one image.
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
    """The names of the classes that travel with ``model``; none if it has no names, or names of other classes."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
    return tuple(map(str, names)) if len(names) == classes_of(model) else ()
