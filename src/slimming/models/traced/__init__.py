"""Any other model, read by tracing: channels by torch-pruning's dependency graph, heads by a table of classes.

`reading` puts together what `channels`, `heads` and `mlp` find, `proof` holds each group against the model itself,
`counting` says what each operation costs, `resize` selects tensors and gives modules other sizes, `origin` knows how
hosts make a model again, and `tables` with its rows per host is data.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.groups import Anatomy, TimedLayer
from slimming.core.structure import Structure
from slimming.errors import UnsupportedModelError
from slimming.models.family import STRUCTURE, Family, Kept, TimedModule
from slimming.models.traced import rebuild
from slimming.models.traced.reading import Reading, attention_sites, read_model
from slimming.models.traced.resize import layers_after, resize_module_, select, settle_
from slimming.models.traced.timed_layers import Call, calls, timed_module

PART = "part"
"""Key of a layer's entry that holds the structure of a submodule that was cut on its own."""
_REMEMBERED = 16
"""How many architectures' readings are kept: reading one takes seconds, and every stage asks for it."""


class Traced(Family):
    """Reader of every model that has no family of its own."""

    name = "traced"
    runs_models = True

    def __init__(self, others: Sequence[Family] = ()) -> None:
        self._families = {family.name: family for family in (*others, self)}
        self._readings: dict[str, Reading] = {}
        self._named: dict[str, dict[str, Any]] = {}
        self._timed: tuple[weakref.ref[nn.Module], Anatomy, list[Call]] | None = None

    def reads(self, model: nn.Module) -> bool:
        return True

    def read(self, model: nn.Module) -> Anatomy:
        shape = rebuild.input_shape(model)
        key = _signature(model, shape)
        if key not in self._readings:
            while len(self._readings) >= _REMEMBERED:
                self._readings.pop(next(iter(self._readings)))
            self._readings[key] = read_model(model, shape)
        reading = self._readings[key]
        return Anatomy(
            groups=reading.groups,
            operations=reading.operations,
            structure=Structure(family=self.name, base=self.base(model), layers=_layers(model)),
            uncovered=reading.uncovered,
            input_shape=shape,
            sizes=reading.sizes,
            timed_layers=reading.timed_layers,
        )

    def timed_module(
        self, model: nn.Module, layer: TimedLayer, sizes: Mapping[str, int], *, uneven_heads: bool = False
    ) -> TimedModule:
        if uneven_heads:
            raise UnsupportedModelError("Heads of this model keep one size: build its table without uneven heads.")
        if self._timed is None or self._timed[0]() is not model:  # a table asks hundreds of times
            anatomy, like = self.read(model), next(model.parameters())
            example = torch.zeros(1, *anatomy.input_shape, dtype=like.dtype, device=like.device)
            self._timed = weakref.ref(model), anatomy, calls(model, example, attention_sites(anatomy.groups))
        _, anatomy, found = self._timed
        call = found[int(layer.name.rpartition("#")[2])]
        return timed_module(model, call, layer, sizes, anatomy.sizes, {g.name: g.size for g in anatomy.groups})

    def base(self, model: nn.Module) -> dict[str, Any]:
        stored = model.__dict__.get(STRUCTURE)
        if stored is not None:
            return rebuild.rebased(stored.base, model)
        key = _signature(model, ())
        if key in self._named:
            return rebuild.rebased(self._named[key], model)  # its own images and classes
        parts = _slim_parts(model)
        base = rebuild.origin(model, (lambda made: self._apply_(made, parts)) if parts else None)
        if base["host"] == "torchvision":  # which has nothing but names, and many of them to try
            self._named[key] = base
        return base

    def build(self, base: Mapping[str, Any]) -> nn.Module:
        return rebuild.build(base)

    def structure(self, anatomy: Anatomy, kept: Kept) -> Structure:
        layers = {**anatomy.structure.layers, **layers_after(anatomy.sizes, anatomy.groups, kept)}
        return replace(anatomy.structure, layers=layers)

    def select(self, anatomy: Anatomy, kept: Kept, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return select(anatomy.groups, kept, state)

    def resize_(self, model: nn.Module, structure: Structure) -> None:
        self._apply_(model, structure.layers)
        model.__dict__[STRUCTURE] = structure

    def _apply_(self, model: nn.Module, layers: Mapping[str, Any]) -> None:
        """Give the modules of a dense model the sizes of a structure's entries."""
        for name, entry in layers.items():
            module = model.get_submodule(name)
            if PART in entry:
                part = Structure.from_dict(entry[PART])
                self._families[part.family].resize_(module, part)
            else:
                resize_module_(module, entry)
        settle_(model)


def _layers(model: nn.Module) -> dict[str, Any]:
    """What differs from the dense model: what slimming cut of it, after what it cut of its parts."""
    stored = model.__dict__.get(STRUCTURE)
    if stored is None:
        return _slim_parts(model)
    return {**_slim_parts(model), **stored.layers}


def _slim_parts(model: nn.Module) -> dict[str, Any]:
    """The structures of submodules that were cut on their own, such as a backbone."""
    parts: dict[str, Any] = {}
    for name, module in model.named_modules():
        stored = module.__dict__.get(STRUCTURE)
        if name and stored is not None and not any(name.startswith(f"{outer}.") for outer in parts):
            parts[name] = {PART: stored.to_dict()}
    return parts


def _is_plain(value: Any) -> bool:
    """Whether it is a number, text or truth value, or some of them, such as the strides of a convolution."""
    return type(value) in (int, float, bool, str) or (type(value) in (tuple, list) and all(map(_is_plain, value)))


def _signature(model: nn.Module, shape: Sequence[int]) -> str:
    """What decides the reading of a model: its classes, sizes and settings, not its weights."""
    digest = hashlib.sha256(repr(tuple(shape)).encode())
    for name, module in model.named_modules():
        settings = {key: value for key, value in vars(module).items() if _is_plain(value) and key != "training"}
        digest.update(f"{name} {type(module)} {sorted(settings.items())}".encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
    return digest.hexdigest()
