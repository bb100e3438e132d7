"""Slim models for the hub: the files that slimming, timm and transformers load, a model card, and the transfer."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from slimming.checkpoints import checkpoint, hub
from slimming.core.files import FORMAT, atomic_directory, atomic_json, atomic_write_bytes, atomic_write_text, seal
from slimming.errors import CheckpointError, ConfigError, MissingExtraError, OutputError, PlanError
from slimming.masks.attachment import prunable
from slimming.masks.soft_masks import attached
from slimming.models import build_filled
from slimming.models.directories import CONFIG, HOST_WEIGHTS, INNER, MODEL_TYPE, timm_config
from slimming.models.hosts import classes_of
from slimming.models.prunable import PrunableModel
from slimming.pruning.costs import cost_of
from slimming.publishing.card import PICTURE, card
from slimming.report.picture import draw, panels
from slimming.runs.results import grid_of, plain, versions

RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
PROCESSOR = "CLIPImageProcessor"
"""Resizes the shorter side, crops the centre, normalises: what timm's evaluation does, whatever the model."""
CARD, IMAGES = "README.md", "preprocessor_config.json"


def push_to_hub(
    source: nn.Module | str | Path,
    repository: str | None = None,
    *,
    to: str | Path | None = None,
    private: bool = False,
    license: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Put a model on the Hugging Face hub, or write what would be put there to a directory.

    Args:
        source: a model without masks, or the directory of one that slimming saved.
        repository: ``owner/name``; it is made if it is not there. Without ``to`` it is needed.
        to: an empty or new directory that the files are written to; nothing is sent then.
        private: make a new repository private.
        license: for the card, as the hub names it (``apache-2.0``); the weights' own, which slimming cannot know.
        provenance: where a model given as such comes from; a directory has its own.

    Returns:
        The address of the commit, or the directory.

    Raises:
        ConfigError: neither a repository nor a directory is given, or the name is malformed.
        CheckpointError: the directory is no checkpoint, or of a model that no host makes by name.
        PlanError: the model has masks attached.
        OutputError: the place is occupied or not writable; nobody is logged in, or the hub cannot be reached.

    >>> import timm, tempfile, slimming
    >>> model = timm.create_model("test_vit", num_classes=10)
    >>> slimming.register_with_timm()
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     written = slimming.push_to_hub(model, "owner/name", to=directory + "/new")
    ...     type(timm.create_model(f"local-dir:{written}", pretrained=True)).__name__
    'VisionTransformer'
    """
    if repository is not None:
        hub.check_name(repository)
    elif to is None:
        raise ConfigError("Give the repository, OWNER/NAME, or a directory to write to (to=…, --to DIRECTORY).")
    record = dict(provenance or {})
    if isinstance(source, nn.Module):
        model = source
    else:
        model = checkpoint.load(source)
        place = hub.fetch(str(source), weights=False) if hub.is_address(source) else Path(source)
        if (place / checkpoint.PROVENANCE).exists():
            record = {**checkpoint.read_provenance(place), **record}
    record.pop("format", None)
    checkpoint.check_provenance(record)
    if to is not None:
        return str(_write(model, Path(to), repository, license, record))
    assert repository is not None
    with tempfile.TemporaryDirectory() as temporary:
        directory = _write(model, Path(temporary) / "model", repository, license, record)
        return hub.upload(directory, repository, private=private, message="A model of slimming")


def _write(
    model: nn.Module, directory: Path, repository: str | None, license: str | None, record: dict[str, Any]
) -> Path:
    """Write all files into ``directory``, whole or not at all."""
    if attached(model) is not None:
        raise PlanError("The model has masks attached; cut it, and push the result.")
    read = prunable(model)
    anatomy, structure = read.anatomy, read.anatomy.structure
    if structure.base.get("host") == "own":
        raise CheckpointError(
            f"This {type(model).__name__} is made by no host by name ({structure.base.get('why')}), so nobody could "
            "load it from the hub by name. Share the directory of slimming.save, and load it with dense=model."
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputError(f"{directory} is not empty; give another directory, or remove this one first.")
    dense = build_filled(structure, dense=True).to(next(model.parameters()).dtype)
    record = _without_places({**record, "versions": record.get("versions", versions())})
    whole = prunable(dense)
    pictures = panels(whole.anatomy, anatomy)
    text = card(
        record,
        structure,
        {"dense": cost_of(whole), "this model": cost_of(read)},
        classes=classes_of(model),
        repository=repository,
        license=license,
        picture=bool(pictures),
    )
    rows, columns = grid_of(whole.anatomy)
    config, images = host_config(read), image_processor(read)
    with atomic_directory(directory) as partial:
        weights = partial / HOST_WEIGHTS
        checkpoint.write_tensors(weights, checkpoint.untied(model.state_dict()), {"format": "pt"})
        sealed = seal({**structure.to_dict(), "weights_sha256": checkpoint.sha256(weights)})
        atomic_json(partial / checkpoint.STRUCTURE, sealed)
        atomic_json(partial / checkpoint.PROVENANCE, seal({"format": FORMAT, **record}))
        atomic_json(partial / CONFIG, config)
        if images is not None:
            atomic_json(partial / IMAGES, images)
        if pictures:
            atomic_write_bytes(partial / PICTURE, draw(pictures, (rows, columns)))
        atomic_write_text(partial / CARD, text)
    return directory


def host_config(prunable: PrunableModel) -> dict[str, Any]:
    """The config.json of ``model`` for timm (where it is timm's) and transformers alike; both read the structure."""
    model, anatomy = prunable.model, prunable.anatomy
    settings = plain(timm_config(model))
    structure = anatomy.structure.to_dict()
    channels, *size = anatomy.input_shape
    classes = classes_of(model)
    names = settings.get("label_names") or [f"LABEL_{label}" for label in range(classes)]
    config: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": ["SlimmingForImageClassification"],
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "num_channels": channels,
        "image_size": size,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        "model_args": {"structure": structure},
    }
    if structure["base"].get("host", "timm") == "timm":
        config |= {"architecture": MODEL_TYPE, "num_classes": classes, "pretrained_cfg": settings}
        # Where transformers meets timm's entries, it looks for this here and not in preprocessor_config.json.
        config["image_processor_type"] = PROCESSOR
        if isinstance(features := getattr(model, "num_features", None), int):
            config["num_features"] = features
    return config


def image_processor(prunable: PrunableModel) -> dict[str, Any] | None:
    """What transformers' image processor needs to do as timm's evaluation does; None where it cannot.

    It takes 1 or 3 channels, and pads nothing.
    """
    from slimming.training.images import ImageSpec

    channels, height, width = prunable.anatomy.input_shape
    if channels not in (1, 3):
        return None
    spec = ImageSpec.of_model(prunable.model)
    if spec.crop_mode == "border":
        return None
    scaled = {"height": int(height / spec.crop_pct), "width": int(width / spec.crop_pct)}
    return {
        "image_processor_type": PROCESSOR,
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": scaled if spec.crop_mode == "squash" else {"shortest_edge": min(scaled.values())},
        "resample": RESAMPLING.get(spec.interpolation, RESAMPLING["bicubic"]),
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def as_transformers(model: nn.Module) -> nn.Module:
    """Wrap a slim model as a `PreTrainedModel`, as `AutoModelForImageClassification` would load it.

    Its parameters are those of ``model``, which is its attribute ``model``; ``save_pretrained`` and ``Trainer`` work.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    register_with_transformers()
    from slimming.models import transformers_entry as entry

    config = entry.SlimmingConfig.from_dict(host_config(prunable(model)))
    wrapped = entry.SlimmingForImageClassification(config, model)
    assert getattr(wrapped, INNER) is model
    return wrapped


def register_with_timm() -> None:
    """Add the architecture ``slimming`` to timm's registry, so that `timm.create_model` loads slim models.

    >>> import timm, slimming
    >>> slimming.register_with_timm()
    >>> timm.is_model("slimming")
    True
    """
    from slimming.models import timm_entry

    timm_entry.register()


def register_with_transformers() -> None:
    """Let transformers' ``AutoConfig``, ``AutoModelForImageClassification`` and ``pipeline`` know slim models.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from slimming.models import transformers_entry as transformers_entry
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingExtraError("This needs an extra: pip install 'slimming[transformers]'.") from error


def _without_places(value: Any) -> Any:
    """A record without the directories of the machine that it was made on: the last part of a path stays."""
    if isinstance(value, dict):
        return {key: _without_places(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_places(entry) for entry in value]
    absolute = isinstance(value, str) and re.match(r"(/|~|[A-Za-z]:[\\/])\S*", value)
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1] if absolute else value
