"""Whole detectors, segmenters and pairs of encoders: read, cut, saved and loaded, heads and decoders included."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dense_models
import plain_networks
import slimming
import small_torchvision
from slimming.models.family import shared_parameters

LABELS = [{"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.6, 0.3, 0.2]])}]
LEARNING = {"RT-DETR v2", "D-FINE", "DETR"}
"""Detectors that are also read with labels, as in training."""
FAST = {"SegFormer", "ViTPose", "CLIP", "RetinaNet", "LR-ASPP", "FCN", "U-Net"}
LEAST = {
    "RT-DETR v2": 0.95,
    "D-FINE": 0.9,
    "DETR": 0.95,
    "Deformable DETR": 0.95,
    "YOLOS": 0.8,
    "SegFormer": 0.95,
    "Mask2Former": 0.65,
    "DPT": 0.7,
    "Depth Anything": 0.6,
    "SAM 2 encoder": 0.8,
    "SAM 2": 0.6,
    "CLIP": 0.8,
    "SigLIP": 0.8,
    "SigLIP 2": 0.8,
    "ViTPose": 0.95,
}
"""Least share of the multiply-adds in units that can go."""


def _cases(names: Any) -> list[Any]:
    return [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", _cases(dense_models.MODELS), ids=str)
def test_whole_models_of_transformers_keep_the_contract(name: str) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, call = dense_models.MODELS[name]()
    calls = [call, {**call, "labels": LABELS}] if name in LEARNING else call
    found = slimming.check(model, example_inputs=calls)
    assert found.ok, str(found)
    assert found.covered_macs > LEAST[name], str(found)


@pytest.mark.parametrize("name", _cases(small_torchvision.MODELS), ids=str)
def test_whole_models_of_torchvision_keep_the_contract(name: str) -> None:
    torch.manual_seed(0)
    model, calls = small_torchvision.MODELS[name]()
    found = slimming.check(model, example_inputs=calls)
    assert found.ok, str(found)
    assert found.covered_macs > (0.35 if name == "FCOS" else 0.85), str(found)
    assert ("evaluation and training" in found.steps[0].detail) == (name != "Keypoint R-CNN")


@pytest.mark.parametrize("name", _cases(plain_networks.MODELS), ids=str)
def test_networks_in_plain_pytorch_keep_the_contract(name: str) -> None:
    torch.manual_seed(0)
    model, (images,) = plain_networks.MODELS[name]()
    found = slimming.check(model, example_inputs=images)
    assert found.ok, str(found)
    assert found.covered_macs > 0.99, str(found)


class TiedHeads(nn.Module):
    """Two heads of different modules with the same weights, as detectors tie the box heads of their decoders."""

    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.second = self._head(), self._head()
        for own, other in zip(self.second, self.first, strict=True):
            if isinstance(own, nn.Linear) and isinstance(other, nn.Linear):
                own.weight, own.bias = other.weight, other.bias

    @staticmethod
    def _head() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x).relu().flatten(2).mT
        return self.first(features), self.second(features.flip(1) * 2)


def test_tied_heads_are_cut_together_and_stay_tied(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = TiedHeads().eval()
    found = slimming.check(model)
    assert found.ok, str(found)
    group = next(group for group in slimming.describe(model) if group.name.endswith("hidden"))
    assert {part.tensor for part in group.slices} == {
        f"{head}.{layer}" for head in ("first", "second") for layer in ("0.weight", "0.bias", "2.weight")
    }
    images = [torch.randn(8, 3, 8, 8)]
    for given in ([], images):
        masks = slimming.attach(copy.deepcopy(model))
        plan = slimming.plan(masks, slimming.Budget(keep={"mlp": 0.5, "channel": 0.5}), score="contribution")
        small: Any = slimming.cut(model, plan, images=given)
        assert small.first[0].weight.shape == (4, 3)
        assert small.first[0].weight is small.second[0].weight
        assert len(shared_parameters(small)) == 4
    slimming.save(small, tmp_path / "small")
    again: Any = slimming.load(tmp_path / "small", dense=TiedHeads())
    assert again.first[2].weight is again.second[2].weight
    assert all(torch.equal(a, b) for a, b in zip(again(images[0]), small(images[0]), strict=True))


def test_masks_of_tied_heads_are_folded_once() -> None:
    torch.manual_seed(0)
    model = TiedHeads().double().eval()
    masks = slimming.attach(model)
    with torch.no_grad():
        for mask in masks.values():
            mask.copy_(0.5 + torch.rand(mask.shape))
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    wanted = model(image)
    masks.fold_()
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(model(image), wanted, strict=True))
    assert model.first[0].weight is model.second[0].weight


def test_a_call_that_only_works_in_evaluation_is_no_gap_if_another_trains_the_same_modules() -> None:
    class Learner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

        def forward(self, image: Tensor, target: Tensor | None = None) -> Tensor:
            result = self.two(self.one(image).relu())
            if self.training and target is None:
                raise ValueError("no target")
            return result if target is None else (result - target).square().mean()

    image, target = torch.randn(1, 3, 8, 8), torch.randn(1, 2, 6, 6)
    both = slimming.check(Learner(), example_inputs=[(image,), (image, target)])
    alone = slimming.check(Learner(), example_inputs=(image,))
    assert both.ok, str(both)
    assert not [reason for reason in both.uncovered if "training mode" in reason]
    assert "training mode" in "".join(alone.uncovered)
