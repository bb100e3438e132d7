"""Copies of models: what a forward pass left in a model neither stops a step nor goes on with a copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

import slimming
from slimming.core.budget import Budget
from slimming.training.optimisation import averaged_model


class Leaving(nn.Module):
    """A model of a user whose forward leaves tensors with their graph in every kind of place."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)
        self.features: dict[str, Any] = {}
        self.history: list[Any] = []
        self.state = SimpleNamespace(last=None)
        self.last: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        self.last = self.features["map"] = self.state.last = x
        self.history = [(x,)]
        return self.fc(x.mean((2, 3)))


def _of_timm(name: str, size: int) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=3, pretrained_cfg_overlay={"input_size": (3, size, size)})


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "own": (Leaving, 16),
    "vit": (lambda: timm.create_model("test_vit", img_size=32, num_classes=3), 32),
    "resnet": (_of_timm("test_resnet", 32), 32),
}
SLOW: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "levit": (lambda: timm.create_model("levit_128s", num_classes=3), 224),
    "tiny_vit": (lambda: timm.create_model("tiny_vit_5m_224", num_classes=3), 224),
    "efficientformer": (lambda: timm.create_model("efficientformer_l1", num_classes=3), 224),
}


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)], ids=str)
def test_a_model_that_has_run_goes_through_all_steps(name: str, tmp_path: Path) -> None:
    make, size = {**MODELS, **SLOW}[name]
    torch.manual_seed(0)
    model = make().eval()
    image = torch.randn(1, 3, size, size)
    wanted = model(image)  # with gradients
    assert wanted.requires_grad
    assert slimming.cost(model).macs > 0
    masks = slimming.attach(model)
    kinds = {group.kind for group in masks.anatomy.groups} & {"mlp", "channel"}
    plan = slimming.plan(masks, Budget(keep=dict.fromkeys(kinds, 0.5)))
    masks.detach_()
    model(image)
    small = slimming.cut(model, plan)
    small(image)
    assert slimming.check(model).ok
    slimming.save(small, tmp_path / "small")
    loaded = slimming.load(tmp_path / "small", dense=make() if name == "own" else None)
    assert torch.equal(loaded(image), small(image))
    averaged_model(small, 0.9)


def test_a_copy_does_not_go_on_with_what_a_host_had_computed() -> None:
    from slimming.models.prunable import read

    model: Any = timm.create_model("levit_128s", num_classes=3).eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    attention = model.stages[0].blocks[0].attn
    assert attention.attention_bias_cache
    copy = read(model).copy().model
    assert not copy.get_submodule("stages.0.blocks.0.attn").attention_bias_cache
    assert attention.attention_bias_cache
