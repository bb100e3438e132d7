"""Embedding widths of models without a family of their own: one group per residual stream, exact like the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

import slimming
from slimming.core.budget import Budget
from slimming.core.groups import Group
from slimming.core.layout import FREE
from slimming.core.pruning_plan import Plan
from slimming.counting.measured import count
from slimming.masks.attachment import prunable
from slimming.masks.soft_masks import SoftMasks
from slimming.models.traced.verification import randomise_
from slimming.pruning.checks import EXACT, distance
from variants import FOLLOWED, NOTED

transformers = pytest.importorskip("transformers")

SWIN = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "img_size": 56, "num_classes": 3}


def timm_swin() -> nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", **SWIN)


def torchvision_swin() -> nn.Module:
    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": [7, 7]}
    model = SwinTransformer(**sizes, num_classes=3)  # pyright: ignore
    model.image_size = 56  # pyright: ignore
    return model


def segformer() -> nn.Module:
    sizes = {"hidden_sizes": [16, 32, 40, 48], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 5, 3]}
    return transformers.SegformerForImageClassification(transformers.SegformerConfig(**sizes, image_size=64))


def hub_swin() -> nn.Module:
    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 56, "window_size": 7}
    return transformers.SwinForImageClassification(transformers.SwinConfig(**sizes))


def hub_vit() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "ConvNeXt": (lambda: timm.create_model("test_convnext", num_classes=3), [24, 32, 48, 64]),
    "Swin": (timm_swin, [24, 48]),
    "Swin of torchvision": (torchvision_swin, [16, 32]),
    "Swin of transformers": (hub_swin, [16, 32]),
    # Its head asks the configuration for the width of the last stage.
    "SegFormer": (segformer, [16, 32, 40]),
    "ViT of transformers": (hub_vit, [32]),
}
"""By name: how it is made, and its widths."""
models = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=FOLLOWED) if name == "SegFormer" else name for name in MODELS], ids=str
)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval().double()


def widths_of(model: nn.Module) -> list[Group]:
    return [group for group in slimming.describe(model) if group.kind == "width"]


def picture(model: nn.Module, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *prunable(model).anatomy.input_shape, generator=generator, dtype=torch.float64)


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():  # some hosts keep tensors with a graph, and cannot be copied then
        found: Any = model(x)
    return getattr(found, "logits", found)


def masked(model: nn.Module, groups: list[Group], keep: float) -> tuple[SoftMasks, Plan]:
    masks = slimming.attach(model, groups)
    with torch.no_grad():
        for number, mask in enumerate(masks.values()):
            generator = torch.Generator().manual_seed(number)
            mask.copy_(0.3 + torch.rand(mask.shape, generator=generator))
    plan = slimming.plan(masks, Budget(keep={"width": keep}), layout=FREE, score="mask")
    masks.apply_(plan)
    return masks, plan


@models
def test_every_promise_is_kept(name: str) -> None:
    model = make(name)
    assert [group.size for group in widths_of(model)] == MODELS[name][1]
    found = slimming.check(model)
    # A model that no host makes by name cannot be loaded without its maker.
    steps = [step for step in found.steps if "loads" not in step.name or name != "Swin of torchvision"]
    assert len(steps) >= 2
    assert all(step.held for step in steps), found


@models
def test_a_width_goes_without_the_heads(name: str) -> None:
    """A forward that ties the heads to the width is changed although every head stays."""
    model = make(name)
    randomise_(model)
    x, groups = picture(model), widths_of(model)
    masks, plan = masked(model, groups, 0.6)
    expected = output(model, x)
    small = slimming.cut(model, plan)
    assert distance([output(small, x)], [expected]) < EXACT
    assert slimming.cost(small).macs == pytest.approx(count(small, prunable(small).anatomy.input_shape).macs, rel=0.005)
    assert slimming.cost(small).params == sum(tensor.numel() for tensor in small.parameters())
    assert all(len(plan.kept[group.name]) < group.size for group in groups)
    masks.detach_()
    assert not torch.allclose(output(model, x), expected), "the norms see every feature again"


@NOTED
def test_a_stage_is_cut_alone_and_the_model_is_used_on(tmp_path: Path) -> None:
    model: Any = timm_swin().eval()
    first, last = widths_of(model)
    masks = slimming.attach(model, [last])
    nn.init.uniform_(masks[last.name])
    small: Any = slimming.cut(model, slimming.plan(masks, Budget(keep={"width": 0.5}), layout=FREE, score="mask"))
    assert [group.size for group in widths_of(small)] == [first.size, last.size // 2]
    assert small.num_features == last.size // 2
    x = picture(small).float()
    slimming.save(small, tmp_path / "small")
    assert torch.equal(slimming.load(tmp_path / "small")(x), small(x))
    small.reset_classifier(5)
    assert small(x).shape == (2, 5)


def test_widths_are_planned_with_the_rest_once_they_are_asked_for() -> None:
    model = timm_swin().eval()
    masks = slimming.attach(model)
    assert "width" not in {group.kind for group in masks.groups}
    masks.detach_()
    found = slimming.score(model, [picture(model).float()], kinds=["head", "mlp", "width"])
    before = slimming.cost(model).macs
    plan = slimming.plan(found, Budget(macs=0.3))
    gone = {
        group.kind
        for group in slimming.describe(model)
        if len(plan.kept.get(group.name, range(group.size))) < group.size
    }
    assert gone == {"head", "mlp", "width"}
    small = slimming.cut(found.model, plan, images=[picture(model).float()])
    assert 0.25 * before < slimming.cost(small).macs <= 0.3 * before
    loss = small(picture(model).float()).square().sum()
    loss.backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in small.parameters() if tensor.grad is not None)


def test_a_width_that_only_attention_reads_needs_no_norm() -> None:
    """LeViT normalises with BatchNorms, whose statistics are of each channel alone."""
    model = timm.create_model("levit_128s", num_classes=3).eval().double()
    groups = widths_of(model)
    assert [(group.size, group.norms) for group in groups] == [(128, ()), (256, ()), (384, ())]
    randomise_(model)
    x = picture(model, 1)
    _, plan = masked(model, groups, 0.5)
    expected = output(model, x)
    assert distance([output(slimming.cut(model, plan), x)], [expected]) < EXACT
