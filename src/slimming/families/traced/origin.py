"""How hosts make a dense model again: names and arguments, plain data."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from torch import nn

from slimming.errors import CheckpointError
from slimming.family import difference

CONFIG_FIELDS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")


def origin(model: nn.Module) -> dict[str, Any]:
    """The base of ``model``: who makes it, from which name and arguments.

    A model that no host makes again has a base that says why; it can be cut, and saved and loaded with the help
    of whoever made it.
    """
    module = type(model).__module__
    if module.startswith("transformers."):
        return _of_transformers(model)
    makers = _timm_candidates(model) if _timm_config(model) else _torchvision_candidates(model)
    why = "it is not a model that timm, transformers or torchvision makes by name"
    for base in makers:
        try:
            made = _quiet_build(base)
        except CheckpointError:
            continue
        why = difference(model, made)
        if why is None:
            return base
    return {"host": "own", "class": f"{module}.{type(model).__qualname__}", "why": why}


def rebased(base: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The base of a slim model, with the number of classes that its user may have changed since the cut."""
    classes = getattr(model, "num_classes", None)
    if base["host"] != "timm" or not isinstance(classes, int) or base["arguments"].get("num_classes") == classes:
        return dict(base)
    return {**base, "arguments": {**base["arguments"], "num_classes": classes}}


def build(base: Mapping[str, Any]) -> nn.Module:
    """Make the dense model with weights of no meaning.

    Raises:
        CheckpointError: its host is not installed, or does not know the name or an argument.
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
    """Channels, height and width of the image that ``model`` takes, as far as it says so; else (C, 224, 224)."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else 3
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "image_size", None):
        height, width = _pair(config.image_size)
        return (int(getattr(config, "num_channels", channels)), height, width)
    for owner in (getattr(model, "patch_embed", None), getattr(model, "stem", None), model):
        size = getattr(owner, "img_size", None) or getattr(owner, "image_size", None)
        if isinstance(size, (int, tuple, list)):
            return (channels, *_pair(size))
    wanted = _timm_config(model).get("input_size")
    return (channels, int(wanted[1]), int(wanted[2])) if wanted else (channels, 224, 224)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _timm_config(model: nn.Module) -> dict[str, Any]:
    found = getattr(model, "pretrained_cfg", None)
    return found if isinstance(found, dict) else {}


def _timm_candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Ways in which timm may have made ``model``, the plainest first."""
    config = _timm_config(model)
    name = config.get("architecture")
    if name is None:
        return
    if config.get("tag"):
        name = f"{name}.{config['tag']}"
    channels, height, width = input_shape(model)
    arguments: dict[str, Any] = {}
    if getattr(model, "num_classes", None) not in (None, config.get("num_classes")):
        arguments["num_classes"] = int(model.num_classes)  # pyright: ignore
    if channels != (config.get("input_size") or (channels,))[0]:
        arguments["in_chans"] = channels
    kept = {key: _plain(config[key]) for key in CONFIG_FIELDS if config.get(key) is not None}
    sized = {"img_size": [height, width]}
    pooled = {"global_pool": model.global_pool} if isinstance(getattr(model, "global_pool", None), str) else {}
    for extra in ({}, sized, pooled, {**sized, **pooled}):
        yield {"host": "timm", "name": name, "arguments": {**arguments, **extra}, "config": kept}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _make_timm(base: Mapping[str, Any]) -> nn.Module:
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in base["arguments"].items()}
    name = str(base["name"])
    if not timm.is_model(name.partition(".")[0]):
        # timm would take the name for an address on the hub and go there.
        raise ValueError("there is no such architecture")
    model = timm.create_model(name, pretrained=False, **arguments)
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    config |= {key: tuple(v) if isinstance(v, list) else v for key, v in base["config"].items()}
    model.pretrained_cfg = model.default_cfg = config
    return model


def _torchvision_candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    module = type(model).__module__
    if not module.startswith("torchvision.models"):
        return
    import torchvision

    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1:]
    classes = [m.out_features if isinstance(m, nn.Linear) else m.out_channels for m in last]
    _, height, width = input_shape(model)
    for name in torchvision.models.list_models(module=sys.modules[module]):
        for extra in ({}, {"image_size": height}) if height == width else ({},):
            yield {"host": "torchvision", "name": name, "arguments": {"num_classes": classes[0], **extra}}


def _make_torchvision(base: Mapping[str, Any]) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(base["name"], weights=None, **base["arguments"])


def _of_transformers(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "host": "transformers",
        "name": type(model).__name__,
        "config_class": type(config).__name__,
        "config": config.to_dict(),
    }


def _make_transformers(base: Mapping[str, Any]) -> nn.Module:
    import transformers

    config = getattr(transformers, base["config_class"]).from_dict(dict(base["config"]))
    return getattr(transformers, base["name"])(config)


def _quiet_build(base: Mapping[str, Any]) -> nn.Module:
    """The model of a candidate base, on the meta device: its shapes are all that is compared."""
    with torch.device("meta"):
        try:
            return build(base)
        except NotImplementedError as error:
            raise CheckpointError(str(error)) from error
