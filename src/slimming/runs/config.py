"""The settings of a whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from slimming.benchmarking.config import BenchConfig
from slimming.core.budget import Budget
from slimming.errors import ConfigError, nearest
from slimming.retraining.retrain import DistilConfig
from slimming.runs.setup import ModelConfig
from slimming.searching.config import SearchConfig
from slimming.training.config import DataConfig, TrainConfig

EACH, TOGETHER, PROGRESSIVE = RETRAININGS = ("each", "together", "progressive")
"""Ways from one search to a retrained model for every budget."""
RETRAIN = TrainConfig(epochs=10.0, lr=5e-4)
FREE_SECTIONS = ("name", "note", "budgets", "bench")
"""Settings that may change between two calls in one directory: what is done already does not depend on them."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One whole run.

    Attributes:
        name: title of the report.
        model: the dense model.
        data: the images.
        search: the search, or one-shot scoring with ``train.steps`` 0.
        budgets: what the pruned models may cost.
        hours: time for the whole run; it sets the lengths of search, retraining and latency measurement where they are
            at their defaults. None leaves them as they are.
        retraining: ``"each"`` retrains every budget by itself, ``"together"`` trains shared weights for all budgets
            (`slimming.train_slimmable`), ``"progressive"`` cuts each budget from the retrained next larger one.
        retrain: the training of each cut model, or the one training of all.
        distil: knowledge distillation from the dense model; None trains on labels only.
        bench: how latency is measured.
        note: a sentence on the data or the purpose, for the report.
        latency_table: file of the latency table, if a budget limits latency.
        compensate: how many training images to use for compensation at the cut (see `slimming.pruning.compensation`);
            labels are not used. 0 cuts without compensation.
        one_shot: how many training images to use for a one-shot cut of every budget, for comparison with the search
            (see `slimming.score`); 0 leaves the comparison out.

    Raises:
        ConfigError: a number out of range, no budget, one that is given twice, or ``hours`` with nothing to decide.
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
        for name in ("compensate", "one_shot"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)} images; it must be at least 0.")
        names = [budget.name for budget in self.budgets]
        if not names:
            raise ConfigError("budgets is empty; give at least one, for example: budgets: [{macs: 0.5}].")
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"Budget {name} is given twice; take one of them out.")
        if self.retraining not in RETRAININGS:
            choices = ", ".join(RETRAININGS)
            hint = nearest(self.retraining, RETRAININGS)
            raise ConfigError(f"retraining is {self.retraining!r}; choose one of {choices}.{hint}")
        if self.hours is not None:
            if not 0 < self.hours < math.inf:
                raise ConfigError(f"hours is {self.hours:g}; give the time that the run may take, such as 0.5.")
            if not (self.search_is_open or self.retrain_is_open):
                raise ConfigError(
                    "hours has nothing to decide: search.train and retrain both say how long they are. Drop hours, or "
                    "the steps and epochs of one of them."
                )

    @property
    def search_is_open(self) -> bool:
        """Whether the length of the search is at its default."""
        return _length(self.search.train) == _length(SearchConfig().train)

    @property
    def retrain_is_open(self) -> bool:
        """Whether the length of the retraining is at its default."""
        return _length(self.retrain) == _length(RETRAIN)

    @property
    def bench_is_open(self) -> bool:
        """Whether the time to measure is at its default."""
        return self.bench.seconds == BenchConfig().seconds


def _length(config: TrainConfig) -> tuple[float, int | None]:
    return config.epochs, config.steps
