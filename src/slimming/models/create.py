"""Create dense models by name, with weights of their library, of the Hugging Face hub, or from a local file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from slimming.errors import CheckpointError, UnsupportedModelError, nearest
from slimming.models.bounds import ARGUMENT_ERRORS
from slimming.models.directories import check_strict, open_directory, replaced_note
from slimming.models.downloads import PREFIX, fetch, first_line, is_address
from slimming.models.family import ORIGIN
from slimming.models.hosts import (
    TORCHVISION,
    TRANSFORMERS,
    classes_of,
    classifiers_of,
    give_image_settings_,
    give_image_size_,
    is_hosted,
    make_torchvision,
    reset_classes_,
)
from slimming.models.weight_files import STATE_KEYS as STATE_KEYS
from slimming.models.weight_files import read_state as read_state


def create_dense(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    headless: bool = False,
) -> tuple[nn.Module, list[str]]:
    """Create a dense model with pretrained weights, which must hold every tensor of the model and no other.

    Args:
        name: a timm model name with or without tag, ``hf-hub:owner/name``, ``transformers:owner/name``,
            ``transformers:DIRECTORY`` with a config.json, or ``torchvision:name``.
        checkpoint: a ``.safetensors`` file, or a ``.pth`` file of plain tensors; None loads the pretrained weights.
        classes: number of classes; the classifier is replaced if the weights have another number. None takes the number
            of the weights.
        arguments: further arguments of the host's constructor.
        headless: take weights without a classifier although ``classes`` is not given.

    Returns:
        The model, and messages for the user about layers that were replaced.

    Raises:
        UnsupportedModelError: the host has no such model, or rejects the arguments.
        CheckpointError: the weights are missing, damaged, of another model, or not plain tensors.
    """
    options = dict(arguments or {})
    _check_name(name)
    if checkpoint is not None:
        return _from_file(name, read_state(Path(checkpoint)), checkpoint, classes, options)
    if name.startswith((TRANSFORMERS, PREFIX)):
        return open_directory(_directory(name), options, classes=classes, headless=headless)
    return (_from_torchvision if is_hosted(name) else _from_timm)(name, classes, options)


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
    if name.startswith((TRANSFORMERS, PREFIX)):
        return open_directory(_directory(name, weights=False), options, pretrained=False)[0]
    if is_hosted(name):  # not on the meta device, because it is read by running it
        return _torchvision(name, options)
    with torch.device(device):
        return _timm(name, options, pretrained=False)


def _directory(name: str, *, weights: bool = True) -> Path:
    """The directory of a model that is named by its address or, after ``transformers:``, by its path."""
    if is_address(name):
        return fetch(name, weights=weights)
    bare = name.removeprefix(TRANSFORMERS)
    if Path(bare).is_dir():
        return Path(bare)
    if bare.startswith((".", "/", "~")) or bare.count("/") > 1:
        raise CheckpointError(f"{bare!r} could not be loaded: there is no such directory. Give one with a config.json.")
    return fetch(f"{PREFIX}{bare}", weights=weights)


def _check_name(name: str) -> None:
    bare = name.partition(".")[0]
    if not is_hosted(name) and not is_address(name) and not timm.is_model(bare):
        hint = nearest(bare, timm.list_models())
        raise UnsupportedModelError(f"timm {timm.__version__} has no model {name!r}.{hint}")


def _timm(name: str, options: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    """A model of timm, with a record of how it was created, because some arguments cannot be read from a model."""
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except ARGUMENT_ERRORS as error:
        raise UnsupportedModelError(f"timm cannot make {name} with {dict(options)}: {error}") from error
    except (RuntimeError, OSError) as error:
        if not pretrained:
            raise UnsupportedModelError(f"timm cannot make {name} with {dict(options)}: {error}") from error
        raise CheckpointError(
            f"The pretrained weights of {name} could not be loaded ({first_line(error)}). "
            "Check the network, or give a local file of weights: checkpoint, as a flag --model.checkpoint FILE."
        ) from error
    model.__dict__[ORIGIN] = {"name": name, "arguments": dict(options)}
    return model


def _from_timm(name: str, classes: int | None, options: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    asked = options.pop("num_classes", None)
    classes = asked if classes is None else classes
    stored = timm.get_pretrained_cfg(name)
    if classes is None or (stored is not None and stored.num_classes == classes):
        model = _timm(name, options, pretrained=True)
        check_strict(model, name, options.get("in_chans"))
        return model, []
    # timm loads weights of another number of classes without a check of the other tensors.
    model = _timm(name, {**options, "num_classes": classes}, pretrained=False)
    dense = _timm(name, options, pretrained=True)
    check_strict(dense, name, options.get("in_chans"))
    heads = tuple(f"{head}." for head in classifiers_of(model))
    body = {key: tensor for key, tensor in dense.state_dict().items() if not key.startswith(heads)}
    _load_(model, body, name, [key for key in model.state_dict() if key.startswith(heads)])
    return model, [replaced_note(name, classes_of(dense), classes)]


def _torchvision(name: str, options: Mapping[str, Any]) -> nn.Module:
    import torchvision

    bare, options = name.removeprefix(TORCHVISION), dict(options)
    dense = [each for part in (torchvision.models.detection, torchvision.models.segmentation)
             for each in torchvision.models.list_models(module=part)]  # fmt: skip
    known = [*torchvision.models.list_models(module=torchvision.models), *dense]
    if bare not in known:
        raise UnsupportedModelError(
            f"torchvision has no classifier, detector or segmenter {bare!r}.{nearest(bare, known)}"
        )
    sides = options.pop("image_size", None) if bare in dense else None
    try:
        model: Any = make_torchvision(bare, options).eval()
        if bare in torchvision.models.list_models(module=torchvision.models.detection):  # they normalise themselves
            model.pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        if bare in dense:
            give_image_settings_(model, {"crop_pct": 1.0, "crop_mode": "squash"})
        if sides is not None:
            give_image_size_(model, sides)
        return model
    except ARGUMENT_ERRORS as error:
        raise UnsupportedModelError(
            f"torchvision cannot make {bare!r} with {dict(options)}: {first_line(error)}"
        ) from error


def _from_torchvision(name: str, classes: int | None, options: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    import torchvision

    if ".segmentation" in torchvision.models.get_model_builder(name.removeprefix(TORCHVISION)).__module__:
        options = {"aux_loss": True, **options}  # the weights have the classifier that is used in training only
    model = _torchvision(name, options)
    try:
        weights: Any = torchvision.models.get_model_weights(name.removeprefix(TORCHVISION)).DEFAULT
        state = weights.get_state_dict(check_hash=True, weights_only=True)
        # Frozen BatchNorms do not count their batches.
        counts = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
        model.load_state_dict({**counts, **state})
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"The pretrained weights of {name} could not be loaded ({first_line(error)}). Check the network, or give a "
            "local file of weights: checkpoint, as a flag --model.checkpoint FILE."
        ) from error
    known = classes_of(model)
    if classes is None or classes == known:
        return model, []
    reset_classes_(model, classes)
    return model, [replaced_note(name, known, classes)]


def _from_file(
    name: str, state: dict[str, Tensor], source: str | Path, classes: int | None, options: dict[str, Any]
) -> tuple[nn.Module, list[str]]:
    """The model with the weights of a file; a classifier of another size is replaced if ``classes`` is given."""
    asked = options.pop("num_classes", None)
    classes = asked if classes is None else classes
    model = _untrained(name, classes, options)
    own, heads = model.state_dict(), tuple(f"{head}." for head in classifiers_of(model))
    others = [
        key
        for key, tensor in state.items()
        if key.startswith(heads) and key in own and tensor.dim() and _has_other_rows(tensor, own[key])
    ]
    if not others:
        _load_(model, state, source, [])
        return model, []
    had, has = state[others[0]].shape[0], own[others[0]].shape[0]
    if classes is None:
        model = _untrained(name, had, options)
        _load_(model, state, source, [])
        return model, []
    _load_(model, {key: tensor for key, tensor in state.items() if key not in others}, source, others)
    return model, [f"{source} has a classifier for {had} classes; it was replaced by an untrained one for {has}."]


def _has_other_rows(tensor: Tensor, wanted: Tensor) -> bool:
    return tensor.shape != wanted.shape and tensor.shape[1:] == wanted.shape[1:]


def _untrained(name: str, classes: int | None, options: Mapping[str, Any]) -> nn.Module:
    if classes is None:
        return create_untrained(name, options)
    if name.startswith((TRANSFORMERS, PREFIX)):
        return open_directory(_directory(name, weights=False), options, pretrained=False, classes=classes)[0]
    if not is_hosted(name):
        return create_untrained(name, {**options, "num_classes": classes})
    model = create_untrained(name, options)
    if classes_of(model) != classes:
        reset_classes_(model, classes)
    return model


def _load_(model: nn.Module, state: Mapping[str, Tensor], source: str | Path, replaced: list[str]) -> None:
    """Load ``state``, which must hold all tensors of ``model`` but those in ``replaced``.

    Raises:
        CheckpointError: it lacks a tensor, or holds another one, or one of another shape.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state and key not in replaced]
    unexpected = [key for key in state if key not in own]
    shapes = [key for key in state if key in own and state[key].shape != own[key].shape]
    if missing or unexpected or shapes:
        first = (shapes or missing or unexpected)[0]
        what = "has another shape" if shapes else "is missing" if missing else "is unknown to the model"
        raise CheckpointError(
            f"{source} is of another model: {first!r} {what} ({len(missing)} missing, {len(unexpected)} unknown, "
            f"{len(shapes)} of another shape). Check the model name and its arguments (image size, patch size)."
        )
    model.load_state_dict(state, strict=False)
