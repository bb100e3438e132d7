"""The classes of transformers by task: which one a directory holds, and what images it takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from slimming.core.example_inputs import given_calls, set_example_inputs_
from slimming.errors import UnsupportedModelError

CLASSIFICATION = "image classification"
TASKS: Mapping[str, tuple[str, ...]] = {
    CLASSIFICATION: ("IMAGE_CLASSIFICATION",),
    "object detection": ("OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION"),
    "segmentation": ("SEMANTIC_SEGMENTATION", "INSTANCE_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "IMAGE_SEGMENTATION"),
    "depth estimation": ("DEPTH_ESTIMATION",),
    "keypoint detection": ("KEYPOINT_DETECTION",),
    "mask generation": ("MASK_GENERATION",),
    "zero-shot classification": ("ZERO_SHOT_IMAGE_CLASSIFICATION",),
}
"""Task -> the tables of transformers' auto classes that list its models; a class is of the first task that has it."""
PREFIXES: Mapping[str, str] = {
    **dict.fromkeys(("fasterrcnn", "fcos", "keypointrcnn", "maskrcnn", "retinanet", "ssd"), "object detection"),
    **dict.fromkeys(("deeplabv3_", "fcn_", "lraspp"), "segmentation"),
}
"""Start of the name of a model of torchvision -> its task."""
TOKENS = 8
"""Number of tokens of the text in the example inputs of models that take text, too."""


def class_in(config_class: Any, architectures: Any, kind: str, *, where: str) -> Any:
    """Return the class of the model in a directory of transformers.

    It is the class that the directory names, if it is of one of `TASKS`. An encoder, or a model of a pretraining task,
    is opened as an image classifier if there is such a class; otherwise as what it is.

    Args:
        config_class: class of the configuration.
        architectures: entry ``architectures`` of config.json.
        kind: entry ``model_type`` of config.json.
        where: name of the directory in messages.

    Raises:
        UnsupportedModelError: transformers has no such class.
    """
    import transformers

    named = architectures[0] if isinstance(architectures, list) and architectures else None
    known: Any = getattr(transformers, named, None) if isinstance(named, str) else None
    fits = isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)
    if not fits or getattr(known, "config_class", None) is not config_class:
        known = None
    if known is not None and task_of_class(known) is not None:
        return known
    auto: Any = transformers.AutoModelForImageClassification
    if config_class in auto._model_mapping:
        found = auto._model_mapping[config_class]
        return found[0] if isinstance(found, tuple) else found
    if known is None:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no model for images of type {kind!r} called "
            f"{named!r}, which {where} names. Install the version of transformers that wrote it."
        )
    return known


def task_of_class(cls: type) -> str | None:
    """Return the task of a class of transformers, one of `TASKS`; None if it is an encoder or of no such task."""
    return task_named(cls.__name__)


def task_named(name: str) -> str | None:
    """Return the task of the class of transformers, or the model of torchvision, called ``name``; None if unknown."""
    if name.startswith(tuple(PREFIXES)):
        return next(task for prefix, task in PREFIXES.items() if name.startswith(prefix))
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return None
    tables: Any = vars(modeling_auto)
    for task, kinds in TASKS.items():
        for kind in kinds:
            for found in tables.get(f"MODEL_FOR_{kind}_MAPPING_NAMES", {}).values():
                if name in ((found,) if isinstance(found, str) else found):
                    return task
    return None


def task_of(model: nn.Module) -> str:
    """Return the task of a model, one of `TASKS`; classification for models of which it is not known."""
    module = type(model).__module__
    if module.startswith("transformers."):
        return task_of_class(type(model)) or CLASSIFICATION
    if module.startswith("torchvision.models.detection"):
        return "object detection"
    return "segmentation" if module.startswith("torchvision.models.segmentation") else CLASSIFICATION


def processed_images(processor: Mapping[str, Any], *, whole: bool) -> dict[str, Any]:
    """Return the image settings, as `slimming.models.hosts` names them, of a ``preprocessor_config.json``.

    Args:
        processor: its content.
        whole: whether the size counts, and images are scaled as a whole, as for detectors; the size of a classifier is
            in its configuration.
    """
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if processor.get("do_normalize") is False:
        channels = len(mean) if isinstance(mean, list) else 3
        mean, std = [0.0] * channels, [1.0] * channels
    settings: dict[str, Any] = {"mean": mean, "std": std}
    if whole:
        settings |= {"crop_pct": 1.0, "crop_mode": "squash"}
        if (sides := _sides(processor.get("size"))) is not None:
            settings["input_size"] = [len(mean) if isinstance(mean, list) else 3, *sides]
    return settings


def _sides(size: Any) -> tuple[int, int] | None:
    """Height and width in the entry ``size`` of a processor."""
    if isinstance(size, Mapping):
        height, width = size.get("height"), size.get("width")
        if height is None or width is None:
            height = width = size.get("shortest_edge") or size.get("longest_edge")
    else:
        height = width = size
    fits = all(type(side) is int and 1 <= side <= 100_000 for side in (height, width))
    return (height, width) if fits else None  # pyright: ignore[reportReturnType]


def give_example_inputs_(model: nn.Module) -> None:
    """Give a model of transformers that takes images and a text, such as CLIP, an example of both, if it has none."""
    config: Any = getattr(model, "config", None)
    parts = [getattr(config, name, None) for name in ("vision_config", "text_config")]
    takes: Any = getattr(model, "main_input_name", "")
    if not type(model).__module__.startswith("transformers.") or None in parts or given_calls(model):
        return
    if takes not in ("input_ids", "pixel_values") or "input_ids" not in inspect.signature(model.forward).parameters:
        return
    vision, text = parts
    generator = torch.Generator().manual_seed(0)
    side = getattr(vision, "image_size", 224)
    image = torch.randn(1, getattr(vision, "num_channels", 3), side, side, generator=generator)
    length = min(TOKENS, getattr(text, "max_position_embeddings", TOKENS))
    ids = torch.randint(1, max(2, text.vocab_size - 1), (1, length), generator=generator)
    ids[:, -1] = min(getattr(text, "eos_token_id", None) or text.vocab_size - 1, text.vocab_size - 1)
    set_example_inputs_(model, {"input_ids": ids, "pixel_values": image})
