"""QK and V dimensions inside heads of models that are read by tracing: what is found, what is held, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import slimming
from models.traced.own_attention import Grouped, KeysAndValues, Packed, Rotary, Separate, TalkingHeads, Vit
from slimming.core.groups import Group
from slimming.core.layout import FREE
from slimming.core.pruning_plan import Plan
from slimming.errors import PlanError
from slimming.masks.attachment import prunable
from slimming.models.separate import SeparateLinear
from slimming.training.samples import Data

FOUND: dict[str, tuple[type[nn.Module], set[str], str]] = {
    "packed": (Packed, {"qk", "v"}, ""),
    "einsum": (KeysAndValues, {"qk", "v"}, ""),
    "grouped queries": (Grouped, {"qk", "v"}, ""),
    "norms of heads": (Separate, {"v"}, "a norm over the head dimension"),
    "rotary, table inside": (Rotary, set(), "with a table that its forward computes"),
    "talking heads": (TalkingHeads, set(), ""),
}


def roles(model: nn.Module) -> dict[str, Group]:
    return {group.role: group for group in slimming.describe(model) if group.kind == "head_dim"}


@pytest.mark.parametrize(("attention", "wanted", "reason"), FOUND.values(), ids=FOUND)
def test_dimensions_are_found_by_what_is_computed(attention: type[nn.Module], wanted: set[str], reason: str) -> None:
    model = Vit(attention)
    found = slimming.check(model)
    assert found.ok, str(found)
    assert set(roles(model)) == wanted
    assert reason in str(found.uncovered)


def test_units_of_grouped_queries_are_those_of_a_key_head_with_its_queries() -> None:
    group = roles(Vit(Grouped))["qk"]
    assert group.limits.parts == (8, 8)
    rows = {part.tensor.rpartition(".")[0].rpartition(".")[2]: part.index for part in group.slices}
    assert rows["q_proj"][0] == (0, 8)
    assert rows["k_proj"][9] == (9,)


def _swin(name: str = "swin_tiny_patch4_window7_224") -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "img_size": 32, "window_size": 4}
    return timm.create_model(name, **sizes, num_classes=2).eval()


def test_plans_that_the_module_cannot_hold_are_refused() -> None:
    # torchvision's function for Swin takes the weights, so that queries, keys and values have one size.
    model = torchvision.models.SwinTransformer([4, 4], 24, [2], [2], [4, 4], num_classes=2)
    groups = {group.role: group for group in slimming.describe(model, example_inputs=torch.zeros(1, 3, 32, 32))}
    qk, v = groups["qk"], groups["v"]  # of the last block
    sizes = {qk.name: qk.size, v.name: v.size}
    for kept, reason in (
        ({qk.name: range(1, 24)}, "equally many in every head"),
        ({qk.name: (*range(6), *range(12, 18)), v.name: range(24)}, "equally many of both"),
    ):
        plan = Plan(
            kept={name: tuple(units) for name, units in kept.items()}, sizes={name: sizes[name] for name in kept}
        )
        with pytest.raises(PlanError, match=reason):
            slimming.cut(model, plan)


def test_v_keeps_another_size_where_a_norm_holds_qk_and_the_slim_model_is_slimmed_again(tmp_path: Path) -> None:
    model = _swin("swinv2_tiny_window8_256")
    assert set(roles(model)) == {"v"}
    x = torch.randn(2, 3, 32, 32)
    for number in range(2):
        masks = slimming.attach(model)
        plan = slimming.plan(masks, slimming.Budget(keep={"head_dim": 0.6, "mlp": 0.7}), layout=FREE)
        masks.detach_()
        model = slimming.cut(model, plan)
        attention: Any = model.get_submodule("layers.0.blocks.0.attn")
        assert isinstance(attention.qkv, SeparateLinear)
        assert attention.qkv.head_sizes[0] == 12 > attention.qkv.head_sizes[2]
        slimming.save(model, tmp_path / str(number))
        with torch.no_grad():
            assert torch.equal(slimming.load(tmp_path / str(number)).eval()(x), model(x))


def test_the_preset_of_the_paper_runs_on_swin(tmp_path: Path) -> None:
    model = _swin()
    draw = torch.Generator().manual_seed(0)
    images = TensorDataset(torch.randn(8, 3, 32, 32, generator=draw), torch.arange(8) % 2)
    data = Data(*(DataLoader(images, batch_size=4) for _ in range(2)), ("no", "yes"))
    paper = slimming.preset("paper")
    training = {"epochs": 1, "steps": 2, "batch_size": 4, "mixup": 0.0, "cutmix": 0.0, "eval_every": 0}
    config = dataclasses.replace(paper, train=dataclasses.replace(paper.train, **training))
    result = slimming.search(model, data, config)
    plan = slimming.plan(result, slimming.Budget(keep={"head_dim": 0.6, "mlp": 0.6}))
    small = slimming.cut(result.model, plan)
    attention: Any = small.get_submodule("layers.1.blocks.0.attn")
    assert attention.num_heads == 4
    assert attention.qkv.out_features == 3 * attention.proj.in_features < 3 * 48
    slimming.save(small, tmp_path / "slim")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(slimming.load(tmp_path / "slim").eval()(x), small.eval()(x))


def test_budgets_of_any_layout_keep_heads_of_one_size() -> None:
    model = _swin()
    masks = slimming.attach(model)
    plan = slimming.plan(masks, slimming.Budget(macs=0.6), layout=FREE, score="contribution")
    anatomy = prunable(model).anatomy
    for group in anatomy.groups:
        if group.role in ("qk", "v"):
            sizes = [sum(group.part_of_unit[unit] == head for unit in plan.kept[group.name]) for head in range(2)]
            assert len(set(sizes)) == 1
    assert isinstance(model(torch.randn(1, 3, 32, 32)), Tensor)
