"""The smallest budget, and what it has to do with plans."""

from __future__ import annotations

import pytest
import timm

import slimming
from slimming.errors import BudgetError
from slimming.planning.budgeting import smallest
from variants import SMALL


def test_the_smallest_share_is_reached_and_nothing_below() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    masks = slimming.attach(model, [group for group in slimming.describe(model) if group.kind == "mlp"])
    least = smallest(masks, "params")
    assert 0 < least < 1
    made = slimming.plan(masks, slimming.Budget(params=least + 1e-6))
    assert slimming.cost(model, made).params / slimming.cost(model).params == pytest.approx(least)
    with pytest.raises(BudgetError, match="cannot be reached"):
        slimming.plan(masks, slimming.Budget(params=least - 1e-3))
