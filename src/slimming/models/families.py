"""Registry of the model families: find the one that reads a model, and build models from their structures.

Families are imported when the first model is read, so that ``import slimming`` stays light.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from slimming.core.records import shown
from slimming.core.structure import Structure
from slimming.errors import CheckpointError, UnsupportedModelError
from slimming.models.bounds import BUILD_ERRORS, bounded_building
from slimming.models.family import Family
from slimming.models.replaced_layers import replace_layers_

WRAPPERS = {
    "AveragedModel": "module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
"""Wrapper classes of torch -> the attribute that holds the wrapped model."""


@cache
def all_families() -> Mapping[str, Family]:
    """Every family by name."""
    from slimming.models.timm_vit import TimmViT
    from slimming.models.traced import Traced

    vit = TimmViT()
    return {family.name: family for family in (vit, Traced([vit]))}


def family_of(model: nn.Module) -> Family:
    """The family that reads ``model``: the first one that supports it; the last one supports every model.

    Raises:
        UnsupportedModelError: ``model`` is a wrapper around a model, has a compiled part, or has adapters of peft.
    """
    if (inner := WRAPPERS.get(type(model).__name__)) in model._modules:
        raise UnsupportedModelError(f"This is a {type(model).__name__} around a model: give its attribute {inner}.")
    compiled = next((name for name, part in model.named_modules() if type(part).__name__ == "OptimizedModule"), None)
    if compiled is not None:
        raise UnsupportedModelError(
            f"{compiled} is compiled, which keeps the sizes of its layers: put its attribute _orig_mod in its place, "
            "and compile the slim model."
        )
    if type(model).__module__.startswith("peft."):
        raise UnsupportedModelError(
            f"This is a {type(model).__name__}, whose adapters belong to the sizes of the dense model: merge them into "
            "the model with merge_and_unload(), and give the model that this returns."
        )
    return next(family for family in all_families().values() if family.reads(model))


def family_called(name: Any) -> Family:
    """The family called ``name`` in a structure.

    Raises:
        CheckpointError: there is no family of this name.
    """
    try:
        return all_families()[name]
    except (KeyError, TypeError) as error:
        known = ", ".join(all_families())
        raise CheckpointError(
            f"The checkpoint is of family {name!r}; this version of slimming knows {known}. Upgrade slimming."
        ) from error


def build(structure: Structure, *, dense: bool = False) -> nn.Module:
    """Build the model that ``structure`` describes; its weights are undefined, or on the meta device.

    Args:
        structure: describes the model.
        dense: build the dense model that it was cut from instead.

    Raises:
        CheckpointError: the structure is damaged, or the installed libraries cannot build the model.
    """
    family = family_called(structure.family)
    try:
        with bounded_building():
            model = family.build(structure.base)
            if not dense:
                resize_and_replace_(model, structure)
    except BUILD_ERRORS as error:
        # Families do not check sizes that they wrote themselves, so a damaged file may raise any of these.
        raise CheckpointError(
            f"The structure is damaged: no {family.name} model can be made from it ({shown(error, 200)}). "
            "Take an intact copy."
        ) from error
    return model


def resize_and_replace_(model: nn.Module, structure: Structure) -> None:
    """Give a dense model the sizes and the replaced layers of ``structure``; their parameters are undefined.

    Raises:
        CheckpointError: the record of the replaced layers is damaged, or there is no family of this name.
    """
    tops = tuple(f"{name}." for name in structure.replaced)
    # Replaced layers are recorded in their final sizes.
    layers = {name: entry for name, entry in structure.layers.items() if not f"{name}.".startswith(tops)}
    family_called(structure.family).resize_(model, replace(structure, layers=layers))
    replace_layers_(model, structure.replaced)


def build_filled(structure: Structure, *, dense: bool = False) -> nn.Module:
    """Build the model that ``structure`` describes on the CPU with random weights, ready for training.

    Args:
        structure: describes the model.
        dense: build the dense model that it was cut from instead.

    Raises:
        CheckpointError: the structure is damaged, or the installed libraries cannot build the model.
    """
    with torch.device("cpu"):
        model = build(structure, dense=dense)
        _fill_randomly_(model)
    return model


@torch.no_grad()
def _fill_randomly_(model: nn.Module) -> None:
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.is_meta:
                empty = torch.zeros_like(tensor, device="cpu")
                parameter = isinstance(tensor, nn.Parameter)
                setattr(module, name, nn.Parameter(empty, tensor.requires_grad) if parameter else empty)
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
            continue
        for parameter in module.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)
