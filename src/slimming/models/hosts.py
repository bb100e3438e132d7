"""Get and set the classes and the image settings of models of all hosts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from slimming.errors import UnsupportedModelError
from slimming.models.allowed import IMAGE_SETTINGS

TRANSFORMERS, TORCHVISION = "transformers:", "torchvision:"
SETTINGS = tuple(IMAGE_SETTINGS)
"""Keys of timm's field ``pretrained_cfg`` about images and classes, which checkpoints keep for models of all hosts."""


LARGEST_SIDE = 8192
"""Largest side of an image in pixels."""


def is_hosted(name: str) -> bool:
    """Whether ``name`` has the prefix of a host other than timm: ``transformers:…`` or ``torchvision:…``."""
    return name.startswith((TRANSFORMERS, TORCHVISION))


def make_torchvision(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Make a model of torchvision with random weights; builders of detectors would fetch weights of a backbone."""
    import torchvision

    taken = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    nothing = {key: None for key in ("weights", "weights_backbone") if key in taken}
    return torchvision.models.get_model(name, **{**arguments, **nothing})


def classes_of(model: nn.Module) -> int:
    """Number of classes of ``model``; 0 if it has no classifier."""
    known = getattr(model, "num_classes", None)  # timm
    name = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if isinstance(known, int) and isinstance(name, str):
        layer = model._modules.get(name)
        if type(layer) is nn.Linear:  # its user may have replaced it
            return layer.out_features
    if known is None:
        known = getattr(getattr(model, "config", None), "num_labels", None)  # transformers
    if isinstance(known, int):
        return known
    name = classifier_of(model)
    layer = model.get_submodule(name) if name else None
    return int(getattr(layer, "out_features", None) or getattr(layer, "out_channels", 0))


def classifier_of(model: nn.Module) -> str | None:
    """Name of the layer that computes the logits: the last Linear or 1 x 1 convolution."""
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    return layers[-1] if layers else None


def classifiers_of(model: nn.Module) -> list[str]:
    """Names of the classifiers: those in timm's configuration, or the last layer of models of other hosts.

    Distilled models have a second classifier, and GoogLeNet has auxiliary ones. They are recognised by their names,
    because a hidden layer may have the same number of outputs.
    """
    if names := (getattr(model, "pretrained_cfg", None) or {}).get("classifier"):
        return [names] if isinstance(names, str) else list(names)
    last, known = classifier_of(model), classes_of(model)
    return [name for name, module in model.named_modules() if _is_classifier(name, module, last, known)]


def reset_classes_(model: Any, classes: int) -> None:
    """Replace the classifier of ``model`` by an untrained one for ``classes`` classes; both classifiers if it has two.

    Raises:
        UnsupportedModelError: the model has no classifier, or its last layer does not have one output per class.
    """
    if (reset := getattr(model, "reset_classifier", None)) is not None:  # timm
        reset(classes)
        return
    last, known = classifier_of(model), classes_of(model)
    if last is None:
        raise UnsupportedModelError(f"This {type(model).__name__} has no classifier to replace.")
    names = classifiers_of(model)
    if last not in names:
        raise UnsupportedModelError(
            f"This {type(model).__name__} has {known} classes, but its last layer {last!r} has another number of "
            "outputs; replace its classifier before you pass it to slimming."
        )
    for name in names:
        old: Any = model.get_submodule(name)
        with torch.device(old.weight.device):
            if isinstance(old, nn.Linear):
                new: nn.Module = nn.Linear(old.in_features, classes, bias=old.bias is not None)
            else:
                new = nn.Conv2d(old.in_channels, classes, 1, bias=old.bias is not None)
        model.set_submodule(name, new.to(old.weight.dtype))
    if (config := getattr(model, "config", None)) is not None:  # transformers
        config.num_labels = model.num_labels = classes


def _is_classifier(name: str, module: nn.Module, last: str | None, classes: int) -> bool:
    """Whether ``module`` computes logits: it is the ``last`` layer, or its name is that of an auxiliary classifier."""
    outputs = getattr(module, "out_features", None) or getattr(module, "out_channels", None)
    return outputs == classes and (name == last or any(word in name.lower() for word in ("classifier", "aux")))


def name_classes(model: Any, classes: tuple[str, ...]) -> None:
    """Store the names of the classes in ``pretrained_cfg`` of the model, so that they are saved with it."""
    give_image_settings_(model, {"label_names": list(classes)})


def image_settings(model: nn.Module) -> dict[str, Any]:
    """The settings of ``model`` for images and classes, see `SETTINGS`, as JSON values."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return {key: plain(config[key]) for key in SETTINGS if config.get(key) is not None}


def give_image_settings_(model: Any, settings: Mapping[str, Any]) -> None:
    """Set some of the settings of ``model`` for images and classes, see `SETTINGS`."""
    model.pretrained_cfg = {**(getattr(model, "pretrained_cfg", None) or {}), **unplain(settings)}


def give_image_size_(model: Any, size: Any) -> None:
    """Set the size of the images that a model for images of any size is read with, and that files are scaled to.

    Args:
        model: the model.
        size: side of a square, or height and width, in pixels.

    Raises:
        UnsupportedModelError: it is no size.
    """
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, (list, tuple)) else []
    if len(sides) != 2 or any(type(side) is not int or not 1 <= side <= LARGEST_SIDE for side in sides):
        raise UnsupportedModelError(
            f"image_size is {size!r}; give the side of a square or [height, width], from 1 to {LARGEST_SIDE:,} pixels."
        )
    model.image_size = tuple(sides)


def plain(value: Any) -> Any:
    """An argument of a host's constructor as a JSON value; `unplain` is the inverse."""
    return list(value) if isinstance(value, tuple) else value


def unplain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a host's constructor from JSON values: lists become tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
