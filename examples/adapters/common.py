"""What the adapters' examples share: the demo's satellite images, a small model, and the cut at the end."""

from __future__ import annotations

import argparse

import timm
import torch
from torch import Tensor, nn

import slimming
from slimming.demo import HERE
from slimming.training.batches import validation_batches

KINDS = ("head_dim", "mlp")


def parser(text: str | None) -> argparse.ArgumentParser:
    """Options of every example."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--steps", type=int, default=100)
    found.add_argument("--images", type=int, default=None, help="training images; all by default")
    found.add_argument("--output", default="runs/adapter", help="directory of the slim model")
    return found


def images(limit: int | None) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Training images (N, 3, 64, 64), their labels (N,) and the names of the classes."""
    source = slimming.DataConfig(
        source=str(HERE / "assets" / "eurosat"), augment="none", train_limit=limit, val_limit=limit
    )
    data = slimming.open_data(source, vit(10))
    batches = list(validation_batches(data.train, 500, 0, 1, 0))
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches]), data.classes


def vit(classes: int) -> nn.Module:
    """A small Vision Transformer of timm; with images of your own, one that is pretrained."""
    return timm.create_model("test_vit", img_size=64, patch_size=8, num_classes=classes)


def attach(model: nn.Module) -> slimming.masks.attachment.SoftMasks:
    """Masks on heads' dimensions and hidden units, or on all there is in models that have none of those."""
    groups = [group for group in slimming.describe(model) if group.kind in KINDS]
    return slimming.attach(model, groups or None)


def finish(model: nn.Module, masks: slimming.masks.attachment.SoftMasks, directory: str) -> nn.Module:
    """Plan half of the multiply-adds from what the search saw, cut, save, and say what it came to."""
    dense = slimming.cost(model)
    small = slimming.cut(model, slimming.plan(masks, slimming.Budget(macs=0.5)))
    slimming.save(small, directory)
    print(f"{slimming.cost(small).macs / dense.macs:.0%} of the MACs in {directory}")
    return small
