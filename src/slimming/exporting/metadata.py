"""Metadata of exported files: the preprocessing of images and the names of the classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from slimming.benchmarking.programs import INPUT, OUTPUT
from slimming.core.example_inputs import ExampleCall
from slimming.core.files import FORMAT
from slimming.models.hosts import classes_of
from slimming.training.images import ImageSpec

KEY = "slimming"
"""Key of the description in the metadata of a file; its value is JSON."""
FITS = {"center": "cover", "squash": "stretch", "border": "inside"}
"""timm's crop mode -> how an image is scaled, see `description`."""


def description(
    spec: ImageSpec,
    classes: Sequence[str],
    outputs: Mapping[str, Sequence[int]],
    call: ExampleCall,
    *,
    any_batch: bool = True,
) -> dict[str, Any]:
    """Return the description that is embedded in every file.

    An image is decoded as RGB (or grey) and resized: depending on ``fit``, so that it just covers ``resize`` (height,
    width), is stretched to it, or fits inside it. It is cropped at the centre, or padded with ``mean``, to ``crop``,
    divided by 255, and normalised by ``mean`` and ``std`` of each channel.

    Args:
        spec: input specification of the model.
        classes: names of the classes; empty if they are not known.
        outputs: names of the model's outputs, and their shapes for one image.
        call: an example call, which gives the inputs of a model that takes more than an image.
        any_batch: whether the batch size is dynamic; otherwise it is that of the call.
    """
    channels, *size = spec.input_size
    batch: Any = "batch" if any_batch else call.size
    made = [{"name": name, "shape": [batch, *shape], "type": "float32"} for name, shape in outputs.items()]
    given = [{"name": INPUT, "shape": [batch, channels, *size], "type": "float32"}]
    if call.kwargs:
        named = {name: value for name, value in call.kwargs.items() if isinstance(value, Tensor)}
        given = [
            {"name": name, "shape": list(value.shape), "type": str(value.dtype).removeprefix("torch.")}
            for name, value in named.items()
        ]
    return {
        "format": FORMAT,
        **({"input": given[0]} if len(given) == 1 else {"inputs": given}),
        **({"output": {**made[0], "name": OUTPUT}} if len(made) == 1 else {"outputs": made}),
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
