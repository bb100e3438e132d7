"""Images and labels that a model cannot take end in a sentence of slimming, through every public function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

import slimming
from slimming.errors import SlimmingError
from slimming.training.samples import Data

ARGUMENTS: dict[str, Any] = {
    "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 2,
}  # fmt: skip
NAN = float("nan")
IMAGES = {
    "channels": torch.zeros(4, 1, 16, 16),
    "size": torch.zeros(4, 3, 24, 24),
    "nan": torch.full((4, 3, 16, 16), NAN),
    "empty": torch.zeros(0, 3, 16, 16),
}
BATCHES = {
    "no image": (torch.zeros(0, 3, 16, 16), torch.zeros(0, dtype=torch.long)),
    "few labels": (torch.zeros(4, 3, 16, 16), torch.zeros(3, dtype=torch.long)),
    "many labels": (torch.zeros(4, 3, 16, 16), torch.zeros(5, dtype=torch.long)),
    "labels outside": (torch.zeros(4, 3, 16, 16), torch.full((4,), 9)),
    "real labels": (torch.zeros(4, 3, 16, 16), torch.zeros(4)),
    "no labels": torch.zeros(4, 3, 16, 16),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **ARGUMENTS).eval()


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> slimming.Plan:
    return slimming.plan(slimming.score(model, [torch.randn(4, 3, 16, 16)]), slimming.Budget(macs=0.8))


@pytest.mark.parametrize("name", IMAGES, ids=str)
def test_images_that_a_score_cannot_take(model: nn.Module, name: str) -> None:
    with pytest.raises(SlimmingError, match=r"images|not finite"):
        slimming.score(model, [IMAGES[name]])


@pytest.mark.parametrize("name", ["channels", "size", "nan"], ids=str)
def test_images_that_a_compensation_cannot_take(model: nn.Module, plan: slimming.Plan, name: str) -> None:
    with pytest.raises(SlimmingError, match=r"images|not finite"):
        slimming.cut(model, plan, images=[IMAGES[name]])


def test_weights_that_are_not_finite_are_found_before_a_basis_is_changed(model: nn.Module) -> None:
    broken = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS).eval()
    blocks: Any = broken.blocks
    blocks[1].attn.proj.weight.data[0, 0] = NAN
    with pytest.raises(SlimmingError, match="not finite"):
        slimming.score(broken, [torch.randn(4, 3, 16, 16)])


@pytest.mark.parametrize("name", BATCHES, ids=str)
@pytest.mark.parametrize("use", ["evaluate", "train"], ids=str)
def test_batches_that_do_not_fit_together(model: nn.Module, use: str, name: str) -> None:
    loader: Any = [BATCHES[name]]
    train = slimming.TrainConfig(steps=1, batch_size=4, eval_every=0, label_smoothing=0.0, schedule="constant")
    calls: dict[str, Callable[[], Any]] = {
        "evaluate": lambda: slimming.evaluate(model, loader),
        "train": lambda: slimming.train(
            timm.create_model("vit_tiny_patch16_224", **ARGUMENTS),
            Data(train=loader, val=loader, classes=("a", "b")),
            train,
        ),
    }
    with pytest.raises(SlimmingError):
        calls[use]()


def test_images_of_other_channels_are_evaluated_to_a_sentence(model: nn.Module) -> None:
    loader: Any = [(IMAGES["channels"], torch.zeros(4, dtype=torch.long))]
    with pytest.raises(SlimmingError, match=r"fails on images of shape \(4, 1, 16, 16\)"):
        slimming.evaluate(model, loader)
