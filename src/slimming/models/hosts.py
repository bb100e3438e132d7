"""Create dense models of transformers and torchvision by name; get and set the classes of models of all hosts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from slimming.errors import CheckpointError, MissingExtraError, UnsupportedModelError, nearest

TRANSFORMERS, TORCHVISION = "transformers:", "torchvision:"
SETTINGS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")
"""Keys of timm's field ``pretrained_cfg`` about images and classes, which checkpoints keep for models of all hosts."""


def is_hosted(name: str) -> bool:
    """Whether ``name`` has the prefix of a host other than timm: ``transformers:…`` or ``torchvision:…``."""
    return name.startswith((TRANSFORMERS, TORCHVISION))


def make(name: str, arguments: Mapping[str, Any], *, pretrained: bool, classes: int | None = None) -> nn.Module:
    """Create an image classifier by name.

    Args:
        name: ``transformers:owner/name``, ``transformers:DIRECTORY`` with a config.json, or ``torchvision:name``.
        arguments: fields of the transformers configuration, or arguments of torchvision's constructor.
        pretrained: load the host's pretrained weights; otherwise weights are random.
        classes: number of classes; if the model has another number, its classifier is replaced by an untrained one.

    Raises:
        UnsupportedModelError: the host has no such classifier, or rejects the arguments.
        CheckpointError: files or weights could not be loaded.
        MissingExtraError: transformers is not installed.
    """
    host, _, bare = name.partition(":")
    maker = _from_transformers if host == "transformers" else _from_torchvision
    try:
        model = maker(bare, dict(arguments), pretrained)
    except (TypeError, ValueError, AssertionError, KeyError, AttributeError) as error:
        message = f"{host} cannot make {bare!r} with {dict(arguments)}: {_first_line(error)}"
        raise UnsupportedModelError(message) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{bare!r} of {host} could not be loaded ({_first_line(error)}). Check the name and the network, or give a "
            "local directory or a local file of weights."
        ) from error
    if classes is not None and classes != classes_of(model):
        reset_classes_(model, classes)
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _from_transformers(name: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "Models of transformers need an extra: pip install 'slimming[transformers]'."
        ) from error
    maker: Any = transformers.AutoModelForImageClassification
    safe = {"trust_remote_code": False}  # by default transformers asks the user
    # In float32 even if the files are in half precision, which is not suited to training.
    if pretrained:  # from safetensors only, never from a pickle
        model = maker.from_pretrained(name, use_safetensors=True, **safe, **{"dtype": torch.float32, **arguments})
    else:
        config = transformers.AutoConfig.from_pretrained(name, **safe, **arguments)
        model = maker.from_config(config, dtype=arguments.get("dtype", torch.float32))
    mixin: Any = transformers.ImageProcessingMixin
    try:
        processor = mixin.get_image_processor_dict(name)[0]
    except OSError:
        processor = {}
    settings = {"mean": processor.get("image_mean"), "std": processor.get("image_std")}
    model.pretrained_cfg = {key: tuple(value) for key, value in settings.items() if value}
    return model.eval()


def _from_torchvision(name: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UnsupportedModelError(f"torchvision has no classifier {name!r}.{nearest(name, known)}")
    model: Any = torchvision.models.get_model(name, weights=None, **arguments)
    if pretrained:
        weights: Any = torchvision.models.get_model_weights(name).DEFAULT
        model.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
    return model.eval()


def classes_of(model: nn.Module) -> int:
    """Number of classes of ``model``; 0 if it has no classifier."""
    known = getattr(model, "num_classes", None)  # timm
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
    # Distilled models have a second classifier, and GoogLeNet has auxiliary ones. They are recognised by their names,
    # because a hidden layer may have the same number of outputs.
    names = [name for name, module in model.named_modules() if _is_classifier(name, module, last, known)]
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


def _is_classifier(name: str, module: nn.Module, last: str, classes: int) -> bool:
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


def plain(value: Any) -> Any:
    """An argument of a host's constructor as a JSON value; `unplain` is the inverse."""
    return list(value) if isinstance(value, tuple) else value


def unplain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a host's constructor from JSON values: lists become tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
