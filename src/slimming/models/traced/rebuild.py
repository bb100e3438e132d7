"""Find out how a host builds a dense model, as a name and arguments in plain data, and build it from them."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from slimming.core.example_inputs import ExampleCall, given_calls, image_call
from slimming.core.files import check_json
from slimming.errors import CheckpointError, ConfigError, UnsupportedModelError
from slimming.models.allowed import (
    check_timm,
    check_torchvision,
    image_settings_of,
    transformers_config,
    without_origin,
)
from slimming.models.family import ORIGIN, difference
from slimming.models.hosts import classes_of, give_image_settings_, image_settings, make_torchvision, plain, unplain
from slimming.models.replaced_layers import Blueprint, replaced_layers

OWN = "own"
"""The host of a model that only its user can build."""
SEQUENCE_LENGTH = 16
"""Number of tokens in the example input of torch's encoders."""


def is_torchvision(model: nn.Module) -> bool:
    """Whether the class of ``model`` is torchvision's."""
    return type(model).__module__.startswith("torchvision.")


def find_base(model: nn.Module, change_: Callable[[nn.Module], None] | None = None) -> dict[str, Any]:
    """Find the base of ``model``: the host that builds it, with the name and arguments.

    If no host builds the model, the base gives the reason. Such a model can be cut and saved; `slimming.load` then
    needs the dense model as an argument.

    Args:
        model: a model that was not cut as a whole.
        change_: applies to a newly built model the changes made to ``model`` since its host built it, such as cutting a
            submodule.
    """
    module = type(model).__module__
    if module.startswith("transformers."):
        candidates = _transformers_candidates(model)
    elif is_torchvision(model):
        candidates = _torchvision_candidates(model)
    else:
        candidates = _timm_candidates(model)
    why = "it is not a model that timm, transformers or torchvision makes by name"
    nearest: tuple[int, dict[str, Any]] | None = None
    for base in candidates:
        try:
            built = _quiet_build(base)
        except CheckpointError:
            continue
        if change_ is not None:
            change_(built)
        why = difference(model, built)
        if why is None:
            return base
        try:  # a new classifier is recorded when the model is saved
            count = len(replaced_layers(model, Blueprint.of(built)))
        except UnsupportedModelError:
            continue
        if nearest is None or count < nearest[0]:
            nearest = count, base
    if nearest is not None:
        return nearest[1]
    return {"host": OWN, "class": f"{module}.{type(model).__qualname__}", "why": why}


def rebased(base: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """``base`` with the number of classes and the image settings of ``model``, which may have changed since."""
    if base["host"] == "transformers":
        return {**base, "config": _config(model), "images": _settings(model)}
    if base["host"] == "torchvision":
        arguments = dict(base["arguments"])
        if "num_classes" in arguments:
            arguments["num_classes"] = classes_of(model)
        return {**base, "arguments": arguments, "images": _settings(model)}
    if base["host"] != "timm":
        return dict(base)
    arguments, classes = base["arguments"], classes_of(model)
    if isinstance(getattr(model, "num_classes", None), int) and arguments.get("num_classes") != classes:
        arguments = {**arguments, "num_classes": classes}
    return {**base, "arguments": arguments, "config": _settings(model)}


def build(base: Mapping[str, Any]) -> nn.Module:
    """Build the dense model with random weights.

    Raises:
        CheckpointError: the host is not installed, or does not have the model or an argument.
    """
    makers = {"timm": _make_timm, "transformers": _make_transformers, "torchvision": _make_torchvision}
    maker = makers.get(base.get("host", ""))
    if maker is None:
        raise CheckpointError(
            f"This checkpoint is of {base.get('class')}, which slimming cannot make by itself ({base.get('why')}). "
            "Make the dense model yourself and hand it over: slimming.load(path, dense=model)."
        )
    try:
        return maker(base)
    except ImportError as error:
        raise CheckpointError(f"This checkpoint needs {base['host']}: pip install {base['host']}.") from error
    except (KeyError, TypeError, RuntimeError, AssertionError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{base['host']} cannot make {base.get('name')!r}: {error}. Install the version named in provenance.json."
        ) from error


def input_shape(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the image that ``model`` takes; 224 x 224 pixels if it does not specify a size.

    For torch's encoders, which do not take an image, a number of tokens and their width.
    """
    if isinstance(model, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
        layer: Any = model.layers[0] if isinstance(model, nn.TransformerEncoder) else model
        return (SEQUENCE_LENGTH, layer.self_attn.embed_dim)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else 3
    for owner in model.modules():
        config = getattr(owner, "config", None)
        parts = (config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config")))
        for part in (owner, *parts):
            size = getattr(part, "image_size", None) or getattr(part, "img_size", None)
            if isinstance(size, (tuple, list)) and len(size) == 3:
                return (int(size[0]), int(size[1]), int(size[2]))
            if isinstance(size, (int, tuple, list)):
                return (int(getattr(part, "num_channels", channels)), *_pair(size))
    wanted = _timm_config(model).get("input_size")
    return (channels, int(wanted[1]), int(wanted[2])) if wanted else (channels, 224, 224)


def example_candidates(model: nn.Module) -> list[tuple[ExampleCall, ...]]:
    """The example calls of ``model``, or guesses of them: the first that the model takes is its input.

    Without example inputs of its own, a model is taken to read images of `input_shape`, or with the usual numbers of
    channels: its first convolution may not be the one that reads the image, or may read a rearranged image.

    Raises:
        UnsupportedModelError: the model reads signals or volumes, whose size cannot be guessed.
        ConfigError: its example inputs are malformed.
    """
    given = given_calls(model)
    if given:
        return [tuple(call.varied() for call in given)]
    convolutions = [module for module in model.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    if convolutions and not any(isinstance(module, nn.Conv2d) for module in convolutions):
        first = convolutions[0]
        sizes = "length" if isinstance(first, nn.Conv1d) else "depth, height, width"
        raise UnsupportedModelError(
            f"This {type(model).__name__} has a {type(first).__name__} and no Conv2d, so it does not read images, and "
            "the size of its input cannot be guessed. Give an example: slimming.describe(model, "
            f"example_inputs=torch.randn(1, {first.in_channels}, {sizes})), with the numbers in place of the words."
        )
    channels, *size = input_shape(model)
    if len(size) != 2:
        return [(image_call((channels, *size)),)]
    return [(image_call((number, *size)),) for number in dict.fromkeys((channels, 3, 1))]


def _settings(model: nn.Module) -> dict[str, Any]:
    """The image settings of ``model``, with the size of images that its user gave it as an attribute."""
    settings = image_settings(model)
    if "image_size" in vars(model):
        settings["input_size"] = list(input_shape(model))
    return settings


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _timm_config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


def _timm_candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Bases from which timm may have built ``model``, those with the fewest arguments first."""
    config = _timm_config(model)
    settings = _settings(model)
    recorded = model.__dict__.get(ORIGIN)
    if recorded is not None:
        arguments = {key: plain(value) for key, value in recorded["arguments"].items()}
        yield {"host": "timm", "name": recorded["name"], "arguments": arguments, "config": settings}
    name = config.get("architecture")
    if name is None:
        return
    if config.get("tag"):
        name = f"{name}.{config['tag']}"
    channels, height, width = input_shape(model)
    arguments: dict[str, Any] = {}
    if getattr(model, "num_classes", None) is not None and classes_of(model) != config.get("num_classes"):
        arguments["num_classes"] = classes_of(model)
    if channels != (config.get("input_size") or (channels,))[0]:
        arguments["in_chans"] = channels
    made_with: Any = getattr(model, "_model_args", None)  # recorded since timm 1.0.31
    if isinstance(made_with, dict):
        given = {key: plain(value) for key, value in made_with.items()}
        with contextlib.suppress(ConfigError):
            check_json(given, "arguments")
            yield {"host": "timm", "name": name, "arguments": {**given, **arguments}, "config": settings}
    sized = {"img_size": [height, width]}
    pooled = {"global_pool": model.global_pool} if isinstance(getattr(model, "global_pool", None), str) else {}
    for extra in ({}, sized, pooled, {**sized, **pooled}):
        yield {"host": "timm", "name": name, "arguments": {**arguments, **extra}, "config": settings}


def _make_timm(base: Mapping[str, Any]) -> nn.Module:
    check_timm(base["name"], base["arguments"])
    model = timm.create_model(base["name"], pretrained=False, **unplain(base["arguments"]))
    give_image_settings_(model, image_settings_of(base["config"]))
    return model


def _torchvision_candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Bases from which torchvision may have built ``model``, those with the fewest arguments first."""
    module = type(model).__module__
    if not module.startswith("torchvision.models"):
        return
    import torchvision

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    arguments: dict[str, Any] = {}
    if layers:
        last = layers[-1]
        arguments["num_classes"] = last.out_features if isinstance(last, nn.Linear) else last.out_channels
    if isinstance(getattr(model, "transform_input", None), bool):  # GoogLeNet and Inception
        arguments |= {"transform_input": model.transform_input, "init_weights": False}
        arguments |= {"aux_logits": bool(model.aux_logits)}
    _, height, width = input_shape(model)
    extras: list[dict[str, Any]] = [{}, {"image_size": height}] if height == width else [{}]
    if ".segmentation." in module:
        arguments = {"num_classes": arguments.get("num_classes")}
        extras = [{}, {"aux_loss": True}]
    for name in torchvision.models.list_models():
        builder = torchvision.models.get_model_builder(name)
        if builder.__module__ == module:
            for extra in extras:
                chosen = {**arguments, **extra}
                yield {"host": "torchvision", "name": name, "arguments": chosen, "images": _settings(model)}


def _make_torchvision(base: Mapping[str, Any]) -> nn.Module:
    check_torchvision(base["name"], base["arguments"])
    model = make_torchvision(base["name"], base["arguments"])
    give_image_settings_(model, image_settings_of(base.get("images", {})))
    return model


def _transformers_candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Bases from which transformers may have built ``model``: its configuration, with and without a pooler."""
    config = getattr(model, "config", None)
    if config is None:
        return
    base = {"host": "transformers", "name": type(model).__name__, "config_class": type(config).__name__}
    for arguments in ({}, {"add_pooling_layer": False}):
        yield {**base, "config": _config(model), "arguments": arguments, "images": _settings(model)}


def _config(model: Any) -> dict[str, Any]:
    """The complete configuration of a transformers model, as JSON values, without its origin and pretrained weights."""
    return without_origin(json.loads(model.config.to_json_string(use_diff=False)))


def _make_transformers(base: Mapping[str, Any]) -> nn.Module:
    import transformers

    cls, config_class = (getattr(transformers, str(base[key]), None) for key in ("name", "config_class"))
    # The names come from a file and must not give access to anything but models and configurations.
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError("there is no such model")
    if not (isinstance(config_class, type) and issubclass(config_class, transformers.PreTrainedConfig)):
        raise ValueError(f"there is no configuration {base['config_class']!r}")
    arguments = base.get("arguments", {})
    if any(name != "add_pooling_layer" or type(value) is not bool for name, value in arguments.items()):
        raise CheckpointError(
            f"The file passes {arguments!r} to {base['name']}, of which only add_pooling_layer is taken."
        )
    config = config_class.from_dict(transformers_config(config_class, base["config"], where=str(base["config_class"])))
    model = cls(config, **arguments)
    give_image_settings_(model, image_settings_of(base.get("images", {})))
    return model


class _RangesOnCpu(TorchFunctionMode):
    """Create ranges on the CPU instead of the meta device: some hosts compute their sizes from the values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.arange, torch.linspace, torch.tensor):
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def _quiet_build(base: Mapping[str, Any]) -> nn.Module:
    """Build a candidate base on the meta device, since only modules and shapes are compared, without warnings."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            return build(base)
        except CheckpointError as error:
            if not isinstance(error.__cause__, NotImplementedError):
                raise
        with _RangesOnCpu():
            return build(base)
