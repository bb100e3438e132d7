"""Tiny models of each kind, exported once for all tests."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import slimming
from slimming.core.budget import Budget
from slimming.core.layout import FREE, Layout
from slimming.masks.attachment import prunable
from slimming.models.hosts import name_classes
from variants import SMALL, randomise_

CLASSES = ("field", "forest", "river")


def dense() -> nn.Module:
    fit = {"input_size": (3, 32, 32), "crop_pct": 0.9, "mean": (0.3, 0.4, 0.5), "std": (0.2, 0.3, 0.4)}
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=3, pretrained_cfg_overlay=fit)
    randomise_(model, 0)
    name_classes(model, CLASSES)
    return model.eval()


def slim(layout: Layout) -> nn.Module:
    model = dense()
    masks = slimming.attach(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for mask in masks.values():
            nn.init.uniform_(mask)
    small = slimming.cut(model, slimming.plan(masks, Budget(macs=0.6), layout=layout, score="mask"))
    name_classes(small, CLASSES)
    return small.eval()


def cnn() -> nn.Module:
    model = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay={"input_size": (3, 32, 32)}).eval()
    model.image_size = 32
    masks = slimming.attach(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for mask in masks.values():
            nn.init.uniform_(mask)
    return slimming.cut(model, slimming.plan(masks, Budget(macs=0.6), score="mask")).eval()


MAKERS = {
    "dense": dense,
    "pruned tokens": lambda: slim(Layout()),
    "uneven heads": lambda: slim(FREE),
    "slim CNN": cnn,
}


def images(model: nn.Module, count: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count, *prunable(model).anatomy.input_shape, generator=generator).split(5))


def make(kind: str, directory: Path, to: list[str]) -> tuple[nn.Module, tuple[slimming.Exported, ...]]:
    model = MAKERS[kind]()
    return model, slimming.export(model, directory, to=to, images=images(model), agreement=0.0)
