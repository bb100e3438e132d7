"""What redundancy takes off a score: units that others predict cost nothing, and updates equal fresh inverses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimming.masks.attachment import prunable
from slimming.models import activations
from slimming.scoring.redundancy import ReadLayer, redundancy_scores

from .small import images, vit


def hidden(model: Any, importance: Tensor) -> Tensor:
    """What `redundancy_scores` makes of an importance of the first MLP's units."""
    group = prunable(model).anatomy.group("blocks.0.mlp.hidden")
    return redundancy_scores(model, [group], {group.name: importance}, images(4, 32))[group.name]


def test_of_twins_one_costs_nothing() -> None:
    model = vit()
    alone = hidden(model, torch.ones(192))
    with torch.no_grad():
        for name in ("weight", "bias"):
            tensor = model.blocks[0].mlp.fc1.get_parameter(name)
            tensor[3] = tensor[2]
    first, second = sorted(hidden(model, torch.ones(192))[2:4].tolist())
    assert first < 0.2 * alone[2]
    assert 0.8 * alone[2] < second < 1.2 * alone[2]


def test_what_is_constant_or_dead_costs_nothing() -> None:
    model = vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[:2] = 0.0
        model.blocks[0].mlp.fc1.bias[0] = 1.7  # constant: the bias of the next layer can hold it
        model.blocks[0].mlp.fc1.bias[1] = -50.0  # never active
    costs = hidden(model, torch.ones(192))
    assert costs[:2].max() < 0.01 * costs[2:].min()


def test_units_without_variance_cost_nothing() -> None:
    model = vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.zero_()
        model.blocks[0].mlp.fc1.bias.fill_(900.1)
    costs = hidden(model, torch.ones(192))
    assert bool(costs.isfinite().all())
    assert costs.max() < 0.01


def test_costs_never_exceed_importance_and_keep_what_is_unread() -> None:
    model = vit()
    groups = [group for group in prunable(model).anatomy.groups if group.role in ("mlp", "v", "head", "qk", "token")]
    importance = {group.name: torch.rand(group.size) + 0.5 for group in groups}
    costs = redundancy_scores(model, groups, importance, images())
    for group in groups:
        if group.role in ("qk", "token"):
            assert torch.equal(costs[group.name], importance[group.name])
        else:
            assert bool((costs[group.name] <= importance[group.name].max() * 1.001).all())
            assert bool((costs[group.name] >= 0).all())
            assert not torch.equal(costs[group.name], importance[group.name])


@pytest.mark.parametrize("width", [1, 3], ids=["one input each", "three inputs each"])
def test_downdates_equal_inverses_made_anew(width: int) -> None:
    """The shares after some units went are those of a layer that never had them."""
    generator, size = torch.Generator().manual_seed(0), 8 * width
    rows = torch.randn(200, size, generator=generator, dtype=torch.float64)
    rows @= torch.randn(size, size, generator=generator, dtype=torch.float64)
    power, added = rows.square().mean(0), torch.tensor(1e-3, dtype=torch.float64)
    covariance = rows.T @ rows / len(rows) + added * torch.eye(size, dtype=torch.float64)
    index = torch.arange(size).unflatten(0, (8, width)).tolist()
    layer = ReadLayer((covariance, power, added), index)
    layer.remove(torch.tensor([1, 2]))
    layer.remove(torch.tensor([0]))
    stays = slice(3 * width, None)
    anew = ReadLayer((covariance[stays, stays], power[stays], added), index[:5])
    units = torch.arange(3, 8)
    assert 0 < float(anew.unpredicted(units - 3).min()) < float(anew.unpredicted(units - 3).max()) < 1
    torch.testing.assert_close(layer.unpredicted(units), anew.unpredicted(units - 3))
    some = units[-3:]
    torch.testing.assert_close(layer.restricted_to(some).unpredicted(some), layer.unpredicted(some))


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    groups = [group for group in prunable(model).anatomy.groups if group.role in ("mlp", "v")]
    importance = {group.name: torch.ones(group.size) for group in groups}
    whole = redundancy_scores(model, groups, importance, images())
    monkeypatch.setattr(activations, "GIGABYTES", 1e-9)
    parts = redundancy_scores(model, groups, importance, images())
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
