"""Publish models on the Hugging Face hub, in a form that slimming, timm and transformers load, with a model card."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from slimming.checkpoints import checkpoint, hub
from slimming.checkpoints.proof import recorded
from slimming.core.argument_types import checked_arguments
from slimming.core.files import (
    atomic_directory,
    atomic_json,
    atomic_write_bytes,
    atomic_write_text,
    check_free,
    json_values,
    seal,
)
from slimming.core.groups import Anatomy
from slimming.core.plain_text import without_places
from slimming.core.structure import STRUCTURE, Structure
from slimming.errors import CheckpointError, ConfigError, MissingExtraError, PlanError, UnsupportedModelError
from slimming.masks.attachment import prunable
from slimming.masks.soft_masks import attached
from slimming.models.directories import CONFIG, INNER, MODEL_TYPE, timm_config
from slimming.models.families import build_filled
from slimming.models.hosts import classes_of
from slimming.models.prunable import PrunableModel
from slimming.models.transformers_tasks import CLASSIFICATION, task_of
from slimming.models.weight_files import HOST_WEIGHTS
from slimming.pruning.costs import cost_of
from slimming.publishing.card import PICTURE, card
from slimming.report import kept_picture
from slimming.report.model import Head, Kept, Layer, Tokens, Width, labelled
from slimming.runs.results import grid_of, versions

RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
PROCESSOR = "CLIPImageProcessor"
"""Image processor that resizes the shorter side, crops the centre and normalises, as timm's evaluation does."""
CARD, IMAGES = "README.md", "preprocessor_config.json"


@checked_arguments
def push_to_hub(
    source: nn.Module | str | Path,
    repository: str | None = None,
    *,
    to: str | Path | None = None,
    private: bool = False,
    license: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Upload a model to the Hugging Face hub, or write the files to a directory.

    Args:
        source: a model without masks, or the directory of a model that slimming saved.
        repository: ``owner/name``, which is created if it does not exist; required without ``to``.
        to: a directory, empty or new, to which the files are written instead of being uploaded.
        private: whether a new repository is private.
        license: license of the weights for the model card, in the hub's notation (``apache-2.0``).
        provenance: origin of a model that is given as a module; a directory contains its provenance.

    Returns:
        The URL of the commit, or the directory.

    Raises:
        ConfigError: neither a repository nor a directory is given, or the name is malformed.
        CheckpointError: the directory is not a checkpoint, or is of a model that no library creates by name.
        PlanError: the model has masks attached.
        OutputError: the directory is not empty or not writable, no user is logged in, or the hub cannot be reached.

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
        return hub.upload(directory, repository, private=private, message="Upload a model of slimming")


def _write(
    model: nn.Module, directory: Path, repository: str | None, license: str | None, record: dict[str, Any]
) -> Path:
    """Write all files atomically into ``directory``."""
    if attached(model) is not None:
        raise PlanError("The model has masks attached; cut it, and push the result.")
    read = prunable(model)
    anatomy, structure = read.anatomy, recorded(model, read.anatomy.structure)
    if structure.base.get("host") == "own":
        raise CheckpointError(
            f"This {type(model).__name__} cannot be created by name ({structure.base.get('why')}), and so cannot be "
            "loaded from the hub. Share the directory of slimming.save, and load it with dense=model."
        )
    check_free(directory)
    dense = build_filled(structure, dense=True).to(next(model.parameters()).dtype)
    record = without_places({**record, "versions": record.get("versions", versions())})
    whole = prunable(dense)
    picture = kept_picture(*kept_of(whole.anatomy, anatomy))
    text = card(
        record,
        structure,
        {"dense": cost_of(whole), "this model": cost_of(read)},
        classes=classes_of(model),
        repository=repository,
        license=license,
        picture=picture is not None,
    )
    config, images = host_config(read, structure), image_processor(read)
    with atomic_directory(directory) as partial:
        weights = partial / HOST_WEIGHTS
        metadata = {"format": "pt", **checkpoint.memory_format_of(model)}
        checkpoint.write_tensors(weights, checkpoint.untied(model.state_dict()), metadata)
        digest = checkpoint.sha256(weights)
        STRUCTURE.write(partial / checkpoint.STRUCTURE, {**structure.to_dict(), "weights_sha256": digest})
        checkpoint.PROVENANCE_FILE.write(partial / checkpoint.PROVENANCE, record)
        atomic_json(partial / CONFIG, config)
        if images is not None:
            atomic_json(partial / IMAGES, images)
        if picture is not None:
            atomic_write_bytes(partial / PICTURE, picture)
        atomic_write_text(partial / CARD, text)
    return directory


def kept_of(dense: Anatomy, slim: Anatomy) -> tuple[tuple[Layer, ...], tuple[Width, ...]]:
    """Return the units of ``dense`` that ``slim`` keeps, by layer, and the kept embedding widths."""
    left, rows = {group.name: group for group in slim.groups}, grid_of(dense)
    with_dimensions = {group.site for group in dense.groups if group.kind == "head_dim"}
    layers: dict[str, dict[str, Any]] = {}
    widths = []
    for group in dense.groups:
        here = left.get(group.name)
        place = group.site or group.name
        layer = layers.setdefault(".".join(re.findall(r"\d+", place)) or place, {})
        kept = here.size if here is not None else 0
        if group.role in ("qk", "v"):
            layer["heads"] = (replace(layer.get("heads", (Head(of=group.size),))[0], **{group.role: kept}),)
        elif group.kind in ("mlp", "channel"):
            layer["mlp" if group.kind == "mlp" else "channels"] = Kept(kept=kept, of=group.size)
        elif group.kind == "head" and group.site not in with_dimensions:
            layer["whole_heads"] = Kept(kept=kept, of=group.size)
        elif group.kind == "width":
            widths.append(Width(name=group.name, kept=kept, of=group.size))
        elif group.token is not None:
            positions = here.token.positions if here is not None and here.token is not None else ()
            layer["tokens"] = Tokens(grid=(rows[0], rows[1]), kept=frozenset(positions))
    return labelled([Layer(name=name, **layer) for name, layer in layers.items() if layer]), tuple(widths)


def host_config(prunable: PrunableModel, recorded: Structure | None = None) -> dict[str, Any]:
    """Return the config.json for transformers and, for models of timm, for timm; both read the structure from it.

    Args:
        prunable: the model.
        recorded: its structure with replaced layers, if there are any.
    """
    model, anatomy = prunable.model, prunable.anatomy
    settings = json_values(timm_config(model))
    structure = (recorded or anatomy.structure).to_dict()
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
        "model_args": {"structure": seal(structure)},
    }
    if structure["base"].get("host", "timm") == "timm":
        config |= {"architecture": MODEL_TYPE, "num_classes": classes, "pretrained_cfg": settings}
        # With timm's entries in config.json, transformers reads this from here instead of preprocessor_config.json.
        config["image_processor_type"] = PROCESSOR
        if isinstance(features := getattr(model, "num_features", None), int):
            config["num_features"] = features
    return config


def image_processor(prunable: PrunableModel) -> dict[str, Any] | None:
    """Return the configuration of transformers' image processor that equals timm's evaluation; None if there is none.

    The processor supports 1 or 3 channels, and no padding.
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


@checked_arguments
def as_transformers(model: nn.Module) -> nn.Module:
    """Wrap a model as a transformers model, as `AutoModelForImageClassification` would load it.

    It shares the parameters of ``model``, which is its attribute ``model``; ``save_pretrained`` and ``Trainer`` work.

    Raises:
        MissingExtraError: transformers is not installed.
        UnsupportedModelError: the model is of another task than classification.
    """
    register_with_transformers()
    from slimming.models import transformers_entry as entry

    if (task := task_of(model)) != CLASSIFICATION:
        raise UnsupportedModelError(
            f"This {type(model).__name__} is a model for {task}, and no image classifier. It is a model of its library "
            "already: give it to Trainer as it is, and keep it with slimming.save."
        )
    read = prunable(model)
    config = entry.SlimmingConfig.from_dict(host_config(read, recorded(model, read.anatomy.structure)))
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
    """Register slim models with ``AutoConfig``, ``AutoModelForImageClassification`` and ``pipeline`` of transformers.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from slimming.models import transformers_entry as transformers_entry
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingExtraError("This needs an extra: pip install 'slimming[transformers]'.") from error
