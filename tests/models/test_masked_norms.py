"""Network Slimming (ICCV 2017): scales of BatchNorms as masks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import slimming
from slimming.core.layout import FREE
from slimming.demo import settings
from slimming.models.traced.verification import randomise_
from slimming.pruning.checks import distance

NETS = ["test_resnet", "test_efficientnet", "mobilenetv3_small_050"]


def small(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=10, pretrained_cfg_overlay={"input_size": (3, 64, 64)})


def test_the_masks_are_the_models_own_scales() -> None:
    model = small("test_resnet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = slimming.attach(model, norms=True)
    assert not masks.own()
    assert model.state_dict().keys() == before.keys()
    scales = {id(m.weight) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(id(mask) in scales for mask in masks.values())


def test_the_penalty_is_the_sum_over_all_scales_and_its_gradient_their_sign() -> None:
    model = small("test_resnet")
    masks = slimming.attach(model, norms=True, penalty={"channel": 1e-2})
    masks.penalty_sum = True
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.normal_()
    expected = sum(norm.weight.detach().abs().sum() for norm in norms)
    assert masks.penalty().item() == pytest.approx(1e-2 * float(expected), rel=1e-5)
    masks.penalty().backward()
    for norm in norms:
        assert norm.weight.grad is not None
        assert torch.allclose(norm.weight.grad, 1e-2 * norm.weight.sign())


@torch.no_grad()
@pytest.mark.parametrize("name", NETS, ids=str)
def test_masked_equals_cut_and_the_smallest_scales_go(name: str) -> None:
    model = small(name).double().eval()
    randomise_(model)
    masks = slimming.attach(model, norms=True)
    scores = masks.scores("mask")
    plan = slimming.plan(masks, slimming.Budget(keep={"channel": 0.6}), layout=FREE, score="mask")
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before = model(x)
    masks.apply_(plan)
    small_model = slimming.cut(model, plan)
    assert distance([model(x)], [small_model(x)]) < 1e-9
    assert distance([before], [model(x)]) > 1e-3
    kept = torch.cat([scores[n][list(units)] for n, units in plan.kept.items()])
    gone = torch.cat(
        [scores[n][[u for u in range(len(scores[n])) if u not in units]] for n, units in plan.kept.items()]
    )
    # One global ranking; only the last channel of a group may stay against it.
    assert (gone > kept.median()).sum() == 0
    assert slimming.cost(small_model).macs < slimming.cost(model).macs


def test_search_save_and_a_second_pass(tmp_path: Path) -> None:
    model = small("test_resnet")
    images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=32, val_limit=8)
    data = slimming.open_data(images, model)
    config = slimming.preset("network-slimming")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2, batch_size=8, lr=0.01))
    sizes = []
    for turn in range(2):
        result = slimming.search(model, data, config)
        result.save(tmp_path / f"pass{turn}")
        plan = slimming.plan(result, slimming.Budget(keep={"channel": 0.7}))
        again: Any = slimming.load_search(tmp_path / f"pass{turn}")
        assert slimming.plan(again, slimming.Budget(keep={"channel": 0.7})).kept == plan.kept
        model = slimming.cut(result.model, plan)
        sizes.append(slimming.cost(model).params)
    assert sizes[1] < sizes[0]
    slimming.save(model, tmp_path / "slim")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(slimming.load(tmp_path / "slim")(x), model.eval()(x))


def test_the_preset_is_the_papers() -> None:
    config = slimming.preset("network-slimming")
    assert (config.norms, config.penalty_sum, config.score, config.kinds) == (True, True, "mask", ("channel",))
    train = config.train
    assert (train.epochs, train.batch_size, train.lr, train.weight_decay) == (160, 64, 0.1, 1e-4)
    assert (train.optimizer, train.schedule) == ("nesterov", "step")


class Growing(nn.Module):
    """Two layers of a dense block: a channel of the stem passes two norms, and the second holds two groups."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
        self.two = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.two(torch.cat([x, self.one(x)], 1))


def test_what_is_collected_sums_over_the_norms_of_a_channel() -> None:
    model = Growing()
    randomise_(model)
    masks = slimming.attach(model, norms=True, penalty={"channel": 1e-3})
    masks.penalty_sum = True
    loss = model(torch.randn(4, 3, 16, 16)).square().mean()
    (loss + masks.penalty()).backward()
    masks.collect()
    first, second = model.one[0], model.two[0]
    assert isinstance(first, nn.BatchNorm2d)
    assert isinstance(second, nn.BatchNorm2d)

    def change(norm: nn.BatchNorm2d) -> torch.Tensor:
        assert norm.weight.grad is not None
        return (norm.weight * (norm.weight.grad - 1e-3 * norm.weight.sign())).detach()

    stem, grown = (next(n for n in masks if n.startswith(start)) for start in ("stem", "one"))
    assert torch.allclose(masks.collected[stem], (change(first) + change(second)[:8]).square(), rtol=1e-4)
    assert torch.allclose(masks.collected[grown], change(second)[8:].square(), rtol=1e-4)


def test_taylor_scores_take_the_penalty_out_once_however_many_scales_a_unit_has() -> None:
    model = timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    groups = [group for group in slimming.describe(model) if group.kind == "channel"]
    masks = slimming.attach(model, groups, penalty={"channel": 1.0}, norms=True)
    masks.penalty().backward()
    masks.collect()
    assert all(float(scores.max()) < 1e-12 for scores in masks.scores("taylor").values())


def test_no_penalty_is_not_the_default() -> None:
    masks = slimming.attach(timm.create_model("test_vit", img_size=32), penalty={})
    assert masks.penalty().item() == 0
