"""Family of all models that no other family supports; they are read by tracing.

Channels are found with torch-pruning's dependency graph, attention heads and gated MLPs with tables of classes.
`reading` combines what `channels`, `heads` and `mlp` find, `verification` checks each group on the model itself,
`operations` derives the cost formulas, `resize` selects tensors and resizes modules, `rebuild` finds out how the host
builds the model, and `tables` joins the tables of the hosts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from slimming.core.example_inputs import given_calls, image_call
from slimming.core.groups import Anatomy, TimedLayer
from slimming.core.modules import set_attribute_
from slimming.core.structure import Structure
from slimming.errors import UnsupportedModelError
from slimming.models.family import (
    BLUEPRINT,
    ENTRY,
    STRUCTURE,
    Family,
    Kept,
    TimedModule,
    TimedModules,
    shared_parameters,
    tie_,
)
from slimming.models.replaced_layers import Blueprint
from slimming.models.traced import rebuild
from slimming.models.traced.cache import ArchitectureCache, architecture_digest
from slimming.models.traced.entries import check_entry
from slimming.models.traced.reading import Reading, attention_sites, read_model
from slimming.models.traced.resize import disable_nested_tensors_, is_removed, layers_after, merged, resize_, select
from slimming.models.traced.timed_layers import call_number, calls, timed_module
from slimming.models.traced.token_blocks import bar_grid_methods_

SUBMODULE = "part"
"""Key of an entry of a structure that holds the structure of a submodule that was cut by itself."""


class Traced(Family):
    """Reader of every model that no other family supports.

    Args:
        others: the other families, which may have cut submodules of a model.
    """

    name = "traced"
    runs_models = True

    def __init__(self, others: Sequence[Family] = ()) -> None:
        self._families = {family.name: family for family in (*others, self)}
        self.readings: ArchitectureCache[Reading] = ArchitectureCache()
        self._torchvision: ArchitectureCache[dict[str, Any]] = ArchitectureCache()

    def reads(self, model: nn.Module) -> bool:
        return True

    def read(self, model: nn.Module) -> Anatomy:
        candidates = rebuild.example_candidates(model)
        digest = architecture_digest(model, [call.digest for calls in candidates for call in calls])
        reading = self.readings.get(digest, lambda: read_model(model, candidates))
        return Anatomy(
            groups=reading.groups,
            operations=reading.operations,
            structure=self._structure(model, digest),
            uncovered=reading.uncovered,
            inferred=reading.inferred,
            input_shape=reading.input_shape,
            sizes=reading.sizes,
            timed_layers=reading.timed_layers,
        )

    def timed_modules(self, model: nn.Module, anatomy: Anatomy, *, uneven_heads: bool = False) -> TimedModules:
        if uneven_heads:
            raise UnsupportedModelError("Heads of this model keep one size: build its table without uneven heads.")
        like = next(model.parameters())
        calls_ = given_calls(model) or (image_call(anatomy.input_shape),)
        example = calls_[0].with_batch(1).to(like.dtype, like.device)
        recorded = calls(model, example, attention_sites(anatomy.groups))
        groups = {group.name: group for group in anatomy.groups}

        def module(layer: TimedLayer, sizes: Mapping[str, int]) -> TimedModule:
            return timed_module(model, recorded[call_number(layer)], layer, sizes, anatomy.sizes, groups)

        return module

    def _structure(self, model: nn.Module, digest: str) -> Structure:
        stored = model.__dict__.get(STRUCTURE)
        base = self._base(model, digest)
        # Only the user can make the dense model again, so what the user replaced is carried on.
        replaced = stored.replaced if stored is not None and base["host"] == rebuild.OWN else {}
        return Structure(family=self.name, base=base, layers=_cut_layers(model), replaced=replaced)

    def _base(self, model: nn.Module, digest: str) -> dict[str, Any]:
        """How the host builds the dense model, see `Structure.base`."""
        stored = model.__dict__.get(STRUCTURE)
        if stored is not None:
            return rebuild.rebased(stored.base, model)
        parts = _cut_layers(model)

        def find() -> dict[str, Any]:
            return rebuild.find_base(model, (lambda dense: self._apply_(dense, parts)) if parts else None)

        if not rebuild.is_torchvision(model):
            return find()
        # torchvision does not record the name of a model, so many names have to be tried.
        return rebuild.rebased(self._torchvision.get(digest, find), model)

    def build(self, base: Mapping[str, Any]) -> nn.Module:
        return rebuild.build(base)

    def structure(self, anatomy: Anatomy, kept: Kept) -> Structure:
        layers = merged(anatomy.structure.layers, layers_after(anatomy.sizes, anatomy.groups, kept))
        return replace(anatomy.structure, layers=layers)

    def select(self, anatomy: Anatomy, kept: Kept, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        entries = layers_after(anatomy.sizes, anatomy.groups, kept)
        state = {name: tensor for name, tensor in state.items() if not is_removed(name, entries)}
        return select(anatomy.groups, kept, state, anatomy.sizes)

    def resize_(self, model: nn.Module, structure: Structure) -> None:
        self._apply_(model, structure.layers)
        set_attribute_(model, STRUCTURE, structure)
        if structure.base.get("host") == rebuild.OWN:
            set_attribute_(model, BLUEPRINT, Blueprint.of(model))

    def _apply_(self, model: nn.Module, layers: Mapping[str, Any]) -> None:
        """Resize the modules of a dense model to the sizes in a structure's ``layers``."""
        shared = shared_parameters(model)
        for name, entry in layers.items():
            if isinstance(entry, Mapping) and SUBMODULE in entry:
                structure = Structure.from_dict(entry[SUBMODULE])
                self._families[structure.family].resize_(model.get_submodule(name), structure)
            else:
                check_entry(model, name, entry)
                resize_(model, name, entry)
        tie_(model, shared)
        bar_grid_methods_(model)
        disable_nested_tensors_(model)


def _cut_layers(model: nn.Module) -> dict[str, Any]:
    """The entries of a structure for everything that was cut: submodules cut by themselves, then the model."""
    stored = model.__dict__.get(STRUCTURE)
    parts = _cut_submodules(model)
    if stored is not None:
        return {**parts, **stored.layers}
    # A part of a model that was cut as a whole.
    inside = tuple(f"{name}." for name in parts)
    entries = {name: module.__dict__.get(ENTRY) for name, module in model.named_modules()}
    alone = {name: entry for name, entry in entries.items() if entry and not f"{name}.".startswith(inside)}
    return {**parts, **alone}


def _cut_submodules(model: nn.Module) -> dict[str, Any]:
    """The structures of submodules that were cut by themselves, such as a backbone, by name."""
    entries: dict[str, Any] = {}
    for name, module in model.named_modules():
        stored = module.__dict__.get(STRUCTURE)
        if name and stored is not None and not any(name.startswith(f"{outer}.") for outer in entries):
            entries[name] = {SUBMODULE: stored.to_dict()}
    return entries
