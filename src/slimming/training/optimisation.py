"""What turns gradients into steps: parameter groups, schedule, averaged weights; and the mixing of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.optim import create_optimizer_v2, list_optimizers  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from slimming.errors import ConfigError, nearest
from slimming.training.config import TrainConfig

FINAL_LR_RATIO = 0.01


def parameter_groups(
    model: nn.Module, weight_decay: float, no_decay: Callable[[str], bool], lr_scale: Callable[[str], float]
) -> list[dict[str, Any]]:
    """Sort the trainable parameters by weight decay and learning rate.

    Parameters of fewer than two dimensions get no weight decay, nor those whose name ``no_decay`` names. A
    parameter that is registered in several places comes once, under its first name.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim < 2 or no_decay(name) else weight_decay
            groups.setdefault((decay, float(lr_scale(name))), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """Return timm's optimizer of the name that the config gives.

    Raises:
        ConfigError: no optimizer has this name, or nothing is trainable.
    """
    if not groups:
        raise ConfigError("The model has no parameter that requires a gradient; there is nothing to train.")
    known = [str(name) for name in list_optimizers()]
    if config.optimizer not in known:
        raise ConfigError(
            f"optimizer is {config.optimizer!r}, which timm.optim does not have.{nearest(config.optimizer, known)}"
        )
    return create_optimizer_v2(groups, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total: int, warmup: int) -> Scheduler:
    """Return a schedule whose ``step_update(step)`` sets each group's learning rate from the step alone."""
    low = FINAL_LR_RATIO * config.lr
    common: dict[str, Any] = {
        "warmup_t": warmup,
        "warmup_lr_init": low,
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    if config.schedule == "cosine":
        return CosineLRScheduler(optimizer, t_initial=max(1, total - warmup), lr_min=low, **common)
    if config.schedule == "step":
        # A tenth after one half and after three quarters (Network Slimming, section 4.2).
        turns = [warmup + (total - warmup) // 2, warmup + 3 * (total - warmup) // 4]
        return MultiStepLRScheduler(optimizer, decay_t=turns, decay_rate=0.1, **common)
    return StepLRScheduler(optimizer, decay_t=total + 1, decay_rate=1.0, **common)


def make_mixup(config: TrainConfig, classes: int, images: int) -> Mixup | None:
    """Return timm's mixup/cutmix, which also smooths the labels, or None where both are off.

    Args:
        config: says how strongly.
        classes: number of classes.
        images: images that are mixed with one another: a process's part of a batch.

    Raises:
        ConfigError: that part has an odd number of images.
    """
    if not (config.mixup or config.cutmix):
        return None
    if images % 2:
        raise ConfigError(f"mixup and cutmix pair images, but a part of a batch has {images}; make it even.")
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes)


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a model's parameters and buffers, which starts as the model is now.

    A tensor that is registered in several places is averaged once per step, and whole-number buffers are copied. Where
    two tensors are multiplied, as a weight and its mask in a search, the product of the averages is taken for the
    average of the product; what is lost is their covariance over the window, which is of second order in the learning
    rate.
    """
    ema: Callable[..., None] = get_ema_multi_avg_fn(decay)

    def move(averages: list[Tensor], current: list[Tensor], steps: Tensor) -> None:
        if averages[0].is_floating_point():
            ema(averages, current, steps)
        else:  # PyTorch would average counts as well, and round down
            for average, value in zip(averages, current, strict=True):
                average.copy_(value)

    update: Any = move
    averaged = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    averaged.n_averaged.fill_(1)  # the first update already averages; at 0 it would copy the model
    return averaged.eval().requires_grad_(False)
