"""Channels that a module divides into equal parts, one for each of its paths, as selective kernels (SKNet) do.

One layer makes the channels of all paths, or weights for all of them, and others have the channels of one path. The
channels at the same place of every part are one unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from slimming.core.formulas import Dim
from slimming.core.groups import Group
from slimming.models.traced.heads import Attributes

Indices = Mapping[tuple[tuple[str, int], str], Mapping[int, set[int]]]
"""See `slimming.models.traced.channels.ChannelSet`."""


def by_place(indices: Indices, lengths: Sequence[int]) -> dict[tuple[tuple[str, int], str], dict[int, set[int]]] | None:
    """``indices`` with one root for the channels at each place of the parts; None if there are no equal parts.

    torch-pruning follows such channels in part only. That all of them go together by their places is an assumption,
    which the verification of the group confirms.

    Args:
        indices: tensor and dimension, and side -> root channel -> indices.
        lengths: the size of each of these dimensions.
    """
    size = min(lengths, default=0)
    if size < 2 or max(lengths) == size or any(length % size for length in lengths):
        return None
    for length, by_root in zip(lengths, indices.values(), strict=True):
        if len(set[int]().union(*by_root.values())) != length:
            return None  # other channels of this tensor are not among them
    return {
        key: {place: set(range(place, length, size)) for place in range(size)}
        for key, length in zip(indices, lengths, strict=True)
    }


def part_attributes(model: nn.Module, groups: Sequence[Group]) -> Attributes:
    """The attributes with the number of channels of all parts, of the modules around the layers that read one part."""
    result: Attributes = {}
    for group in groups:
        least = min((len(part.index[0]) for part in group.slices if part.side == "consumes"), default=0)
        paths = [part.tensor for part in group.slices if part.side == "consumes" and len(part.index[0]) == least]
        made = {len(part.index[0]) for part in group.slices if part.side == "produces" and len(part.index[0]) > least}
        if not made or not paths:
            continue
        totals = {count * group.size: Dim(groups=((group.name, count),)) for count in made}
        around = {path.rsplit(".", depth)[0] for path in paths for depth in range(2, path.count(".") + 1)}
        for name in around:
            for attribute, value in vars(model.get_submodule(name)).items():
                if type(value) is int and value in totals:
                    result.setdefault(name, {})[attribute] = totals[value]
    return result
