"""Measure the increase of the loss when units of one kind, and of all kinds together, are removed from a masked model.

Scores are first-order estimates for one unit at a time. If many units are removed, tokens, whole attentions and
features of the embedding cost far more than the sum of their scores, and hidden units far less. The kinds are therefore
weighed against each other by measurement: each kind alone is pruned to several shares, and the loss is evaluated on a
few hundred images. The best way to distribute the loss of a kind over its units depends on the model: by rank if all
layers have the same shape, by score for channels of stages with different costs. Therefore up to three plans with all
kinds are measured for each way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from slimming.core.budget import Budget
from slimming.core.copies import copied
from slimming.core.groups import Anatomy
from slimming.core.layout import Layout
from slimming.core.pruning_plan import Plan
from slimming.counting.model_cost import total
from slimming.errors import BudgetError, NonFiniteLossError
from slimming.masks.soft_masks import SoftMasks, attached
from slimming.planning.planner import Planner
from slimming.planning.sensitivity import SPREADS, Curve, Sensitivity

SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of the units of a kind that are kept, followed by the smallest share that the layout allows."""
JOINT = (0.7, 0.5, 0.3)
"""Shares of the MACs to which all kinds together are pruned."""
BROKEN = 1e3
"""Increase of the loss that is recorded if the loss is not finite."""
_SMALL = 1e-3
"""Losses below this value count as equal when the ways are compared."""


@torch.no_grad()
def sensitivity(
    masks: SoftMasks, scores: Mapping[str, Tensor], layout: Layout, loss: Callable[[nn.Module], float]
) -> Sensitivity:
    """Measure the increase of the loss with each masked kind alone pruned, and with all kinds pruned together.

    Args:
        masks: masks of a trained model, which is not changed.
        scores: one score per unit for each masked group, shape (size,).
        layout: sizes that the layers may have.
        loss: returns the loss of a copy of the masked model.

    Raises:
        NonFiniteLossError: the loss of the unpruned model is not finite.
    """
    model = masks.model
    planner = Planner(masks.anatomy, scores, layout, lambda kept: {})
    unpruned = loss(model)
    if not math.isfinite(unpruned):
        raise NonFiniteLossError(f"The loss of the trained model is {unpruned}. Check its weights and the images.")

    def increase(plan: Plan) -> float:
        pruned = copied(model)
        copied_masks = attached(pruned)
        assert copied_masks is not None
        copied_masks.apply_(plan)
        difference = loss(pruned) - unpruned
        return difference if math.isfinite(difference) else BROKEN

    curves: dict[str, Curve] = {}
    for kind in dict.fromkeys(group.kind for group in masks.groups):
        curve: list[tuple[float, float]] = []
        units = sum(group.size for group in masks.of_kind(kind))
        least = planner.smallest_keep_ratio(kind)
        for share in [*(share for share in SHARES if share > least), max(least, 1e-9)]:
            plan = planner.plan(Budget(keep={kind: share}), fold=True)
            kept = sum(len(plan.kept[group.name]) for group in masks.of_kind(kind)) / units
            if kept < (curve[-1][0] if curve else 1.0):
                curve.append((kept, increase(plan)))
        curves[kind] = tuple(curve)
    joint: dict[str, Curve] = {}
    for spread in SPREADS:
        ways = Sensitivity(curves=curves, spread=spread)
        planner = Planner(masks.anatomy, scores, layout, partial(_macs, masks.anatomy), ways)
        joint[spread] = tuple(_joint(planner, increase))
    return Sensitivity(curves=curves, spread=min(SPREADS, key=lambda spread: _badness(joint[spread])), joint=joint)


def _joint(planner: Planner, increase: Callable[[Plan], float]) -> Iterator[tuple[float, float]]:
    """Share of the MACs and increase of the loss for plans of all kinds."""
    for share in JOINT:
        try:
            yield share, increase(planner.plan(Budget(macs=share), fold=True))
        except BudgetError:
            return  # smaller budgets cannot be reached either


def _badness(curve: Curve) -> float:
    """Sum of the logarithms of the losses, so that all budgets have the same weight."""
    return sum(math.log(max(loss, 0.0) + _SMALL) for _, loss in curve)


def _macs(anatomy: Anatomy, kept: Mapping[str, int]) -> dict[str, float]:
    return {"macs": total(anatomy, kept).macs}
