"""Divide a time budget in hours among the stages of a run, given the measured speed of the machine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from torch import nn

from slimming.core.copies import copied
from slimming.runs.config import TOGETHER, RunConfig
from slimming.scoring.registry import SCORES
from slimming.training.batches import BatchShard, train_batches
from slimming.training.config import TrainConfig
from slimming.training.distributed import distributed_state, rank_and_world_size
from slimming.training.loop import fit
from slimming.training.samples import Data
from slimming.training.tasks import ClassificationTask

FORWARD = 1 / 3
"""Time of a forward pass, as a share of a training step on the same images."""
SCORING, CUTTING = 10.0, 3.0
"""Time per image of scoring and of a compensated cut, in training steps; measured on the model of the demo."""
SPARE = 0.1
"""Share of the time that is not allocated, for work that the estimate does not include."""
SEARCHING = 0.25
"""Largest share of the training time for the search; retraining contributes more to the accuracy."""
LEAST_SEARCH, LEAST_RETRAIN = 20, 50
"""With fewer steps, the search is replaced by one-shot scores; a retraining has at least ``LEAST_RETRAIN`` steps."""
MOST_EPOCHS = 300.0
"""Largest number of epochs of a retraining, as in ViT-Slim, section 4.1."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Time per training image, with all processes working in parallel.

    Attributes:
        read_seconds: time to read and augment the image.
        step_seconds: further time of a training step of the dense model, divided by the batch size.
    """

    read_seconds: float
    step_seconds: float

    def training_seconds(self, images: float, share: float = 1.0, *, distilled: bool = False) -> float:
        """Return the seconds to train a model with this share of the dense model's MACs on so many images."""
        return images * (self.read_seconds + self.step_seconds * (share + FORWARD * distilled))

    def evaluation_seconds(self, images: float, share: float = 1.0) -> float:
        """Return the seconds to evaluate a model with this share of the dense model's MACs on so many images."""
        return self.training_seconds(images, FORWARD * share)


@dataclass(frozen=True, kw_only=True)
class TimeAllocation:
    """The lengths of the stages of a run that fit its time budget.

    Attributes:
        hours: the time budget.
        images_per_second: training speed of the dense model.
        search_steps: steps of the search; 0 scores the model in one shot; None keeps the length of the settings.
        retrain_steps: steps of each retraining; None keeps the length of the settings.
        bench_seconds: measuring time of each model at each batch size.
        expected_hours: expected time of the run.
        seconds: stage -> expected seconds.
    """

    hours: float
    images_per_second: float
    search_steps: int | None
    retrain_steps: int | None
    bench_seconds: float
    expected_hours: float
    seconds: dict[str, float]

    def line(self, config: RunConfig) -> str:
        """Return the chosen lengths as one line for the user."""
        per_training = "for all budgets together" if config.retraining == TOGETHER else "for each budget"
        search = {None: "search as set", 0: "one-shot scores"}.get(
            self.search_steps, f"search {self.search_steps} steps"
        )
        steps = self.retrain_steps
        retrain = "retrain as set" if steps is None else f"retrain {steps} steps {per_training}"
        late = "; that is MORE than granted" if self.expected_hours > self.hours else ""
        return (
            f"{self.hours:g} h at {self.images_per_second:.0f} images/s: {search}, {retrain}, measure "
            f"{self.bench_seconds:.2g} s each; about {self.expected_hours:.2g} h{late}"
        )

    def applied(self, config: RunConfig) -> RunConfig:
        """Return the settings with the chosen lengths instead of ``hours``."""
        search, retrain = config.search, config.retrain
        if self.search_steps is not None:
            search = dataclasses.replace(search, train=dataclasses.replace(search.train, steps=self.search_steps))
        if self.retrain_steps is not None:
            retrain = dataclasses.replace(retrain, steps=self.retrain_steps)
        bench = dataclasses.replace(config.bench, seconds=self.bench_seconds)
        return dataclasses.replace(config, hours=None, search=search, retrain=retrain, bench=bench)


def allocate(
    config: RunConfig,
    pace: Pace,
    shares: Sequence[float],
    *,
    epochs: tuple[int, int],
    val_images: int,
    spent_seconds: float = 0.0,
) -> TimeAllocation:
    """Divide ``config.hours`` among the stages of a run.

    Scores, cuts, evaluations and measurements, whose time does not depend on the hours, are subtracted first. At most a
    quarter of the rest is for the search, up to one epoch; if it is not enough for a tenth of an epoch and
    `LEAST_SEARCH` steps, the model is scored in one shot instead, unless the score needs training. The remaining time
    is for retraining, with the same number of steps for every budget. Lengths that are not at their defaults are not
    changed.

    Args:
        config: settings of the run; ``hours`` is set.
        pace: speed of the machine.
        shares: share of the dense model's MACs of each budget.
        epochs: steps of one epoch of the search and of the retraining.
        val_images: number of validation images.
        spent_seconds: time that was already used.
    """
    assert config.hours is not None
    total = 3600 * config.hours
    measurements = (1 + len(shares)) * len(config.bench.batch_sizes)
    bench = config.bench.seconds
    if config.bench_seconds_is_default:
        bench = min(bench, max(0.2, 0.05 * total / measurements))
    seconds = {"before": spent_seconds, "bench": measurements * bench, **_fixed(config, pace, shares, val_images)}
    free = (1 - SPARE) * total - sum(seconds.values())

    search = config.search.train
    evaluation = pace.evaluation_seconds(val_images) * _evaluations(search, epochs[0])
    search_step = pace.training_seconds(search.batch_size) + evaluation
    retrain_step = _retrain_step(config, pace, shares, epochs[1], val_images)
    retrain_steps = _steps(config.retrain, epochs[1])
    search_steps = _steps(search, epochs[0])
    if config.search_length_is_default:
        # If the length of the retraining is set, the search gets all remaining time.
        room = SEARCHING * free if config.retrain_length_is_default else free - retrain_step * retrain_steps
        search_steps = _search_steps(config, epochs[0], room / search_step)
    seconds["search"] = search_steps * search_step
    if config.retrain_length_is_default:
        affordable = int((free - seconds["search"]) / retrain_step)
        retrain_steps = min(round(MOST_EPOCHS * epochs[1]), max(LEAST_RETRAIN, affordable))
    seconds["retrain"] = retrain_steps * retrain_step
    return TimeAllocation(
        hours=config.hours,
        images_per_second=1 / pace.training_seconds(1),
        search_steps=search_steps if config.search_length_is_default else None,
        retrain_steps=retrain_steps if config.retrain_length_is_default else None,
        bench_seconds=bench,
        expected_hours=sum(seconds.values()) / 3600,
        seconds=seconds,
    )


def _search_steps(config: RunConfig, epoch: int, affordable: float) -> int:
    """Steps of a search for which the time is enough: at most one epoch, or 0 for one-shot scores."""
    steps = min(epoch, max(0, int(affordable)))
    least = min(epoch, max(LEAST_SEARCH, -(-epoch // 10)))
    if steps >= least:
        return steps
    return least if SCORES[config.search.score].needs_training else 0


def _fixed(config: RunConfig, pace: Pace, shares: Sequence[float], val_images: int) -> dict[str, float]:
    """Seconds by stage of the work that does not depend on the lengths of the trainings."""
    score = SCORES[config.search.score]
    scored_images = config.search.images if score.needs_images and not score.needs_training else 0
    scoring = pace.training_seconds(SCORING * (scored_images + config.one_shot))
    cuts = len(shares) * (1 + bool(config.one_shot))
    cutting = pace.training_seconds(CUTTING * config.compensate) * cuts
    slim = sum(pace.evaluation_seconds(val_images, share) for share in shares)
    return {"score": scoring, "cut": cutting, "evaluate": pace.evaluation_seconds(val_images) + 2 * slim}


def _retrain_step(config: RunConfig, pace: Pace, shares: Sequence[float], epoch: int, val_images: int) -> float:
    """Seconds of one step of all retrainings, including their share of the evaluations."""
    distilled = config.distil is not None
    trained = [1.0] if config.retraining == TOGETHER else shares
    step = sum(pace.training_seconds(config.retrain.batch_size, share, distilled=distilled) for share in trained)
    evaluation = sum(pace.evaluation_seconds(val_images, share) for share in trained)
    return step + evaluation * _evaluations(config.retrain, epoch)


def _evaluations(config: TrainConfig, epoch: int) -> float:
    """Number of evaluations per step."""
    return 1 / max(1.0, config.eval_every * epoch) if config.eval_every else 0.0


def _steps(config: TrainConfig, epoch: int) -> int:
    """Number of steps of a training by its settings."""
    return max(1, round(config.epochs * epoch)) if config.steps is None else config.steps


def measure_pace(dense: nn.Module, data: Data, config: TrainConfig) -> Pace:
    """Measure the time of a few training steps of a copy of ``dense``, and of reading their images.

    Args:
        dense: the dense model, which is not changed.
        data: the images.
        config: settings of the training, of which batch size, precision and workers are used.
    """
    distributed_state()  # initialises the process group
    rank, world = rank_and_world_size()
    parts = world * config.accumulate
    batch_size = max(parts, min(config.batch_size, 64) // parts * parts)
    share = BatchShard(batch_size, config.accumulate, rank, world)
    batches = train_batches(data, share, config.seed, 0, config.workers)
    # The workers start here and prefetch two batches each, whose time must not be measured.
    list(islice(batches, 2 * config.accumulate + 2 * config.workers))
    steps = 2 + 2 * config.workers
    began = time.monotonic()
    list(islice(batches, steps * config.accumulate))
    read = (time.monotonic() - began) / (steps * batch_size)
    few = dataclasses.replace(
        config, steps=4, log_every=2, eval_every=0.0, batch_size=batch_size, warmup_epochs=0.0, ema=None, mixup=0.0,
        cutmix=0.0, trackers=(),
    )  # fmt: skip
    history = fit(copied(dense), ClassificationTask(config.label_smoothing, data.classes), data, few, title=None)
    rates = [line["images_per_second"] for line in history.log if "images_per_second" in line]
    # The batches of the few steps may have been prefetched: with workers, a step takes at least as long as reading. At
    # least a fifth of the time is attributed to the step.
    whole = max(1 / rates[-1], read) if config.workers else 1 / rates[-1]
    read = min(read, 0.8 * whole)
    return Pace(read_seconds=read, step_seconds=whole - read)
