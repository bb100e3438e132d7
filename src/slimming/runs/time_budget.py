"""How long each stage of a run is, given the hours that it may take and the pace of the machine."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from torch import nn

from slimming.runs.config import TOGETHER, RunConfig
from slimming.scoring.registry import SCORES
from slimming.training.batches import BatchShard, train_batches
from slimming.training.config import TrainConfig
from slimming.training.distributed import distributed_state, rank_and_world_size
from slimming.training.loop import fit
from slimming.training.samples import Data
from slimming.training.tasks import ClassificationTask

FORWARD = 1 / 3
"""A forward pass, in training steps of the same images."""
SCORING, CUTTING = 10.0, 3.0
"""Training steps' worth of work per image of scoring and of a compensated cut; measured on the demo's model."""
SPARE = 0.1
"""Share of the time that is left for what nobody counted."""
SEARCHING = 0.25
"""Share of the time for training and search that a search may have; retraining is what accuracy comes from."""
LEAST_SEARCH, LEAST_RETRAIN = 20, 50
"""Steps below which a search is left for scores in one shot, and which a retraining gets whatever the hours say."""
MOST_EPOCHS = 300.0
"""Of a retraining, as in ViT-Slim, section 4.1."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What the machine takes per training image, all processes together.

    Attributes:
        read_seconds: to read and augment it.
        step_seconds: for its part of a training step of the dense model, beyond reading.
    """

    read_seconds: float
    step_seconds: float

    def work(self, images: float, share: float = 1.0, *, distilled: bool = False) -> float:
        """Seconds to train on ``images`` a model that has this share of the MACs."""
        return images * (self.read_seconds + self.step_seconds * (share + FORWARD * distilled))

    def judge(self, images: float, share: float = 1.0) -> float:
        """Seconds to evaluate such a model on ``images``."""
        return self.work(images, FORWARD * share)


@dataclass(frozen=True, kw_only=True)
class Allotment:
    """What the hours were found to be enough for.

    Attributes:
        hours: that were granted.
        images_per_second: of a training step of the dense model.
        search_steps: 0 scores the model as it is; None is as the settings say.
        retrain_steps: of each training; None is as the settings say.
        bench_seconds: for each model at each batch size.
        expected_hours: what the run should take.
        seconds: stage -> how many of them, as expected.
    """

    hours: float
    images_per_second: float
    search_steps: int | None
    retrain_steps: int | None
    bench_seconds: float
    expected_hours: float
    seconds: dict[str, float]

    def line(self, config: RunConfig) -> str:
        """What was chosen, for the user, in one line."""
        one = "for all budgets together" if config.retraining == TOGETHER else "for each budget"
        search = {None: "search as set", 0: "scores in one shot"}.get(
            self.search_steps, f"search {self.search_steps} steps"
        )
        retrain = "retrain as set" if self.retrain_steps is None else f"retrain {self.retrain_steps} steps {one}"
        late = "; that is MORE than granted" if self.expected_hours > self.hours else ""
        return (
            f"{self.hours:g} h at {self.images_per_second:.0f} images/s: {search}, {retrain}, measure "
            f"{self.bench_seconds:.2g} s each; about {self.expected_hours:.2g} h{late}"
        )

    def applied(self, config: RunConfig) -> RunConfig:
        """The settings with what was chosen in place of the hours."""
        search, retrain = config.search, config.retrain
        if self.search_steps is not None:
            search = dataclasses.replace(search, train=dataclasses.replace(search.train, steps=self.search_steps))
        if self.retrain_steps is not None:
            retrain = dataclasses.replace(retrain, steps=self.retrain_steps)
        bench = dataclasses.replace(config.bench, seconds=self.bench_seconds)
        return dataclasses.replace(config, hours=None, search=search, retrain=retrain, bench=bench)


def allot(
    config: RunConfig,
    pace: Pace,
    shares: Sequence[float],
    *,
    epochs: tuple[int, int],
    val_images: int,
    spent_seconds: float = 0.0,
) -> Allotment:
    """Divide ``config.hours`` among the stages; the same for the same arguments.

    First comes what has to be done whatever the hours: scores, cuts, evaluations, measuring. A quarter of the rest at
    most is for a search of at most one epoch; if that is not enough for a tenth of one, the model is scored as it is.
    All else is for retraining, the same number of steps for every budget, so that each gets time in proportion to what
    its steps cost. Settings that are not at their defaults are left as they are and only counted.

    Args:
        config: the run; its ``hours`` are given.
        pace: of the machine.
        shares: of the dense model's MACs, one per budget.
        epochs: steps of an epoch of the search and of the retraining.
        val_images: in the validation data.
        spent_seconds: gone already.
    """
    assert config.hours is not None
    total = 3600 * config.hours
    places = (1 + len(shares)) * len(config.bench.batch_sizes)
    bench = config.bench.seconds
    if config.bench_is_open:
        bench = min(bench, max(0.2, 0.05 * total / places))
    seconds = {"before": spent_seconds, "bench": places * bench, **_fixed(config, pace, shares, val_images)}
    free = (1 - SPARE) * total - sum(seconds.values())

    search = config.search.train
    step = pace.work(search.batch_size) + pace.judge(val_images) * _evaluations(search, epochs[0])
    search_steps = None
    planned = _steps(search, epochs[0])
    if config.search_is_open:
        least = min(epochs[0], max(LEAST_SEARCH, -(-epochs[0] // 10)))
        # A retraining that the user fixed leaves the search all that is there.
        fixed = 0.0 if config.retrain_is_open else _retrain_step(config, pace, shares, epochs[1], val_images)
        room = (free - fixed * _steps(config.retrain, epochs[1])) * (SEARCHING if config.retrain_is_open else 1.0)
        planned = search_steps = min(epochs[0], max(0, int(room / step)))
        if search_steps < least:
            planned = search_steps = least if SCORES[config.search.score].needs_training else 0
    seconds["search"] = planned * step

    step = _retrain_step(config, pace, shares, epochs[1], val_images)
    retrain_steps = None
    planned = _steps(config.retrain, epochs[1])
    if config.retrain_is_open:
        most = round(MOST_EPOCHS * epochs[1])
        retrain_steps = int((free - seconds["search"]) / step)
        planned = retrain_steps = min(most, max(LEAST_RETRAIN, retrain_steps))
    seconds["retrain"] = planned * step
    return Allotment(
        hours=config.hours,
        images_per_second=1 / pace.work(1),
        search_steps=search_steps,
        retrain_steps=retrain_steps,
        bench_seconds=bench,
        expected_hours=sum(seconds.values()) / 3600,
        seconds=seconds,
    )


def _fixed(config: RunConfig, pace: Pace, shares: Sequence[float], val_images: int) -> dict[str, float]:
    """Seconds of what is done whatever the length of the trainings."""
    score = SCORES[config.search.score]
    own = config.search.images if score.needs_images and not score.needs_training else 0
    scoring = pace.work(SCORING * (own + config.one_shot))
    cuts = len(shares) * (1 + bool(config.one_shot))
    cut = pace.work(CUTTING * config.compensate) * cuts
    judge = pace.judge(val_images) + 2 * sum(pace.judge(val_images, share) for share in shares)
    return {"score": scoring, "cut": cut, "evaluate": judge}


def _retrain_step(config: RunConfig, pace: Pace, shares: Sequence[float], epoch: int, val_images: int) -> float:
    """Seconds of one step of every training that the budgets need, its part of the evaluations included."""
    distilled = config.distil is not None
    trained = [1.0] if config.retraining == TOGETHER else shares
    step = sum(pace.work(config.retrain.batch_size, share, distilled=distilled) for share in trained)
    return step + sum(pace.judge(val_images, share) for share in trained) * _evaluations(config.retrain, epoch)


def _evaluations(config: TrainConfig, epoch: int) -> float:
    """Evaluations per step."""
    return 1 / max(1.0, config.eval_every * epoch) if config.eval_every else 0.0


def _steps(config: TrainConfig, epoch: int) -> int:
    """Steps of a training as its settings say."""
    return max(1, round(config.epochs * epoch)) if config.steps is None else config.steps


def measure_pace(dense: nn.Module, data: Data, config: TrainConfig) -> Pace:
    """Time a few training steps of a copy of ``dense``, and the reading for them.

    Args:
        dense: the model, which stays as it is.
        data: its training images.
        config: whose batches and precision are taken.
    """
    distributed_state()  # joins them
    rank, world = rank_and_world_size()
    parts = world * config.accumulate
    batch_size = max(parts, min(config.batch_size, 64) // parts * parts)
    share = BatchShard(batch_size, config.accumulate, rank, world)
    batches = train_batches(data, share, config.seed, 0, config.workers)
    # Processes that read start here, and have two batches each ready before anyone asks: those are no measure.
    list(islice(batches, 2 * config.accumulate + 2 * config.workers))
    steps = 2 + 2 * config.workers
    began = time.monotonic()
    list(islice(batches, steps * config.accumulate))
    read = (time.monotonic() - began) / (steps * batch_size)
    few = dataclasses.replace(
        config, steps=4, log_every=2, eval_every=0.0, batch_size=batch_size, warmup_epochs=0.0, ema=None, mixup=0.0,
        cutmix=0.0, trackers=(),
    )  # fmt: skip
    history = fit(copy.deepcopy(dense), ClassificationTask(config.label_smoothing), data, few, title=None)
    rates = [line["images_per_second"] for line in history.log if "images_per_second" in line]
    # The few steps may have found their batches ready. Processes that read beside the training are waited for or not;
    # a fifth of the time is the step's in any case.
    whole = max(1 / rates[-1], read) if config.workers else 1 / rates[-1]
    read = min(read, 0.8 * whole)
    return Pace(read_seconds=read, step_seconds=whole - read)
