"""Costs of models with masks are those of the models without."""

from __future__ import annotations

import timm
import torch

import slimming
from slimming.masks.soft_masks import attached


def test_masks_cost_nothing() -> None:
    model = timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay={"input_size": (3, 32, 32)}).eval()
    plain = slimming.cost(model)
    masks = slimming.attach(model)
    assert slimming.cost(model) == plain
    assert attached(model) is masks
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()
