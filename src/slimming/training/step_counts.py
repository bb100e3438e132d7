"""Number of optimizer steps of a training run: in total, per epoch, and during warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.data import DataLoader

from slimming.errors import ConfigError
from slimming.training.config import TrainConfig
from slimming.training.samples import ImageDataset, Loader, StreamDataset


@dataclass(frozen=True)
class StepCounts:
    """Optimizer steps of one training run.

    Attributes:
        total: steps of the whole run.
        per_epoch: steps of one epoch; ``total`` if the length of the data is unknown.
        warmup: steps of the linear warm-up, contained in ``total``.
    """

    total: int
    per_epoch: int
    warmup: int


def steps_per_epoch(train: ImageDataset | StreamDataset | Loader, batch_size: int) -> int | None:
    """Return the optimizer steps of one epoch, or None if the length of the data is unknown.

    Raises:
        ConfigError: there are fewer images than one batch holds.
    """
    if isinstance(train, StreamDataset):
        images = train.length
    elif isinstance(train, ImageDataset):
        images = len(train)
    else:
        return len(train) if isinstance(train, DataLoader) else None
    if images is not None and images < batch_size:
        raise ConfigError(f"batch_size {batch_size} is more than the {images} training images; make it smaller.")
    return None if images is None else images // batch_size


def count_steps(config: TrainConfig, train: ImageDataset | StreamDataset | Loader) -> StepCounts:
    """Convert the epochs of ``config`` to optimizer steps on ``train``.

    Raises:
        ConfigError: the batch is larger than the data, the length of an epoch is needed but unknown, or the warm-up
            fills the whole run.
    """
    per_epoch = steps_per_epoch(train, config.batch_size)
    if per_epoch is None and config.steps is None:
        raise ConfigError(
            "The number of training images is unknown, so epochs cannot be counted; set steps in place of epochs."
        )
    total = max(1, round(config.epochs * (per_epoch or 0))) if config.steps is None else config.steps
    per_epoch = per_epoch or total
    warmup = round(config.warmup_epochs * per_epoch)
    if total and warmup >= total:
        raise ConfigError(f"warmup_epochs {config.warmup_epochs:g} is all of the {total} steps; shorten it.")
    return StepCounts(total, per_epoch, warmup)
