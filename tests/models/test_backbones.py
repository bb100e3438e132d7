"""Backbones inside a user's model, and models whose outputs are lists or dictionaries."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import slimming
from slimming.core.budget import Budget
from slimming.core.layout import FREE
from slimming.core.pruning_plan import Plan
from slimming.masks.attachment import prunable
from slimming.models.traced.verification import outputs
from variants import NOTED

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Segmenter(nn.Module):
    """A model of a user's own: a backbone and a head that reads its last feature map."""

    image_size = 32

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(channels, 3, 1)

    def forward(self, image: Tensor) -> dict[str, Any]:
        features = self.backbone(image)
        last = features[-1]
        if last.shape[1] == last.shape[2]:  # channels come last
            last = last.permute(0, 3, 1, 2)
        return {"mask": self.head(last), "sizes": [feature.shape[-1] for feature in features]}


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", features_only=True, out_indices=(1, 2)).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    arguments = {"depth": 3, "embed_dim": 48, "num_heads": 3, "patch_size": 8, "img_size": 32}
    return timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 2), **arguments).eval()


def swin() -> nn.Module:
    torch.manual_seed(0)
    arguments = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4, "img_size": 32}
    return timm.create_model(
        "swin_tiny_patch4_window7_224", patch_size=2, features_only=True, out_indices=(0, 1), **arguments
    ).eval()


def half(model: nn.Module) -> Plan:
    masks = slimming.attach(model)
    plan = slimming.plan(masks, Budget(keep=dict.fromkeys({group.kind for group in masks.groups}, 0.5)), layout=FREE)
    masks.detach_()
    return plan


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


BACKBONES = pytest.mark.parametrize(
    ("make", "channels"), [(cnn, 128), (vit, 48), (swin, 32)], ids=["FeatureListNet", "ViT", "Swin"]
)


@BACKBONES
def test_a_backbone_is_cut_and_the_rest_is_left_alone(make: Any, channels: int, tmp_path: Path) -> None:
    model = Segmenter(make(), channels).eval()
    head = copy.deepcopy(model.head.state_dict())
    dense = copy.deepcopy(model)
    masks = slimming.attach(model.backbone)
    assert outputs(model, IMAGE)[0].allclose(outputs(dense, IMAGE)[0])
    masks.detach_()
    before = [feature.shape for feature in model.backbone(IMAGE)]
    plan = half(model.backbone)
    model.backbone = slimming.cut(model.backbone, plan)
    assert size(model.backbone) < size(dense.backbone)
    assert all(torch.equal(tensor, head[name]) for name, tensor in model.head.state_dict().items())
    if make is not cnn:  # whose cut feature maps have fewer channels
        assert [feature.shape for feature in model.backbone(IMAGE)] == before
    model(IMAGE)["mask"].square().sum().backward()
    # The whole is saved with its slim part, and the user hands over the dense model.
    slimming.save(model, tmp_path / "whole")
    again = slimming.load(tmp_path / "whole", dense=dense)
    assert all(map(torch.equal, outputs(again, IMAGE), outputs(model, IMAGE)))


@NOTED
@pytest.mark.parametrize("make", [cnn, vit, swin], ids=["cnn", "vit", "swin"])
def test_a_cut_backbone_needs_no_one_to_be_loaded(make: Any, tmp_path: Path) -> None:
    model = make()
    part = slimming.cut(model, half(model))
    slimming.save(part, tmp_path / "part")
    assert all(map(torch.equal, slimming.load(tmp_path / "part")(IMAGE), part(IMAGE)))


@BACKBONES
def test_a_model_with_a_backbone_keeps_the_contract(make: Any, channels: int) -> None:
    found = slimming.check(Segmenter(make(), channels).eval())
    assert found.ok, str(found)


def test_a_model_is_cut_after_its_backbone_was(tmp_path: Path) -> None:
    dense = Segmenter(swin(), 32).eval()
    model = copy.deepcopy(dense)
    model.backbone = slimming.cut(model.backbone, half(model.backbone))
    once = size(model)
    model = slimming.cut(model, half(model))
    assert size(model) < once
    slimming.save(model, tmp_path / "twice")
    again = slimming.load(tmp_path / "twice", dense=dense)
    assert all(map(torch.equal, outputs(again, IMAGE), outputs(model, IMAGE)))


def test_intermediate_features_of_a_cut_model() -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("test_convnext", num_classes=3).eval()
    small: Any = slimming.cut(model, half(model))
    image = torch.randn(1, 3, 64, 64)
    last, found = small.forward_intermediates(image, indices=[0, 1])
    dense_last, dense = model.forward_intermediates(image, indices=[0, 1])
    assert last.shape == dense_last.shape
    assert [feature.shape for feature in found] == [feature.shape for feature in dense]


@NOTED
def test_a_backbone_of_timm_is_made_again_by_name() -> None:
    for make in (cnn, vit, swin):
        assert prunable(make()).anatomy.structure.base["host"] == "timm", make
