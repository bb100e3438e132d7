"""Prove that a model can be rebuilt from its structure, before a file is written that nobody could load.

The structure of a model is what its host builds, resized. What differs from that is found by comparing the classes,
settings and tensor shapes of all modules. Differences that consist of plain layers of PyTorch, such as a new
classifier, are recorded in the structure; others are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from slimming.core.structure import Structure
from slimming.errors import CheckpointError, UnsupportedModelError
from slimming.models.families import build
from slimming.models.family import BLUEPRINT, ENTRY, STRUCTURE
from slimming.models.replaced_layers import Blueprint, description_of, replaced_layers


def recorded(model: nn.Module, structure: Structure) -> Structure:
    """``structure`` with the layers of ``model`` that were replaced, after a proof that it gives the model again.

    Raises:
        UnsupportedModelError: it cannot; the message names the difference and says what to do.
    """
    if STRUCTURE not in model.__dict__ and (part := _part_of_a_cut_model(model)) is not None:
        raise UnsupportedModelError(
            f"This {type(model).__name__} is a part of a model that was cut: {part!r} has other sizes than its library "
            "makes. Save the whole model, or cut the part by itself and save it."
        )
    own = structure.base.get("host") == "own"
    if own and BLUEPRINT not in model.__dict__:
        return structure  # only its user can make it
    made = model.__dict__[BLUEPRINT] if own else _unreplaced(model, structure)
    try:
        kept = {name: description_of(model.get_submodule(name)) for name in structure.replaced} if own else {}
        found = replace(structure, replaced={**kept, **replaced_layers(model, made)})
        if not own and found.replaced and (left := replaced_layers(model, Blueprint.of(_made(found)))):
            raise UnsupportedModelError(f"{min(left)!r} cannot be made again")
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"This {type(model).__name__} was changed so that its file could not be loaded: {error}. Make such a "
            "change in the dense model before it is cut, or put plain layers of PyTorch in its place. torch.save keeps "
            "this model for code that has its classes."
        ) from error
    return found


def _unreplaced(model: nn.Module, structure: Structure) -> Blueprint:
    """What the host builds, resized, without the layers that the user replaced before the cut."""
    try:
        return Blueprint.of(_made(replace(structure, replaced={})))
    except CheckpointError:
        dense = {name for name, _ in _made(structure, partial(build, dense=True)).named_modules()}
        new = {name for name, _ in model.named_modules()} - dense
        layers = {name: entry for name, entry in structure.layers.items() if name not in new}
        return Blueprint.of(_made(replace(structure, replaced={}, layers=layers)))


def _part_of_a_cut_model(model: nn.Module) -> str | None:
    """The name of a module that was resized with a whole of which ``model`` is a part, if its family keeps no entry."""
    whole = [f"{name}." for name, module in model.named_modules() if STRUCTURE in module.__dict__]
    for name, module in model.named_modules():
        if module.__dict__.get(ENTRY) == {} and not name.startswith(tuple(whole)):
            return name
    return None


def _made(structure: Structure, make: Callable[[Structure], nn.Module] = build) -> nn.Module:
    """The model that ``structure`` describes, on the meta device if its host can build it there."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return make(structure)
        except CheckpointError:
            return make(structure)
