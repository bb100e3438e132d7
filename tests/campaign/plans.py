"""Random cuts of small models, each with the checks of `slimming.check`."""

from __future__ import annotations

import random

import timm
import torch

import slimming

from .tally import Tally

MODELS: dict[str, dict[str, object]] = {
    "test_vit": {"img_size": 32},
    "test_vit3": {"img_size": 64},
    "test_resnet": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "test_byobnet": {},
}


def attack(tally: Tally, times: int, seed: int) -> None:
    """Cut models with random weights at random units; outputs, gradients, costs and files must agree."""
    dice, names = random.Random(seed), list(MODELS)
    for number in range(times):
        name, keep = names[number % len(names)], dice.choice((0.95, 0.8, 0.6, 0.45, 0.3))
        torch.manual_seed(dice.randrange(2**31))
        model = timm.create_model(name, num_classes=dice.choice((2, 5, 1000)), **MODELS[name])
        checked = slimming.check(model, keep=keep, seed=dice.randrange(2**31))
        tally.add(None if checked.ok else f"{name} at {keep}: {checked}")
