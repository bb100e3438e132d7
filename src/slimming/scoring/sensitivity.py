"""What cutting one kind of unit, and all of them together, does to the loss of the trained masked model.

Scores are first-order estimates for one unit at a time. Where many go together, tokens, whole attentions and features
of the embedding cost far more than the sum of their estimates, and hidden units far less. So the kinds are weighed
against each other by measurement: each is cut alone to a few shares, and the loss is taken on a few hundred images.
How a kind's loss is best laid on its units differs: layers of one shape do well by rank, channels of stages that cost
unlike amounts by score. So a few plans of all kinds are measured as well, made in each way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from slimming.core.budget import Budget
from slimming.core.groups import Anatomy
from slimming.core.layout import Layout
from slimming.core.pruning_plan import Plan
from slimming.counting.model_cost import total
from slimming.errors import BudgetError
from slimming.masks.soft_masks import SoftMasks, attached
from slimming.planning.planner import Planner
from slimming.planning.sensitivity import SPREADS, Curve, Sensitivity

SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of the units of a kind that stay; the smallest that the layout allows comes last."""


JOINT = (0.7, 0.5, 0.3)
"""Shares of the MACs to which all kinds together are cut."""
BROKEN = 1e3
"""The loss added by a cut after which the loss is no number."""
_SMALL = 1e-3
"""Losses below this are as good as none, when ways are compared."""


@torch.no_grad()
def sensitivity(
    masks: SoftMasks, scores: Mapping[str, Tensor], layout: Layout, loss: Callable[[nn.Module], float]
) -> Sensitivity:
    """By how much the loss grows when one kind alone is cut, for every kind that has masks, and all together.

    Raises:
        ValueError: the loss of the whole model is no number.

    Args:
        masks: of a trained model, which stays as it is.
        scores: one score per unit for each masked group, shape (size,).
        layout: which sizes the layers may get.
        loss: of a model like the masked one.
    """
    model = masks.model
    planner = Planner(masks.anatomy, scores, layout, lambda kept: {})
    whole = loss(model)
    if not math.isfinite(whole):
        raise ValueError(f"the loss of the searched model is {whole}")

    def grown(plan: Plan) -> float:
        trial = copy.deepcopy(model)
        own = attached(trial)
        assert own is not None
        own.apply_(plan)
        found = loss(trial) - whole
        return found if math.isfinite(found) else BROKEN

    curves: dict[str, Curve] = {}
    for kind in dict.fromkeys(group.kind for group in masks.groups):
        curve: list[tuple[float, float]] = []
        units = sum(group.size for group in masks.of_kind(kind))
        least = planner.smallest_keep_ratio(kind)
        for share in [*(share for share in SHARES if share > least), max(least, 1e-9)]:
            plan = planner.plan(Budget(keep={kind: share}), fold=True)
            kept = sum(len(plan.kept[group.name]) for group in masks.of_kind(kind)) / units
            if kept < (curve[-1][0] if curve else 1.0):
                curve.append((kept, grown(plan)))
        curves[kind] = tuple(curve)
    joint: dict[str, Curve] = {}
    for spread in SPREADS:
        ways = Sensitivity(curves=curves, spread=spread)
        planner = Planner(masks.anatomy, scores, layout, partial(_macs, masks.anatomy), ways)
        joint[spread] = tuple(_joint(planner, grown))
    return Sensitivity(curves=curves, spread=min(SPREADS, key=lambda spread: _badness(joint[spread])), joint=joint)


def _joint(planner: Planner, grown: Callable[[Plan], float]) -> Iterator[tuple[float, float]]:
    for share in JOINT:
        try:
            yield share, grown(planner.plan(Budget(macs=share), fold=True))
        except BudgetError:
            return  # nor can a smaller one be reached


def _badness(curve: Curve) -> float:
    """Sum of the logarithms of losses, so that no budget counts for more than others."""
    return sum(math.log(max(loss, 0.0) + _SMALL) for _, loss in curve)


def _macs(anatomy: Anatomy, kept: Mapping[str, int]) -> dict[str, float]:
    return {"macs": total(anatomy, kept).macs}
