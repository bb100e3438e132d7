"""Create dense models by name, with weights from the Hugging Face hub or a local file of plain tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from slimming.errors import CheckpointError, UnsupportedModelError, nearest
from slimming.models.family import ORIGIN
from slimming.models.hosts import classes_of, classifier_of, is_hosted, make, reset_classes_

STATE_KEYS = ("state_dict", "model", "module", "state_dict_ema", "model_ema")
"""Keys of the state dict in files that training scripts write."""


def create_dense(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, list[str]]:
    """Create a dense model with pretrained weights.

    Args:
        name: a timm model name with or without tag, ``hf-hub:owner/name``, or a name with prefix for `hosts.make`.
        checkpoint: a ``.safetensors`` file, or a ``.pth`` file of plain tensors; None loads the pretrained weights.
        classes: number of classes; the classifier is replaced if the weights have another number.
        arguments: further arguments of the host's constructor.

    Returns:
        The model, and messages for the user about layers that were replaced.

    Raises:
        UnsupportedModelError: the host has no such model, or rejects the arguments.
        CheckpointError: the weights are missing, damaged, of another model, or not plain tensors.
    """
    options = dict(arguments or {})
    _check_name(name)
    if checkpoint is None:
        return _from_host(name, classes, options) if is_hosted(name) else _from_hub(name, classes, options)
    state = read_state(Path(checkpoint))
    if is_hosted(name):
        model = make(name, options, pretrained=False, classes=classes)
    else:
        model = create_untrained(name, options if classes is None else {**options, "num_classes": classes})
    notes = _load_(model, state, checkpoint)
    return model, notes


def create_untrained(
    name: str, arguments: Mapping[str, Any] | None = None, *, device: str | torch.device = "cpu"
) -> nn.Module:
    """Create a dense model with random weights, or without weights on the ``"meta"`` device.

    Raises:
        UnsupportedModelError: the host has no such model, or rejects the arguments.
        CheckpointError: the configuration of the model could not be fetched.
    """
    _check_name(name)
    options = dict(arguments or {})
    if is_hosted(name):  # not on the meta device, because it is read by running it
        return make(name, options, pretrained=False)
    try:
        with torch.device(device):
            return _with_origin(timm.create_model(name, pretrained=False, **options), name, options)
    except (TypeError, AssertionError, KeyError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise UnsupportedModelError(f"timm cannot make {name} with {options}: {error}") from error
    except OSError as error:
        raise CheckpointError(
            f"{name} could not be fetched ({str(error).splitlines()[0]}). Check the network."
        ) from error


def _with_origin(model: nn.Module, name: str, options: Mapping[str, Any]) -> nn.Module:
    """``model`` with a record of how it was created, because some arguments cannot be read from a model."""
    model.__dict__[ORIGIN] = {"name": name, "arguments": dict(options)}
    return model


def _check_name(name: str) -> None:
    bare = name.partition(".")[0]
    if not is_hosted(name) and not name.startswith("hf-hub:") and not timm.is_model(bare):
        hint = nearest(bare, timm.list_models())
        raise UnsupportedModelError(f"timm {timm.__version__} has no model {name!r}.{hint}")


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict of plain tensors.

    Raises:
        CheckpointError: the file is missing or damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file. Give a .safetensors file or a .pth of plain tensors.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickles before it rejects them
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        called = re.search(r"(?:GLOBAL|global) ([\w.]+\.\w+)", str(error))
        what = f": it names {called[1]}" if called else ""
        raise CheckpointError(
            f"{path} is a pickle of more than plain tensors, which is never executed{what}. "
            "Save model.state_dict() with safetensors instead."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {str(error).splitlines()[0]}") from error
    for key in STATE_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict of tensors.")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path} holds {key!r}, a {type(value).__name__}; only plain tensors are taken.")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _from_hub(name: str, classes: int | None, options: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    if classes is not None:
        options["num_classes"] = classes
    try:
        model = timm.create_model(name, pretrained=True, **options)
    except (TypeError, AssertionError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"timm cannot make {name} with {options}: {error}") from error
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"The pretrained weights of {name} could not be loaded ({str(error).splitlines()[0]}). "
            "Check the network, or give a local file of weights: checkpoint, as a flag --model.checkpoint FILE."
        ) from error
    _with_origin(model, name, options)
    known = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if classes is not None and known is not None and known != classes:
        return model, [f"{name} was pretrained for {known} classes; its classifier was replaced by one for {classes}."]
    return model, []


def _from_host(name: str, classes: int | None, options: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    known = classes_of(model := make(name, options, pretrained=True))
    if classes is None or classes == known:
        return model, []
    reset_classes_(model, classes)
    return model, [f"{name} was pretrained for {known} classes; its classifier was replaced by one for {classes}."]


def _load_(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> list[str]:
    """Load ``state`` except a classifier with another number of classes, and return messages about it."""
    own = model.state_dict()
    heads = tuple(f"{head}." for head in _classifiers(model))
    replaced = [key for key in state if key.startswith(heads) and key in own and state[key].shape != own[key].shape]
    rest = {key: tensor for key, tensor in state.items() if key not in replaced}
    missing = [key for key in own if key not in rest and key not in replaced]
    unexpected = [key for key in rest if key not in own]
    shapes = [key for key in rest if key in own and rest[key].shape != own[key].shape]
    if missing or unexpected or shapes:
        first = (shapes or missing or unexpected)[0]
        what = "has another shape" if shapes else "is missing" if missing else "is unknown to the model"
        raise CheckpointError(
            f"{source} is of another model: {first!r} {what} ({len(missing)} missing, {len(unexpected)} unknown, "
            f"{len(shapes)} of another shape). Check the model name and its arguments (image size, patch size)."
        )
    model.load_state_dict(rest, strict=False)
    if not replaced:
        return []
    had, has = state[replaced[0]].shape[0], own[replaced[0]].shape[0]
    return [f"{source} has a classifier for {had} classes; it was replaced by an untrained one for {has}."]


def _classifiers(model: nn.Module) -> list[str]:
    """Names of the classifier modules: those in timm's configuration, or the last layer of models of other hosts."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or classifier_of(model) or "head"
    return [names] if isinstance(names, str) else list(names)
