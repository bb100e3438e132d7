"""Iterative scores: the cost of removing each unit after other units of its kind were removed.

The scores of single units in the dense model say little about removing many. Hidden units, head dimensions and channels
can be replaced by others, see `slimming.scoring.redundancy`. Tokens, blocks and embedding features cannot: each costs
more the fewer are left. Units of these kinds are therefore removed in five rounds, each ranked by the Fisher scores of
the model after the rounds before (Molchanov et al., ICLR 2017, alternate scoring and pruning).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slimming.core.budget import Budget
from slimming.core.calibration import CalibrationBatch
from slimming.core.groups import Group
from slimming.core.layout import FREE
from slimming.models.prunable import PrunableModel
from slimming.planning.planner import Planner
from slimming.scoring.fisher import fisher_scores
from slimming.scoring.outputs import OutputReader
from slimming.scoring.redundancy import redundancy_scores
from slimming.training.outputs import CountedOutput
from slimming.training.tasks import Loss

IN_ROUNDS = ("token", "block", "width")
"""Kinds whose units cannot be replaced by others."""
SHARES = (0.8, 0.6, 0.4, 0.2)
"""Share of the units of a kind that is kept after each round but the last."""
TINY = 1e-30
"""Smallest score of a remaining unit, so that removed units rank before it."""


def iterative_scores(
    prunable: PrunableModel,
    groups: Sequence[Group],
    alone: Mapping[str, Tensor],
    batches: Sequence[CalibrationBatch],
    *,
    seed: int = 0,
    outputs: Sequence[CountedOutput] | None = None,
    reader: OutputReader | None = None,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Return the cost of each unit at the moment of its removal.

    Args:
        prunable: a model without masks in evaluation mode; it is not changed.
        groups: groups of the model.
        alone: cost of removing each unit alone, at least 0, shape (size,) per group, see
            `slimming.scoring.fisher.fisher_scores`.
        batches: calibration batches, the same on every process; their labels are not used.
        seed: seed of the drawn labels.
        outputs: the outputs that count, see `slimming.scoring.fisher.fisher_scores`.
        reader: gives the outputs.
        loss: custom loss, see `slimming.scoring.fisher.fisher_scores`.

    Returns:
        Group name -> cost of each unit, shape (size,).

    Raises:
        NonFiniteLossError: the model's outputs or their gradients are not finite.
    """
    scores = redundancy_scores(prunable.model, groups, alone, batches)
    for kind in IN_ROUNDS:
        of_kind = [group for group in groups if group.kind == kind]
        if of_kind:
            start = {group.name: alone[group.name] for group in of_kind}
            scores |= _in_rounds(prunable, of_kind, start, batches, seed, outputs, reader, loss)
    return scores


def _in_rounds(
    prunable: PrunableModel,
    groups: Sequence[Group],
    alone: Mapping[str, Tensor],
    batches: Sequence[CalibrationBatch],
    seed: int,
    outputs: Sequence[CountedOutput] | None,
    reader: OutputReader | None,
    loss: Loss | None,
) -> dict[str, Tensor]:
    """Costs of the units of one kind: the score in the round of removal, at least the largest of the rounds before."""
    kind, anatomy = groups[0].kind, prunable.anatomy
    costs, current = {name: torch.zeros_like(score) for name, score in alone.items()}, alone
    remaining = {name: torch.ones_like(score, dtype=torch.bool) for name, score in alone.items()}
    floor = 0.0
    for number, share in enumerate((*SHARES, 0.0)):
        offset = 1 + max(score.max().item() for score in current.values())
        ranked = {
            name: raise_upper_half(score.clamp_min(TINY), remaining[name], offset) for name, score in current.items()
        }
        planner = Planner(anatomy, ranked, FREE, lambda kept: {})
        plan = (
            planner.plan(Budget(keep={kind: share}), fold=True) if share > planner.smallest_keep_ratio(kind) else None
        )
        removed = {}
        for name, units_left in remaining.items():
            removed[name] = units_left.clone()
            if plan is not None:
                removed[name][list(plan.kept[name])] = False
            costs[name][removed[name]] = current[name][removed[name]].clamp_min(floor)
        floor = max((costs[name][units].max().item() for name, units in removed.items() if units.any()), default=floor)
        if plan is None:
            return costs
        remaining = {name: units_left & ~removed[name] for name, units_left in remaining.items()}
        current = fisher_scores(
            prunable, groups, batches, seed=seed + number + 1, after=plan, outputs=outputs, reader=reader, loss=loss
        )
    return costs


def raise_upper_half(scores: Tensor, remaining: Tensor, offset: float) -> Tensor:
    """Return scores by which no group loses more than half of its remaining units while other groups can lose some.

    The upper half of the remaining scores is raised by ``offset``; removed units get 0.
    """
    count = int(remaining.sum())
    upper = torch.where(remaining, scores, -torch.inf).topk(count // 2).indices
    result = torch.where(remaining, scores, 0.0)
    result[upper] += offset
    return result
