"""Rounds of scores: what is cut in one is cut in all later ones, and later units cost no less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import slimming
from slimming.core.calibration import labelled
from slimming.core.layout import FREE
from slimming.core.pruning_plan import Plan
from slimming.masks.attachment import prunable
from slimming.scoring import iterative
from slimming.scoring.fisher import fisher_scores
from slimming.scoring.iterative import iterative_scores, raise_upper_half
from slimming.scoring.one_shot import OneShot

from .small import images, vit


def test_a_round_halves_a_group_at_most() -> None:
    """All groups but the first are cheap; each loses half of its units before any loses more."""
    groups, costs = 4, {"0": torch.arange(1.0, 9.0)} | {str(i): torch.arange(1.0, 9.0) / 100 for i in range(1, 4)}
    stays = {name: torch.ones(8, dtype=torch.bool) for name in costs}
    stays["1"][:4] = False
    ranked = {name: raise_upper_half(costs[name], stays[name], 10.0) for name in costs}
    cheap = [int((scores < 1).sum()) for scores in ranked.values()]
    assert cheap == [0, 4 + 2, 4, 4], "units of 0 and of the cheap half"
    assert len(ranked) == groups
    assert bool((ranked["1"][:4] == 0).all())
    assert [int(scores.argmax()) for scores in ranked.values()] == [7] * 4


@pytest.mark.parametrize("kind", ["token", "block", "width"], ids=str)
def test_what_goes_later_costs_no_less(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, asked = vit(), [labelled(batch) for batch in images()], []
    groups = [group for group in slimming.describe(model) if group.kind == kind]
    alone = {group.name: torch.rand(group.size, generator=torch.Generator().manual_seed(2)) + 1 for group in groups}

    def cheaper(*_: Any, after: Plan, **__: Any) -> dict[str, Tensor]:
        asked.append(sum(len(units) for units in after.kept.values()))
        return {name: score / 1000 for name, score in alone.items()}

    monkeypatch.setattr(iterative, "fisher_scores", cheaper)
    costs = torch.cat(list(iterative_scores(prunable(model), groups, alone, batches).values()))
    assert asked == sorted(set(asked), reverse=True), "each round takes more"
    gone = len(costs) - asked[0]
    first = costs.sort().values[:gone]
    assert gone > 0
    assert bool((first >= 1).all())
    assert bool((costs.sort().values[gone:] == first.max()).all())


def test_slopes_after_a_plan_are_those_of_the_cut_model() -> None:
    model, batches = vit(), [labelled(batch) for batch in images()]
    groups = slimming.describe(model)
    groups = [group for group in groups if group.kind in ("token", "width")]
    scored = OneShot(
        prunable=prunable(model), scores=fisher_scores(prunable(model), groups, batches), how="fisher", images=[]
    )
    plan = slimming.plan(scored, slimming.Budget(keep={"token": 0.5, "width": 0.5}), layout=FREE)
    small = slimming.cut(model, plan)
    found = fisher_scores(prunable(model), groups, batches, after=plan)
    expected = fisher_scores(
        prunable(small), [group for group in slimming.describe(small) if group.kind in ("token", "width")], batches
    )
    for name, units in plan.kept.items():
        if name in expected:
            assert torch.allclose(found[name][list(units)], expected[name], rtol=1e-4), name
