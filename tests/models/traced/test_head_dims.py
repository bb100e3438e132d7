"""QK and V dimensions inside heads of models that are read by tracing: what is found, what is held, what is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import slimming
from models.traced.own_attention import Grouped, HeadsLast, KeysAndValues, Packed, Rotary, Separate, TalkingHeads, Vit
from models.traced.token_hosts import hf
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
    "norms of heads": (Separate, {"qk", "v"}, ""),
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


def test_heads_that_are_put_together_by_dimension_keep_the_same_values() -> None:
    model = Vit(HeadsLast)
    alike = {group.role: group.limits.alike for group in slimming.describe(model) if group.kind == "head_dim"}
    assert alike == {"qk": False, "v": True}
    assert slimming.check(model).ok


def test_heads_go_after_values_of_one_dimension_are_left(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    model = timm.create_model("eva02_tiny_patch14_224", num_classes=3, **sizes).eval()
    plan = Plan(kept={"blocks.0.attn.v": (0, 8, 16, 24)}, sizes={"blocks.0.attn.v": 32})
    small = slimming.cut(model, plan)
    small = slimming.cut(small, Plan(kept={"blocks.0.attn.heads": (0, 2)}, sizes={"blocks.0.attn.heads": 4}))
    slimming.save(small, tmp_path / "slim")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(slimming.load(tmp_path / "slim")(x), small(x))


def test_a_projection_whose_heads_are_not_found_again_stays_whole() -> None:
    model = Vit(Packed)
    kept = {f"blocks.{block}.mixer.v": (0, 8, 16, 24) for block in (0, 1)}
    small = slimming.cut(model, Plan(kept=kept, sizes=dict.fromkeys(kept, 32)))
    groups = slimming.describe(small)
    assert groups
    assert not any(group.name.startswith("blocks.0.mixer") and group.kind != "block" for group in groups)


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


def _eva(**settings: Any) -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_small_patch16_dinov3", **{**sizes, **settings}, num_classes=2).eval()


def _sam() -> nn.Module:
    settings = {"image_size": 64, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    windows = {"window_size": 3, "global_attn_indexes": [1], "output_channels": 16, "mlp_dim": 48}
    return transformers.SamVisionModel(transformers.SamVisionConfig(**settings, **windows)).eval()


UNEVEN: dict[str, tuple[Callable[[], nn.Module], bool, int]] = {
    "cosine": (lambda: _swin("swinv2_tiny_window8_256"), False, 1),
    "rotary pairs": (_eva, True, 2),
    "rotary pairs and norms": (lambda: _eva(qk_norm=True), True, 2),
    "relative positions of all heads": (_sam, True, 1),
}


@pytest.mark.parametrize(("made", "alike", "width"), UNEVEN.values(), ids=UNEVEN)
def test_qk_and_v_keep_different_sizes_and_the_slim_model_is_slimmed_again(
    made: Callable[[], nn.Module], alike: bool, width: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = made()
    assert slimming.check(model).ok
    size = 64 if isinstance(model, transformers.PreTrainedModel) else 32
    x = torch.randn(2, 3, size, size)
    for number in range(2):
        found = roles(model)
        assert set(found) >= {"qk", "v"}
        assert (found["qk"].limits.alike, found["qk"].width) == (alike, width)
        masks = slimming.attach(model)
        with torch.no_grad():
            for group in masks.groups:
                masks[group.name].fill_(0.5 if group.role == "v" else 0.9)
        plan = slimming.plan(masks, slimming.Budget(keep={"head_dim": 0.8}), layout=FREE)
        masks.detach_()
        model = slimming.cut(model, plan)
        uneven: list[Any] = [module for module in model.modules() if isinstance(module, SeparateLinear)]
        assert any(layer.head_sizes[0] != layer.head_sizes[-1] for layer in uneven)
        slimming.save(model, tmp_path / str(number))
        with torch.no_grad():
            first, again = model(x), slimming.load(tmp_path / str(number)).eval()(x)
        assert all(map(torch.equal, tree_leaves(first), tree_leaves(again)))


def test_a_slim_model_whose_sizes_become_equal_again_is_loaded(tmp_path: Path) -> None:
    model = _eva()
    for role in ("v", "qk"):
        group = roles(model)[role]
        units = tuple(unit for unit in range(group.size) if unit % group.limits.parts[0] < 6 / group.width)
        model = slimming.cut(model, Plan(kept={group.name: units}, sizes={group.name: group.size}))
    slimming.save(model, tmp_path / "slim")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(slimming.load(tmp_path / "slim")(x), model(x))


def test_a_slim_model_keeps_other_sizes_of_v_when_it_loses_heads(tmp_path: Path) -> None:
    model = hf("BeitForImageClassification", "BeitConfig")()
    for role, left in (("v", 6), ("head", 3)):
        group = next(group for group in slimming.describe(model) if group.role == role)
        size = group.limits.parts[0] if group.limits.parts else group.size
        units = tuple(unit for unit in range(group.size) if unit % size < left)
        model = slimming.cut(model, Plan(kept={group.name: units}, sizes={group.name: group.size}))
    slimming.save(model, tmp_path / "slim")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(slimming.load(tmp_path / "slim")(x).logits, model(x).logits)


def test_rotary_pairs_go_in_all_heads_alike_and_with_as_many_of_v(tmp_path: Path) -> None:
    model = _eva(embed_dim=64)
    group = roles(model)["qk"]
    assert group.limits.parts == (8,) * 4
    rows = next(part for part in group.slices if part.side == "query").index
    assert rows[1] == (1, 9)  # a half each
    assert group.inputs[0].path == ("rope",)
    assert group.inputs[0].index[1] == group.inputs[0].index[9] == (1, 9, 17, 25)
    kept = tuple(unit for unit in range(32) if unit not in (0, 9, 18, 27))
    with pytest.raises(PlanError, match="the same units in every head"):
        slimming.cut(model, Plan(kept={group.name: kept}, sizes={group.name: 32}))
    masks = slimming.attach(model)
    small = slimming.cut(model, slimming.plan(masks, slimming.Budget(keep={"head_dim": 0.6})))
    attention: Any = small.get_submodule("blocks.1.attn")
    assert type(attention.qkv) is nn.Linear
    assert attention.qkv.out_features == 3 * attention.proj.in_features < 3 * 64
    table = torch.randn(16, 32)
    x = torch.randn(1, 21, 64)
    with torch.no_grad():
        again = copy.deepcopy(attention)(x, rope=table)
        assert torch.equal(attention(x, rope=table), again)
        image = torch.randn(1, 3, 32, 32)
        program: Any = torch.export.export(small, (image,)).module()
        assert torch.allclose(program(image), small(image), atol=1e-6)


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
