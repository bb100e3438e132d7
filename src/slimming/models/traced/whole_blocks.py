"""Check which blocks can be removed as a whole once all their branches are.

A host may collect the outputs of all modules of a class, such as the hidden states that a depth estimator reads, and
then counts one too few if such a module is replaced. The branches of these blocks are removed one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from slimming.core.groups import Group
from slimming.core.modules import MODEL_ERRORS
from slimming.models.traced.verification import Cut, Pass, masked_outputs, output_difference

Returns = TypeVar("Returns")


@torch.no_grad()
def removable_blocks(
    model: nn.Module,
    blocks: Mapping[str, tuple[Returns, tuple[str, ...]]],
    groups: Sequence[Group],
    passes: Sequence[Pass],
    cut: Cut,
) -> dict[str, tuple[Returns, tuple[str, ...]]]:
    """Those of ``blocks`` without which the outputs are those of the masked model.

    Args:
        model: in float64 with random weights.
        blocks: name of a block -> what is returned in its place, and the names of its branches.
        groups: the groups of the model.
        passes: the forward passes; the first is compared.
        cut: makes a cut copy.
    """
    by_name = {group.name: group for group in groups}
    known = {name: value for name, value in blocks.items() if all(branch in by_name for branch in value[1])}

    def hold(names: Collection[str]) -> bool:
        units = [by_name[branch] for name in names for branch in known[name][1]]
        kept: dict[str, tuple[int, ...]] = {group.name: () for group in units}
        try:
            found = passes[0].outputs(cut(model, units, kept))
        except MODEL_ERRORS:
            return False
        return output_difference(masked_outputs(model, units, kept, passes[0]), found) is None

    if not known or hold(known):
        return known
    return {name: value for name, value in known.items() if hold([name])}
