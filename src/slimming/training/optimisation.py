"""Optimisation: parameter groups, optimizer, learning rate schedule, averaged weights, mixup."""

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

from slimming.core.copies import WithoutGraph
from slimming.errors import ConfigError, nearest
from slimming.training.config import TrainConfig

FINAL_LR_RATIO = 0.01


def parameter_groups(
    model: nn.Module, weight_decay: float, no_decay: Callable[[str], bool], lr_scale: Callable[[str], float]
) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay and learning rate scale.

    Parameters with fewer than two dimensions have no weight decay, nor have those for whose name ``no_decay`` returns
    True. A parameter that is registered several times occurs once, under its first name.
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
    """Return the timm optimizer that ``config`` names.

    Raises:
        ConfigError: there is no optimizer of this name, or no parameter is trainable.
    """
    if not groups:
        raise ConfigError("The model has no parameter that requires a gradient; set requires_grad to train.")
    known = [str(name) for name in list_optimizers()]
    if config.optimizer not in known:
        raise ConfigError(
            f"optimizer is {config.optimizer!r}, which timm.optim does not have.{nearest(config.optimizer, known)}"
        )
    return create_optimizer_v2(groups, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total: int, warmup: int) -> Scheduler:
    """Return a learning rate schedule; its ``step_update(step)`` depends on no earlier call."""
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
        # Divide by 10 after half and after three quarters of the steps (Liu et al. 2017, section 4.2).
        milestones = [warmup + (total - warmup) // 2, warmup + 3 * (total - warmup) // 4]
        return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=0.1, **common)
    return StepLRScheduler(optimizer, decay_t=total + 1, decay_rate=1.0, **common)


def make_mixup(config: TrainConfig, classes: int, images: int) -> Mixup | None:
    """Return timm's mixup and cutmix, which include label smoothing, or None if both are disabled.

    Args:
        config: training settings.
        classes: number of classes.
        images: images of one micro-batch, which are mixed with one another.

    Raises:
        ConfigError: a micro-batch has an odd number of images.
    """
    if not (config.mixup or config.cutmix):
        return None
    if images % 2:
        raise ConfigError(f"mixup and cutmix pair images, but a part of a batch has {images}; make it even.")
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes)


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of the parameters and buffers of a model, initialised with the model.

    A tensor that is registered several times is averaged once per step, and integer buffers are copied. If two
    tensors are multiplied, as a weight and its mask in a search, the product of their averages approximates the
    average of their product. The difference is their covariance over the averaging window, which is of second order
    in the learning rate.
    """
    ema: Callable[..., None] = get_ema_multi_avg_fn(decay)

    def update(averages: list[Tensor], current: list[Tensor], steps: Tensor) -> None:
        if averages[0].is_floating_point():
            ema(averages, current, steps)
        else:  # get_ema_multi_avg_fn would average integers and round down
            for average, value in zip(averages, current, strict=True):
                average.copy_(value)

    multi_avg_fn: Any = update
    with WithoutGraph():
        averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn, use_buffers=True)
    averaged.n_averaged.fill_(1)  # with 0 the first update would copy the model instead of averaging
    return averaged.eval().requires_grad_(False)
