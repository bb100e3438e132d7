"""Check which blocks can be removed as a whole once all their branches are.

A host may collect the outputs of all modules of a class, such as the hidden states that a depth estimator reads, and
then counts one too few if such a module is replaced. The branches of these blocks are removed one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from slimming.core.groups import Group
from slimming.core.modules import MODEL_ERRORS
from slimming.models.traced.branches import BranchReading, branch_groups
from slimming.models.traced.verification import (
    Cut,
    Pass,
    cut_difference,
    masked_outputs,
    output_difference,
    turns,
    verified,
)

Returns = TypeVar("Returns")


def verified_with_branches(
    model: nn.Module, groups: Sequence[Group], reading: BranchReading, passes: Sequence[Pass], cut: Cut
) -> tuple[list[Group], BranchReading, list[tuple[Group, str]]]:
    """Verify ``groups`` and the groups of the branches: at once if they pass, and else one kind after the other.

    Args:
        model: in float64 with random weights.
        groups: the groups that are no branches.
        reading: the branches.
        passes: the forward passes in which masked and cut model must agree.
        cut: makes a cut copy.

    Returns:
        The groups that pass, ``reading`` with the blocks that can be removed, and the groups that fail with the reason.
    """
    together = [*groups, *branch_groups(model, reading.branches, groups)]
    failed: list[tuple[Group, str]] = []
    shown: list[set[str]] = []
    if reading.branches and cut_difference(model, together, passes, cut) is None:
        passing, shown = together, turns(together)
    else:
        units, failed = verified(model, groups, passes, cut)
        passing, others = verified(model, branch_groups(model, reading.branches, units), passes, cut, units)
        failed += others
    blocks = removable_blocks(model, reading.blocks, passing, passes, cut, shown)
    return passing, replace(reading, blocks=blocks), failed


@torch.no_grad()
def removable_blocks(
    model: nn.Module,
    blocks: Mapping[str, tuple[Returns, tuple[str, ...]]],
    groups: Sequence[Group],
    passes: Sequence[Pass],
    cut: Cut,
    shown: Sequence[Collection[str]] = (),
) -> dict[str, tuple[Returns, tuple[str, ...]]]:
    """Those of ``blocks`` without which the outputs are those of the masked model.

    Args:
        model: in float64 with random weights.
        blocks: name of a block -> what is returned in its place, and the names of its branches.
        groups: the groups of the model.
        passes: the forward passes; the first is compared.
        cut: makes a cut copy.
        shown: sets of branches that were removed together, with the blocks that they make up, in comparisons that
            passed.
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

    rest = [name for name, (_, branches) in known.items() if not any(set(branches) <= set(turn) for turn in shown)]
    if not rest or hold(rest):
        return known
    return {name: value for name, value in known.items() if name not in rest or hold([name])}
