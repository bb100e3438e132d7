"""The settings of a run. Imports no PyTorch, so that ``--help`` is fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimming.benchmarking.config import BenchConfig
from slimming.core.argument_types import check_fields
from slimming.core.budget import Budget
from slimming.errors import ConfigError, nearest
from slimming.retraining.config import DistilConfig
from slimming.searching.config import RECORD, SearchConfig
from slimming.training.config import DataConfig, TrainConfig

EACH, TOGETHER, PROGRESSIVE = RETRAININGS = ("each", "together", "progressive")
"""Ways to retrain the models of all budgets after one search, see `RunConfig`."""
SEARCH_PLACE = "search"
"""Directory of the search in that of a run."""
CONFIG_FILE, CONFIG_START = "config.yaml", "# Settings of `slimming "
"""The configuration that a command writes, and how it begins."""
RETRAIN = TrainConfig(epochs=10.0, lr=5e-4)
FREE_SECTIONS = ("name", "note", "budgets", "bench")
"""Settings that may change when a run is resumed, since finished work does not depend on them."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dense model.

    Attributes:
        name: name of a timm model; ``hf-hub:owner/name`` for a model of slimming, timm or transformers on the hub;
            ``transformers:owner/name`` or ``transformers:DIRECTORY``; ``torchvision:name``; or a directory that
            `slimming.save`, timm or transformers wrote.
        checkpoint: file of local weights (``.safetensors``, or ``.pth`` with tensors only); null loads the pretrained
            weights of the library.
        arguments: further arguments of the model's constructor, such as ``img_size`` for timm.
    """

    name: str
    checkpoint: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings of a run.

    Attributes:
        name: title of the report.
        model: the dense model.
        data: the images.
        search: settings of the search.
        budgets: budgets to which the model is cut.
        hours: time budget of the run; it determines the lengths of search, retraining and measurement that are at their
            defaults. null leaves all lengths as they are set.
        retraining: ``"each"`` retrains every budget separately, ``"together"`` trains all budgets at once with shared
            weights (`slimming.train_slimmable`), ``"progressive"`` cuts each budget from the retrained model of the
            next larger one.
        retrain: settings of the retraining.
        distil: settings of the distillation from the dense model; null trains on labels only.
        bench: settings of the latency measurement.
        note: a sentence on the data or the purpose, for the report.
        latency_table: file of the latency table, for budgets that limit the latency.
        compensate: number of training images, used without labels, for the compensation at the cut (see
            `slimming.pruning.compensation`); 0 cuts without compensation.
        one_shot: number of training images, used without labels, with which every budget is also cut in one shot,
            without search or training, for comparison (see `slimming.score`); 0 skips this.

    Raises:
        ConfigError: a number is out of range, there is no budget, a budget is given twice, or ``hours`` is given
            although all lengths are set.
    """

    model: ModelConfig
    data: DataConfig
    budgets: tuple[Budget, ...]
    name: str = "slimming"
    hours: float | None = None
    search: SearchConfig = field(default_factory=SearchConfig)
    retraining: str = EACH
    retrain: TrainConfig = field(default_factory=lambda: RETRAIN)
    distil: DistilConfig | None = field(default_factory=DistilConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    note: str = ""
    latency_table: str | None = None
    compensate: int = 256
    one_shot: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("compensate", "one_shot"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)} images; it must be at least 0.")
        names = [budget.name for budget in self.budgets]
        if not names:
            raise ConfigError("budgets is empty; give at least one, for example: budgets: [{macs: 0.5}].")
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"Budget {name} is given twice; remove one of them.")
        if self.retraining not in RETRAININGS:
            choices = ", ".join(RETRAININGS)
            hint = nearest(self.retraining, RETRAININGS)
            raise ConfigError(f"retraining is {self.retraining!r}; choose one of {choices}.{hint}")
        if self.hours is not None:
            if not 0 < self.hours < math.inf:
                raise ConfigError(f"hours is {self.hours:g}; give the time that the run may take, such as 0.5.")
            if not (self.search_length_is_default or self.retrain_length_is_default):
                raise ConfigError(
                    "hours has no effect: the steps or epochs of both search.train and retrain are set. Drop hours, or "
                    "the steps and epochs of one of them."
                )

    @property
    def search_length_is_default(self) -> bool:
        """Whether ``hours`` determines the length of the search."""
        return _length(self.search.train) == _length(SearchConfig().train)

    @property
    def retrain_length_is_default(self) -> bool:
        """Whether ``hours`` determines the length of the retraining."""
        return _length(self.retrain) == _length(RETRAIN)

    @property
    def bench_seconds_is_default(self) -> bool:
        """Whether ``hours`` determines the measuring time."""
        return self.bench.seconds == BenchConfig().seconds


def is_own_config(path: Path) -> bool:
    """Return whether a configuration was written by a command, and possibly edited since."""
    try:
        return path.read_text("utf-8").startswith(CONFIG_START)
    except (OSError, UnicodeDecodeError):
        return False


def is_unscored(directory: Path) -> bool:
    """Return whether the search of the run in ``directory`` has no scores yet, so that they may be other ones."""
    return not (directory / SEARCH_PLACE / RECORD).exists()


def _length(config: TrainConfig) -> tuple[float, int | None]:
    return config.epochs, config.steps
