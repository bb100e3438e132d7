"""Join the groups of layers that share their weights, such as the box heads that a detector ties to its decoder's.

A unit of such a layer goes from all modules that hold the weight. `slimming.models.family.tie_` ties them again after
they were resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from slimming.core.groups import Group, Scale, Slices
from slimming.models.family import shared_parameters


def joined_groups(model: nn.Module, groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """Join the groups whose units are the same rows or columns of shared parameters.

    Returns:
        The groups, those of shared parameters with the slices under every name; and for each group that cannot be
        joined the reason.
    """
    names_of = {name: names for names in shared_parameters(model) for name in names}
    joined: list[Group] = []
    reasons: list[str] = []
    for group in groups:
        shared = [part for part in group.slices if part.tensor in names_of]
        if not shared:
            joined.append(group)
            continue
        group = _under_all_names(group, names_of)
        places = {(part.tensor, part.dim): part.index for part in group.slices if part.tensor in names_of}
        for other in [other for other in joined if any((part.tensor, part.dim) in places for part in other.slices)]:
            joined.remove(other)
            if any(places.get((part.tensor, part.dim), part.index) != part.index for part in other.slices):
                reasons.append(f"{other.name}: it shares a weight with {group.name}, but not unit by unit")
                break
            group = _union(other, group)
        else:
            joined.append(group)
            continue
        reasons.append(f"{group.name}: it is shared by several modules")
    return joined, reasons


def _under_all_names(group: Group, names_of: dict[str, list[str]]) -> Group:
    """``group`` with each slice and scale of a shared parameter under all names of the parameter."""
    slices = [replace(part, tensor=name) for part in group.slices for name in names_of.get(part.tensor, [part.tensor])]
    scales = [replace(part, tensor=name) for part in group.scales for name in names_of.get(part.tensor, [part.tensor])]
    return replace(group, slices=_distinct(slices), scales=_distinct(scales))


def _union(first: Group, second: Group) -> Group:
    """``first`` with what only ``second`` has."""
    return replace(
        first,
        slices=_distinct([*first.slices, *second.slices]),
        scales=_distinct([*first.scales, *second.scales]),
        norms=tuple(dict.fromkeys((*first.norms, *second.norms))),
    )


def _distinct(parts: Sequence[Slices] | Sequence[Scale]) -> tuple:
    return tuple(dict.fromkeys(parts))
