"""Modes of modules, given back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from slimming.errors import ConfigError


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode and give every module its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_trainable(model: nn.Module) -> None:
    """Check that ``model`` has its weights in float32 or float64, as training needs.

    Raises:
        ConfigError: they are in half precision.
    """
    half = next((p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise ConfigError(
            f"The model's weights are {str(half).removeprefix('torch.')}, too coarse to train in: call model.float() "
            "first, and train with precision 'bf16' or 'fp16' to save time and memory."
        )


def train_heads_apart_(model: nn.Module, apart: bool) -> None:
    """Let a model with a distillation head give both heads' logits in training; others have no such mode."""
    switch = getattr(model, "set_distilled_training", None)  # timm's
    if switch is not None:
        switch(apart)
