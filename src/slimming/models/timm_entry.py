"""Register the architecture ``slimming`` with timm, which builds a slim model from its structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, is_model, register_model
from torch import Tensor, nn

from slimming.core.structure import STRUCTURE as STRUCTURE_FILE
from slimming.core.structure import Structure
from slimming.errors import UnsupportedModelError
from slimming.models.directories import structure_in, timm_config, unprefixed
from slimming.models.families import build_filled
from slimming.models.family import STRUCTURE
from slimming.models.hosts import classes_of, reset_classes_
from slimming.models.prunable import read

RATES = ("drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "patch_drop_rate")
"""Arguments of timm's constructors that do not affect sizes, so that they may differ from those of the dense model."""
IMPLIED = ("global_pool",)
"""Arguments that timm passes to every model from its configuration. They are ignored: the structure has them."""


def register() -> None:
    """Add the architecture to timm's registry, unless it is there already."""
    if not is_model("slimming"):
        register_model(slimming)


def slimming(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a slim model; the entry point of timm's registry.

    Args:
        pretrained: load the weights of the directory or repository from which timm reads the configuration.
        kwargs: ``structure``, as in a config.json or as the path of a checkpoint of slimming, and the arguments that
            timm passes to every model.
    """
    if not kwargs.get("pretrained_cfg"):
        config = timm_config(build_filled(_structure(kwargs.get("structure"))))
        kwargs["pretrained_cfg"] = {**config, "architecture": "slimming"}
    # timm's plain Vision Transformers return features by forward_intermediates, other models by module names.
    getter = _structure(kwargs.get("structure")).family == "timm-vit"
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"} if getter else None
    return build_model_with_cfg(
        _make, "slimming", pretrained, pretrained_filter_fn=_state, feature_cfg=feature_cfg, **kwargs
    )


def _state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return unprefixed(state, model)


def _make(
    *,
    structure: Mapping[str, Any] | str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: Any = None,
    **arguments: Any,
) -> nn.Module:
    """The slim model with random weights.

    Raises:
        UnsupportedModelError: there is no structure, or an argument differs from that of the dense model.
        CheckpointError: the structure is damaged.
    """
    parsed = _structure(structure)
    given = {key: value for key, value in arguments.items() if key not in IMPLIED}
    dense_arguments = parsed.base.get("arguments", {})
    changed = [key for key, value in given.items() if key not in RATES and dense_arguments.get(key) != value]
    if changed:
        raise UnsupportedModelError(
            f"A slim model keeps the arguments of its dense model; leave out {', '.join(changed)}."
        )
    rates = {key: value for key, value in given.items() if key in RATES}
    base = {**parsed.base, "arguments": {**dense_arguments, **rates}}
    model: Any = build_filled(dataclasses.replace(parsed, base=base))
    channels, *size = read(model).anatomy.input_shape
    given_size = [img_size, img_size] if isinstance(img_size, int) else list(img_size or size)
    if in_chans not in (None, channels) or given_size != size:
        raise UnsupportedModelError(
            f"This slim model takes images of {channels} channels and {' x '.join(map(str, size))} pixels, like its "
            "dense model. Leave out in_chans and img_size."
        )
    if rates:
        model.__dict__[STRUCTURE] = parsed
    if num_classes is not None and num_classes != classes_of(model):
        reset_classes_(model, num_classes)
    return model


def _structure(given: Mapping[str, Any] | str | Path | None) -> Structure:
    if given is None:
        raise UnsupportedModelError(
            "The architecture slimming needs a structure: timm.create_model('local-dir:DIRECTORY', pretrained=True) or "
            "'hf-hub:OWNER/NAME' reads it from config.json; or give structure=DIRECTORY and checkpoint_path=FILE."
        )
    if isinstance(given, Mapping):
        structure = structure_in({"architecture": "slimming", "model_args": {"structure": dict(given)}})
        assert structure is not None
        return structure
    path = Path(given)
    file = path / "structure.json" if path.is_dir() else path
    return STRUCTURE_FILE.read(file).structure
