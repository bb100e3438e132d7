"""What cutting one kind of unit does to the loss, measured on the trained masked model.

Scores are first-order estimates for one unit at a time. Where many go together, tokens, whole attentions and features
of the embedding cost far more than the sum of their estimates, and hidden units far less. So the kinds are weighed
against each other by measurement: each is cut alone to a few shares, and the loss is taken on a few hundred images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from slimming.chunks import Curve
from slimming.masks import SoftMasks, attached
from slimming.plan import Budget, Layout
from slimming.rank import Planner

SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of the units of a kind that stay; the smallest that the layout allows comes last."""


@torch.no_grad()
def sensitivity(
    masks: SoftMasks, scores: Mapping[str, Tensor], layout: Layout, loss: Callable[[nn.Module], float]
) -> dict[str, Curve]:
    """By how much the loss grows when one kind alone is cut, for every kind that has masks.

    Args:
        masks: of a trained model, which stays as it is.
        scores: one score per unit for each masked group, shape (size,).
        layout: which sizes the layers may get.
        loss: of a model like the masked one.
    """
    model = masks.model
    planner = Planner(masks.anatomy, scores, layout, lambda kept: {})
    whole = loss(model)
    found: dict[str, Curve] = {}
    for kind in dict.fromkeys(group.kind for group in masks.groups):
        curve: list[tuple[float, float]] = []
        units = sum(group.size for group in masks.of_kind(kind))
        least = planner.least(kind)
        for share in [*(share for share in SHARES if share > least), max(least, 1e-9)]:
            plan = planner.plan(Budget(keep={kind: share}), fold=True)
            kept = sum(len(plan.kept[group.name]) for group in masks.of_kind(kind)) / units
            if kept < (curve[-1][0] if curve else 1.0):
                trial = copy.deepcopy(model)
                own = attached(trial)
                assert own is not None
                own.apply_(plan)
                curve.append((kept, loss(trial) - whole))
        found[kind] = tuple(curve)
    return found
