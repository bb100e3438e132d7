"""Read directories with a config.json, as timm, transformers and slimming write them, and make models from them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from slimming.core.files import atomic_json
from slimming.core.records import FileKind
from slimming.core.structure import IN_CONFIG, Structure
from slimming.errors import CheckpointError, MissingExtraError, UnsupportedModelError, nearest
from slimming.models.allowed import (
    check_timm,
    config_fields,
    image_settings_of,
    timm_has,
    timm_settings,
    transformers_config,
)
from slimming.models.bounds import ARGUMENT_ERRORS, bounded_building
from slimming.models.downloads import first_line
from slimming.models.families import build_filled
from slimming.models.family import ORIGIN
from slimming.models.hosts import classes_of, classifiers_of, give_image_size_, reset_classes_, unplain
from slimming.models.prunable import read
from slimming.models.transformers_tasks import CLASSIFICATION, class_in, processed_images, task_of_class
from slimming.models.weight_files import HOST_WEIGHTS, read_directory, weight_files

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
CONFIG_FILE = FileKind(
    name="the config.json of timm or transformers", schema=dict[str, Any], sealed=False, numbered=False
)
PROCESSOR_FILE = FileKind(
    name="the preprocessor_config.json of transformers", schema=dict[str, Any], sealed=False, numbered=False
)
MODEL_TYPE = "slimming"
"""Name of slim models in timm's registry, and their model type in transformers."""
INNER = "model"
"""Attribute of the transformers model that holds the slim model."""
SLIM_FIELDS = (
    *("model_args", "architecture", "pretrained_cfg", "num_classes", "num_features", "num_channels", "image_size"),
    "image_processor_type",
)
"""Entries in the config.json of a slim model for timm and for reading it again; transformers passes none of them on."""
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
    return IN_CONFIG.check(arguments.get("structure") if isinstance(arguments, Mapping) else None, CONFIG)


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
    path: Path,
    arguments: Mapping[str, Any] | None = None,
    *,
    pretrained: bool = True,
    classes: int | None = None,
    headless: bool = False,
) -> tuple[nn.Module, list[str]]:
    """Make the model in a directory of timm or transformers, or a slim model without its weights.

    Of the configuration, only what `slimming.models.allowed` lists is passed to the host. The weights are read from
    safetensors files, and must hold every tensor of the model and no other.

    Args:
        path: directory with config.json, and with weights as safetensors if ``pretrained``.
        arguments: further arguments of the host's constructor.
        pretrained: load the weights; otherwise weights are random.
        classes: number of classes; if the model has another number, its classifier is replaced by an untrained one.
            The weights may lack the classifier then.
        headless: take weights without a classifier although ``classes`` is not given.

    Returns:
        The model, and messages for the user about an untrained classifier.

    Raises:
        CheckpointError: a file is missing, damaged or outside of the directory, the configuration names files or code,
            or the weights lack a tensor or hold another one.
        UnsupportedModelError: the host has no such model, or rejects the arguments.
    """
    config, options = read_config(path), dict(arguments or {})
    structure = structure_in(config)
    with bounded_building():
        if structure is not None and not pretrained and not options:
            model, notes = build_filled(structure), []
        elif "architecture" in config:
            if (asked := options.pop("num_classes", None)) is not None:
                classes = asked if classes is None else classes
            model, notes = _from_timm(path, config, options, pretrained), []
        elif "model_type" in config:
            lenient = headless or classes is not None
            model, notes = from_transformers(path, config, options, pretrained=pretrained, headless=lenient)
        else:
            raise CheckpointError(f"{path / CONFIG} names neither timm's architecture nor transformers' model_type.")
    known = classes_of(model)
    if classes is not None and (known != classes or notes):
        reset_classes_(model, classes)
        notes = notes or [replaced_note(str(path), known, classes)]
    return model, notes


def replaced_note(name: str, known: int, classes: int) -> str:
    """A message for the user about a classifier that was replaced."""
    return f"{name} has {known} classes; its classifier was replaced by an untrained one for {classes}."


def _from_timm(path: Path, config: Mapping[str, Any], options: dict[str, Any], pretrained: bool) -> nn.Module:
    import timm

    name, safe = str(config["architecture"]), _safe_timm_config(config, path)
    overlay = dict(options.get("pretrained_cfg_overlay") or {})
    if pretrained:
        (file,) = _single_file(path)
        overlay |= {"source": "", "file": str(file), "custom_load": False}
    with tempfile.TemporaryDirectory() as directory:
        atomic_json(Path(directory) / CONFIG, safe)
        try:
            model: Any = timm.create_model(
                f"local-dir:{directory}", pretrained=pretrained, **{**options, "pretrained_cfg_overlay": overlay}
            )
        except ARGUMENT_ERRORS as error:
            raise UnsupportedModelError(f"timm cannot make the {name} in {path} with {options}: {error}") from error
        except (RuntimeError, OSError, SafetensorError) as error:
            raise CheckpointError(
                f"The weights in {path} are damaged or of another model than {name}: {error}"
            ) from error
    if pretrained:
        check_strict(model, str(path), options.get("in_chans"))
    model.pretrained_cfg = {**model.pretrained_cfg, "file": None, "source": None}
    if name != MODEL_TYPE:
        model.__dict__[ORIGIN] = {"name": name, "arguments": {**safe["model_args"], **options}}
    return model


def _single_file(path: Path) -> list[Path]:
    files = weight_files(path)
    if len(files) != 1:
        raise CheckpointError(f"{path} holds weights of timm in {len(files)} files; timm reads one, {HOST_WEIGHTS}.")
    return files


def check_strict(model: Any, source: str, channels: int | None = None) -> None:
    """Check that timm loaded every tensor of ``model``.

    timm tolerates missing tensors if the model has another number of classes than its configuration, or a first layer
    that it cannot adapt to another number of channels.

    Args:
        model: the model that timm loaded.
        source: its name, for messages.
        channels: channels of images that the user asked for.

    Raises:
        CheckpointError: timm may have left tensors untrained.
    """
    config = model.pretrained_cfg
    known, wanted = config.get("num_classes"), getattr(model, "num_classes", None)
    if config.get("classifier") and known != wanted:
        raise CheckpointError(
            f"The configuration of {source} names {known} classes, but its arguments make a model for {wanted}, whose "
            "classifier would stay untrained. Correct the configuration."
        )
    first = config.get("first_conv")
    for name in [first] if isinstance(first, str) else first or ():
        adapted = channels not in (None, (config.get("input_size") or (3,))[0])
        if adapted and not isinstance(model.get_submodule(name), nn.Conv2d):
            raise CheckpointError(
                f"timm cannot adapt the weights of {name!r} in {source} to {channels} channels. Leave out in_chans."
            )


def _safe_timm_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The part of a config.json of timm that is passed on, see `slimming.models.allowed`."""
    name, arguments = config["architecture"], config.get("model_args") or {}
    if structure_in(config) is not None:
        arguments = {"structure": arguments["structure"]}
    elif not isinstance(name, str) or not timm_has(name):
        raise _unknown(name, path)
    else:
        check_timm(name, arguments)
    settings = timm_settings(config.get("pretrained_cfg", config))  # earlier versions of timm have one level
    safe: dict[str, Any] = {
        "architecture": name,
        "model_args": dict(arguments),
        "pretrained_cfg": settings,
    }
    safe |= {key: value for key, value in timm_settings(config).items() if key in ("num_classes", "label_names")}
    return safe


def _unknown(name: Any, path: Path) -> UnsupportedModelError:
    import timm

    hint = nearest(str(name), timm.list_models())
    return UnsupportedModelError(
        f"timm {timm.__version__} has no model {name!r}, which {path / CONFIG} names.{hint} Install the version of "
        "timm that wrote it."
    )


def from_transformers(
    path: Path, config: Mapping[str, Any], options: Mapping[str, Any], *, pretrained: bool, headless: bool = False
) -> tuple[nn.Module, list[str]]:
    """Make the model in a directory of transformers; transformers itself opens no file of it.

    Args:
        path: the directory.
        config: content of its config.json.
        options: fields of the configuration that the user changes; the dtype, by default float32; and ``image_size`` in
            pixels for models of any size, such as detectors.
        pretrained: load the weights; otherwise weights are random.
        headless: the weights may lack the classifier.

    Returns:
        The model in evaluation mode, and messages for the user about an untrained classifier.

    Raises:
        CheckpointError: the configuration or the weights are damaged, of another model, or name files or code.
        UnsupportedModelError: transformers has no such model, or rejects an argument.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "Models of transformers need an extra: pip install 'slimming[transformers]'."
        ) from error
    kind, options = config.get("model_type"), dict(options)
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no model type {kind!r}, which {path / CONFIG} names."
        )
    config_class: Any = transformers.CONFIG_MAPPING[kind]
    dtype = options.pop("dtype", torch.float32)  # files in half precision are not suited to training
    ours = SLIM_FIELDS if structure_in(config) is not None else ()
    rest = {key: value for key, value in config.items() if key not in ours}
    fields = transformers_config(config_class, rest, where=str(path / CONFIG))
    fields |= {key: config[key] for key in ours if key in config}
    cls = class_in(config_class, config.get("architectures"), kind, where=str(path / CONFIG))
    classifies = task_of_class(cls) in (None, CLASSIFICATION)
    sides = options.pop("image_size", None) if "image_size" not in config_fields(config_class) else None
    try:
        settings, unknown = config_class.from_dict(fields, return_unused_kwargs=True, **options)
        if unknown:
            raise TypeError(f"{config_class.__name__} has no fields {', '.join(unknown)}")
        if not pretrained:
            model, notes = cls._from_config(settings, dtype=dtype), []
        else:
            loaded: Any = cls.from_pretrained(
                None, config=settings, state_dict=read_directory(path), dtype=dtype, output_loading_info=True
            )
            model, notes = loaded[0], _differences(loaded[0], loaded[1], path, headless and classifies)
    except ARGUMENT_ERRORS as error:
        raise UnsupportedModelError(f"transformers cannot make {path} with {options}: {first_line(error)}") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"The weights in {path} are of another model than its config.json: {error}") from error
    images = PROCESSOR_FILE.read(path / PROCESSOR) if (path / PROCESSOR).exists() else {}
    model.pretrained_cfg = unplain(image_settings_of(processed_images(images, whole=not classifies)))
    if sides is not None:
        give_image_size_(model, sides)
    return model.eval(), notes


def _differences(model: nn.Module, info: Mapping[str, Any], path: Path, headless: bool) -> list[str]:
    """Messages about a classifier that the weights lack.

    Raises:
        CheckpointError: the weights lack other tensors, or hold other ones.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    wrong = [str(entry[0] if isinstance(entry, (tuple, list)) else entry) for entry in info["mismatched_keys"]]
    heads = tuple(f"{name}." for name in classifiers_of(model))
    lacks_head = bool(missing) and all(name.startswith(heads) for name in missing) and not wrong
    # Weights of a pretraining task come with heads of their own, which the classifier has no modules for.
    modules = {name.partition(".")[0] for name in model.state_dict()}
    inner = getattr(model, "base_model_prefix", "")
    inner_modules = {name.split(".")[1] for name in model.state_dict() if name.startswith(f"{inner}.")}
    others = [name for name in unexpected if _top(name, inner) not in modules | inner_modules]
    if lacks_head and headless and others == unexpected:
        return [f"{path} has no classifier; it gets an untrained one."]
    if missing or wrong or unexpected:
        first = (wrong or missing or unexpected)[0]
        what = "has another shape" if wrong else "is missing" if missing else "is unknown to the model"
        hint = " Give the number of classes to train a new classifier." if lacks_head else " Take an intact copy."
        raise CheckpointError(
            f"The weights in {path} are not those of its config.json: {first!r} {what} ({len(missing)} missing, "
            f"{len(unexpected)} unknown, {len(wrong)} of another shape).{hint}"
        )
    return []


def _top(name: str, prefix: str) -> str:
    return name.removeprefix(f"{prefix}.").partition(".")[0]
