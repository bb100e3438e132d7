"""Settings of training and data: `TrainConfig` and `DataConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimming.core.argument_types import check_fields
from slimming.errors import ConfigError, nearest

SCHEDULES = ("cosine", "constant", "step")
PRECISIONS = ("no", "bf16", "fp16")
POOLS = ("first", "mean")
"""The part of a module's outputs (B, N, D) that distillation compares: the first token, or the mean over tokens."""
AUGMENTATIONS = ("none", "light", "overhead", "deit")
# Settings that affect logging or speed but not the result; they may differ when a run is resumed.
FREE_SETTINGS = ("workers", "eval_every", "log_every", "checkpoint_seconds", "trackers")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training settings, shared by dense training, search and retraining.

    Attributes:
        epochs: passes over the training data; fractions are allowed.
        steps: optimizer steps, instead of ``epochs``. 0 trains nothing: a search then scores the model as it is.
        batch_size: images per optimizer step, over all processes and accumulated parts together.
        accumulate: parts that each process splits its share of a batch into, to save memory.
        optimizer: a name of ``timm.optim``.
        lr: learning rate at the end of warm-up; it is not rescaled with the batch size or the number of processes.
        weight_decay: weight decay of parameters with two or more dimensions.
        schedule: ``"cosine"`` down to 1 % of ``lr``, ``"constant"``, or ``"step"``: ``lr`` / 10 after half of the
            steps, ``lr`` / 100 after three quarters.
        warmup_epochs: epochs of linear warm-up, which are part of the total.
        clip_grad: largest gradient norm, or None.
        label_smoothing: share of the target spread over all classes.
        mixup: alpha of timm's mixup; 0 is off.
        cutmix: alpha of timm's cutmix; 0 is off.
        ema: decay of the averaged weights per step, or None.
        precision: autocast of the forward pass: ``"no"``, ``"bf16"`` or ``"fp16"``. Parameters stay float32.
        compile: run the model through ``torch.compile``.
        seed: random seed; seed, settings and data determine the result.
        workers: processes that read images; 0 reads in the training process. The result does not depend on
            it.
        eval_every: epochs between two evaluations; 0 evaluates at the end only.
        log_every: steps between two lines of the log.
        checkpoint_seconds: time between two saved states; 0 saves after every step.
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
        check_fields(self)
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
        val: the validation data, if it is not inside ``source``; for ``hf:`` the name of its split.
        split_fraction: share of the images of each class to hold out, if there is no validation data.
        image_key: column of the images in Parquet and ``hf:`` data.
        label_key: column of the labels in Parquet and ``hf:`` data.
        max_unreadable: share of the images that may be unreadable before reading stops with an error.
        train_limit: use only the first images of the training data.
        val_limit: use only the first images of the validation data.
        stream: read ``hf:`` data as a stream instead of downloading it first.
        augment: ``"none"``; ``"light"`` (crop, horizontal flip); ``"overhead"`` (light, and vertical flip and
            90-degree rotations, for images without an upright orientation); ``"deit"`` (RandAugment and random
            erasing).
        mean: mean of the pixels by channel, between 0 and 1, instead of the model's own. For `transformers:NAME` it is
            read from the processor; a transformers model that is passed in has none and gets ImageNet's.
        std: standard deviation of the pixels by channel, with the same defaults as ``mean``.
        value_range: values of black and white in images with one channel of more than 8 bits, such as ``[0, 4095]`` for
            12 bits in 16. By default that of the file: 65535 is white in 16 bits, or what a TIFF file states.
            Floating-point and 32-bit images need it.
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
    value_range: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
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
        if self.value_range is not None:
            increasing = len(self.value_range) == 2 and -math.inf < self.value_range[0] < self.value_range[1] < math.inf
            _require(increasing, "value_range", self.value_range, "two numbers, the lower one first, such as [0, 4095]")
        _choice("augment", self.augment, AUGMENTATIONS)
        if self.stream and not self.source.startswith("hf:"):
            raise ConfigError("stream is only for hf: data; other data is on the disk already. Drop stream.")


def check_distillation(alpha: float, temperature: float, pool: str, relation_heads: int) -> None:
    """Check settings of `DistilTask`.

    Raises:
        ConfigError: a value is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}; the teacher's share of the loss must be between 0 and 1.")
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; it must be above 0.")
    if pool not in POOLS:
        raise ConfigError(f"pool is {pool!r}; choose 'first' or 'mean'.{nearest(pool, POOLS)}")
    if relation_heads < 1:
        raise ConfigError(f"relation_heads is {relation_heads}; it must be at least 1.")


def _require(holds: bool, name: str, value: object, must: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value}; it must be {must}.")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}.{nearest(value, choices)}")
