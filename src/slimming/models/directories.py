"""Read directories with a config.json, as timm, transformers and slimming write them, and make models from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from slimming.core.records import FileKind
from slimming.core.structure import Structure
from slimming.errors import CheckpointError, UnsupportedModelError, nearest
from slimming.models.families import build_filled
from slimming.models.family import ORIGIN
from slimming.models.hosts import TRANSFORMERS, classes_of, make
from slimming.models.prunable import read

CONFIG, HOST_WEIGHTS = "config.json", "model.safetensors"
CONFIG_FILE = FileKind(
    name="the config.json of timm or transformers", schema=dict[str, Any], sealed=False, numbered=False
)
MODEL_TYPE = "slimming"
"""Name of slim models in timm's registry, and their model type in transformers."""
INNER = "model"
"""Attribute of the transformers model that holds the slim model."""
TIMM_FIELDS = (
    *("mean", "std", "interpolation", "crop_pct", "crop_mode", "fixed_input_size"),
    *("first_conv", "classifier", "label_names", "license"),
)


def read_config(path: Path) -> dict[str, Any]:
    """The content of ``config.json`` in the directory ``path``.

    Raises:
        CheckpointError: the file is missing, damaged or too large.
    """
    return CONFIG_FILE.read(path / CONFIG)


def structure_in(config: Mapping[str, Any]) -> Structure | None:
    """The structure in the content of a config.json; None if it is not the config.json of a slim model.

    Raises:
        CheckpointError: the structure is damaged.
    """
    if MODEL_TYPE not in (config.get("model_type"), config.get("architecture")):
        return None
    arguments = config.get("model_args")
    return Structure.from_dict(arguments.get("structure") if isinstance(arguments, dict) else None, source=CONFIG)


def timm_config(model: nn.Module) -> dict[str, Any]:
    """The pretrained configuration of ``model`` in timm's format, without the source of its weights."""
    stored = getattr(model, "pretrained_cfg", None) or {}
    config = {key: stored[key] for key in TIMM_FIELDS if stored.get(key) is not None}
    shape, classes = read(model).anatomy.input_shape, classes_of(model)
    for key in ("mean", "std"):  # models for grey-scale images may still have three values
        if key in config and len(config[key]) != shape[0]:
            config[key] = (sum(config[key]) / len(config[key]),) * shape[0]
    if len(config.get("label_names") or ()) != classes:
        config.pop("label_names", None)
    return {**config, "input_size": shape, "num_classes": classes}


def unprefixed(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict with the names of ``model``, without the prefix that transformers saves it with."""
    own = model.state_dict().keys()
    if state and not own & state.keys() and all(name.startswith(f"{INNER}.") for name in state):
        return {name.removeprefix(f"{INNER}."): tensor for name, tensor in state.items()}
    return dict(state)


def open_directory(
    path: Path, arguments: Mapping[str, Any] | None = None, *, pretrained: bool = True, classes: int | None = None
) -> nn.Module:
    """Make the model in a directory of timm or transformers, or a slim model without its weights.

    Args:
        path: directory with config.json, and with weights as safetensors if ``pretrained``.
        arguments: further arguments of the host's constructor.
        pretrained: load the weights; otherwise weights are random.
        classes: number of classes; if the model has another number, its classifier is replaced by an untrained one.

    Raises:
        CheckpointError: a file is missing or damaged.
        UnsupportedModelError: the host has no such model, or rejects the arguments.
    """
    config, options = read_config(path), dict(arguments or {})
    structure = structure_in(config)
    if structure is not None and not pretrained and not options:
        return build_filled(structure)
    if pretrained and not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path} has no {HOST_WEIGHTS}; weights in other formats are not read from a directory.")
    if "architecture" in config:
        return _from_timm(path, config, options, pretrained, classes)
    if "model_type" in config:
        return make(f"{TRANSFORMERS}{path}", options, pretrained=pretrained, classes=classes)
    raise CheckpointError(f"{path / CONFIG} names neither timm's architecture nor transformers' model_type.")


def _from_timm(
    path: Path, config: Mapping[str, Any], options: dict[str, Any], pretrained: bool, classes: int | None
) -> nn.Module:
    import timm

    name = str(config["architecture"])
    if not timm.is_model(name):
        raise UnsupportedModelError(
            f"timm {timm.__version__} has no model {name!r}, which {path / CONFIG} names."
            f"{nearest(name, timm.list_models())} Install the version of timm that wrote it."
        )
    if classes is not None:
        options["num_classes"] = classes
    overlay = dict(options.get("pretrained_cfg_overlay") or {})
    if pretrained:  # timm may prefer pickles, and before 1.0.26 it opens some safetensors as pickles
        weights = min(path.glob("*.safetensors"), key=lambda file: (file.name != HOST_WEIGHTS, file.name))
        overlay |= {"source": "", "file": str(weights), "custom_load": False}
    try:
        model = timm.create_model(
            f"local-dir:{path}", pretrained=pretrained, **{**options, "pretrained_cfg_overlay": overlay}
        )
    except (TypeError, AssertionError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"timm cannot make the {name} in {path} with {options}: {error}") from error
    except (RuntimeError, OSError, SafetensorError) as error:
        raise CheckpointError(f"The weights in {path} are damaged or of another model than {name}: {error}") from error
    if name != MODEL_TYPE:
        model.__dict__[ORIGIN] = {"name": name, "arguments": {**(config.get("model_args") or {}), **options}}
    return model
