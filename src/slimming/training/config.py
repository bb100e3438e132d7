"""Settings of training and data: `TrainConfig` and `DataConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimming.errors import ConfigError, nearest

SCHEDULES = ("cosine", "constant", "step")
PRECISIONS = ("no", "bf16", "fp16")
AUGMENTATIONS = ("none", "light", "overhead", "deit")
# Settings that affect logging or speed but not the result; they may differ when a run is resumed.
FREE_SETTINGS = ("workers", "eval_every", "log_every", "checkpoint_seconds", "trackers")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training settings, shared by dense training, search and retraining.

    Attributes:
        epochs: passes over the training data; may be fractional.
        steps: number of optimizer steps; overrides ``epochs``. With 0 nothing is trained, and a search scores the
            model as it is.
        batch_size: images per optimizer step, over all processes and accumulation steps.
        accumulate: gradient accumulation: number of micro-batches per process and step, to save memory.
        optimizer: name of an optimizer in ``timm.optim``.
        lr: learning rate at the end of warm-up; it is not scaled by the batch size.
        weight_decay: weight decay of parameters with two or more dimensions.
        schedule: ``"cosine"`` decay to 1 % of ``lr``, ``"constant"``, or ``"step"``: ``lr / 10`` from half of the
            steps on and ``lr / 100`` from three quarters on.
        warmup_epochs: epochs of linear warm-up, included in ``epochs``.
        clip_grad: maximum gradient norm, or None for no clipping.
        label_smoothing: label smoothing factor.
        mixup: alpha of timm's mixup; 0 disables it.
        cutmix: alpha of timm's cutmix; 0 disables it.
        ema: decay per step of the exponential moving average of the weights, or None for no average.
        precision: autocast of the forward pass: ``"no"``, ``"bf16"`` or ``"fp16"``. Parameters stay in float32.
        compile: run the model with ``torch.compile``.
        seed: random seed of the run.
        workers: number of worker processes that read images; 0 reads in the training process. It does not affect the
            result.
        eval_every: epochs between evaluations; 0 evaluates at the end only.
        log_every: steps between lines of the log.
        checkpoint_seconds: seconds between saved states; 0 saves after every step.
        trackers: names of Accelerate's trackers, such as ``"tensorboard"`` or ``"wandb"``.
    """

    epochs: float = 10.0
    steps: int | None = None
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    clip_grad: float | None = 1.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float | None = None
    precision: str = "no"
    compile: bool = False
    seed: int = 0
    workers: int = 0
    eval_every: float = 1.0
    log_every: int = 10
    checkpoint_seconds: float = 60.0
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        if self.steps is not None:
            _require(self.steps >= 0, "steps", self.steps, "0 or more")
        for name in ("epochs", "lr"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0")
        for name in (
            "weight_decay", "warmup_epochs", "mixup", "cutmix",
            "workers", "eval_every", "checkpoint_seconds", "seed",
        ):  # fmt: skip
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "at least 0 and below 1")
        if self.clip_grad is not None:
            _require(self.clip_grad > 0, "clip_grad", self.clip_grad, "above 0, or null for none")
        if self.ema is not None:
            _require(0 < self.ema < 1, "ema", self.ema, "between 0 and 1, or null for none")
        _choice("schedule", self.schedule, SCHEDULES)
        _choice("precision", self.precision, PRECISIONS)
        if self.steps is None and self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"warmup_epochs is {self.warmup_epochs:g} of {self.epochs:g} epochs; leave some epochs after warm-up."
            )

    @property
    def images_per_pass(self) -> int:
        """Images per forward pass in a single process, which determines the memory needed."""
        return max(1, self.batch_size // self.accumulate)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Location of the images and how they are read.

    Attributes:
        source: folder of class folders, Parquet files or tar shards; a single Parquet or tar file; or ``"hf:NAME"``
            for a data set of the ``datasets`` library.
        val: validation data outside ``source``; for ``hf:`` data the name of its split.
        split_fraction: fraction of each class to hold out for validation if there is no validation data.
        image_key: name of the image column in Parquet and ``hf:`` data.
        label_key: name of the label column in Parquet and ``hf:`` data.
        max_unreadable: fraction of the images that may be unreadable before reading stops with an error.
        train_limit: number of training images to use, counted from the first.
        val_limit: number of validation images to use, counted from the first.
        stream: stream ``hf:`` data instead of downloading it first.
        augment: ``"none"``; ``"light"`` (crop, horizontal flip); ``"overhead"`` (light, plus vertical flip and
            90-degree rotations, for images without a fixed orientation); ``"deit"`` (RandAugment and random erasing).
        mean: mean of the pixels per channel, between 0 and 1, instead of the mean of the model. `transformers:NAME`
            reads both from the processor; a transformers model object has none, and ImageNet's are used.
        std: standard deviation of the pixels per channel, instead of that of the model.
    """

    source: str
    val: str | None = None
    split_fraction: float | None = None
    image_key: str = "image"
    label_key: str = "label"
    max_unreadable: float = 0.01
    train_limit: int | None = None
    val_limit: int | None = None
    stream: bool = False
    augment: str = "light"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("data.source is empty; give a folder, a file, or hf:NAME.")
        if self.split_fraction is not None:
            _require(0 < self.split_fraction < 1, "split_fraction", self.split_fraction, "between 0 and 1")
            if self.val is not None:
                raise ConfigError("val and split_fraction are both given, but only one can be used; drop one.")
        _require(0 <= self.max_unreadable <= 1, "max_unreadable", self.max_unreadable, "between 0 and 1")
        for name in ("train_limit", "val_limit"):
            if getattr(self, name) is not None:
                _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        if self.image_key == self.label_key:
            raise ConfigError(f"image_key and label_key are both {self.image_key!r}; name two columns.")
        for value in self.std or ():
            _require(0 < value < math.inf, "std", self.std, "above 0 in each channel")
        _choice("augment", self.augment, AUGMENTATIONS)
        if self.stream and not self.source.startswith("hf:"):
            raise ConfigError("stream is only for hf: data; other data is on the disk already. Drop stream.")


def _require(holds: bool, name: str, value: object, must: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value}; it must be {must}.")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}.{nearest(value, choices)}")
