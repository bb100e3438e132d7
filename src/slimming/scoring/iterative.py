"""Iterative scores: what cutting each unit costs when other units of its kind were cut before it.

Scores of single units in the whole model say little about what happens when many go. Hidden units, head dimensions and
channels can stand in for one another, see `slimming.scoring.redundancy`. Tokens, blocks and embedding features cannot:
each costs more the fewer are left. Units of these kinds are therefore removed in a few rounds, each ranked by the
Fisher scores of the model that the rounds before left (Molchanov et al., ICLR 2017, alternate scoring and pruning).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slimming.core.budget import Budget
from slimming.core.groups import Group
from slimming.core.layout import FREE
from slimming.models.prunable import PrunableModel
from slimming.planning.planner import Planner
from slimming.scoring.fisher import fisher_scores
from slimming.scoring.redundancy import redundancy_scores
from slimming.training.batches import Batch

IN_ROUNDS = ("token", "block", "width")
"""Kinds whose units do not make up for each other."""
SHARES = (0.8, 0.6, 0.4, 0.2)
"""Shares of the units of a kind that stay after each round."""
TINY = 1e-30
"""The least score of a unit that is still there: those that went come before it."""


def iterative_scores(
    prunable: PrunableModel,
    groups: Sequence[Group],
    alone: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """What cutting each unit costs at its turn.

    Args:
        prunable: a plain model in evaluation mode; it stays as it is.
        groups: some of its groups.
        alone: what cutting each unit alone costs, at least 0, shape (size,) per group, see
            `slimming.scoring.fisher.fisher_scores`.
        batches: the same on every process; their labels are not used.
        seed: of the labels drawn.

    Returns:
        Group name -> cost of each unit, shape (size,).

    Raises:
        NonFiniteLossError: the outputs of the model or their slopes are not finite.
    """
    found = redundancy_scores(prunable.model, groups, alone, [batch.images for batch in batches])
    for kind in IN_ROUNDS:
        own = [group for group in groups if group.kind == kind]
        if own:
            found |= _in_rounds(prunable, own, {group.name: alone[group.name] for group in own}, batches, seed)
    return found


def _in_rounds(
    prunable: PrunableModel,
    groups: Sequence[Group],
    alone: Mapping[str, Tensor],
    batches: Sequence[Batch],
    seed: int,
) -> dict[str, Tensor]:
    """Costs of the units of one kind: the slope in the round in which a unit went, and no less than those before it."""
    kind, anatomy = groups[0].kind, prunable.anatomy
    costs, now = {name: torch.zeros_like(score) for name, score in alone.items()}, alone
    stays = {name: torch.ones_like(score, dtype=torch.bool) for name, score in alone.items()}
    floor = 0.0
    for number, share in enumerate((*SHARES, 0.0)):
        dear = 1 + max(score.max().item() for score in now.values())
        ranked = {name: half_later(score.clamp_min(TINY), stays[name], dear) for name, score in now.items()}
        planner = Planner(anatomy, ranked, FREE, lambda kept: {})
        plan = planner.plan(Budget(keep={kind: share}), fold=True) if share > planner.least(kind) else None
        going = {}
        for name, left in stays.items():
            going[name] = left.clone()
            if plan is not None:
                going[name][list(plan.kept[name])] = False
            costs[name][going[name]] = now[name][going[name]].clamp_min(floor)
        floor = max((costs[name][gone].max().item() for name, gone in going.items() if gone.any()), default=floor)
        if plan is None:
            return costs
        stays = {name: left & ~going[name] for name, left in stays.items()}
        now = fisher_scores(prunable, groups, batches, seed=seed + number + 1, after=plan)
    return costs


def half_later(scores: Tensor, stays: Tensor, dear: float) -> Tensor:
    """Scores by which no group loses more than half of what it has left while others can; 0 for what has gone."""
    left = int(stays.sum())
    last = torch.where(stays, scores, -torch.inf).topk(left // 2).indices
    result = torch.where(stays, scores, 0.0)
    result[last] += dear
    return result
