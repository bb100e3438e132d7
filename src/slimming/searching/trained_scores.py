"""Score the units of a trained search: the stage after the training, which keeps the training if it fails."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn

from slimming.core.calibration import labelled
from slimming.core.copies import copied
from slimming.errors import SlimmingError
from slimming.masks.soft_masks import SoftMasks, attached
from slimming.models.prunable import read_as
from slimming.planning.sensitivity import Sensitivity
from slimming.scoring.outputs import divergence, outputs_that_count
from slimming.scoring.redundancy import redundancy_scores
from slimming.scoring.registry import SCORES, Request, score_called
from slimming.scoring.sensitivity import sensitivity
from slimming.searching.config import SearchConfig
from slimming.training.batches import calibration_batches, first_batches
from slimming.training.distillation import MatchLoss
from slimming.training.distributed import agreed, of_main_process
from slimming.training.evaluation import autocast
from slimming.training.guards import explain_out_of_memory
from slimming.training.outputs import CountedOutput
from slimming.training.samples import Data
from slimming.training.tasks import ClassificationTask, LossTask, Task

BATCH_SIZE = 64
"""Largest number of images in one forward pass of a score."""


def score_trained(
    masks: SoftMasks, data: Data, config: SearchConfig, task: Task, kept: str
) -> tuple[dict[str, Tensor], str, Sensitivity | None]:
    """Return the score of each unit, how the units were scored, and the sensitivity of the kinds or None.

    Args:
        masks: the masks of a trained model, which is not changed.
        data: its training images are used.
        config: settings of the search.
        task: the task of the training.
        kept: how to call this stage again, for errors.

    Raises:
        SlimmingError: the score or the sensitivity cannot be computed; nothing is computed in its place.
    """
    collected = ", ".join(name for name, entry in SCORES.items() if entry.needs_training or not entry.needs_images)
    another = f"with search.score set to one that needs no images ({collected})"
    trained = kept if bool(masks.collected["steps"] > 0) else ""
    without = "with search.sensitivity set to 0, which skips the measurement"
    size = config.train.images_per_pass
    with (
        _Stage(f"Score {config.score!r} could not be computed", trained, another),
        agreed(),
        explain_out_of_memory(f"in forward passes of {min(BATCH_SIZE, size)} images"),
    ):
        scores, outputs = _scores(masks, config, data, task)
    with (
        _Stage("The sensitivity of the kinds could not be measured", trained, without),
        agreed(),
        explain_out_of_memory(f"in forward passes of {size} images"),
    ):
        measured = _sensitivity(masks, scores, config, data, task)
    # Those of the first process, so that all make the same plan.
    values, measured = of_main_process(({name: score.tolist() for name, score in scores.items()}, measured))
    custom = score_called(config.score).needs_images and not _trains_outputs(task) and config.score != "taylor"
    scored_by = f"{config.score}, by the gradients of the custom loss" if custom else config.score
    if len(outputs) > 1:
        scored_by += f", of {', '.join(f'{output.name} / {output.scale:.3g}' for output in outputs)}"
    return {name: torch.tensor(entries) for name, entries in values.items()}, scored_by, measured


class _Stage:
    """A stage after the training: its errors say that the training is kept, and how to go on."""

    def __init__(self, failed: str, kept: str, instead: str) -> None:
        self.failed = failed
        self.remedy = f" {kept} when this is mended, or {instead}." if kept else f" Mend this, or go on {instead}."

    def __enter__(self) -> None:
        """Begin the stage."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Add the remedy to an error; errors of the model or of a custom loss keep their class."""
        if isinstance(error, SlimmingError):
            raise type(error)(f"{self.failed}: {error}{self.remedy}") from error
        if isinstance(error, Exception) and sys.version_info >= (3, 11):
            error.add_note(f"{self.failed}.{self.remedy}")


def _scores(
    masks: SoftMasks, config: SearchConfig, data: Data, task: Task
) -> tuple[dict[str, Tensor], Sequence[CountedOutput]]:
    """One score per unit of the trained model, and the outputs that counted; empty if none were compared."""
    chosen = score_called(config.score)
    if chosen.needs_training or not chosen.needs_images:
        return masks.scores(config.score), ()
    model = copied(masks.model).eval()
    copied_masks = attached(model)
    assert copied_masks is not None
    if config.fold:
        copied_masks.fold_()
    copied_masks.detach_()
    size = min(BATCH_SIZE, config.train.images_per_pass)
    read = calibration_batches(data, config.images, batch_size=size, seed=config.train.seed)
    batches = [labelled(batch.images, batch.labels) for batch in read]
    if _trains_outputs(task):
        plain = read_as(model, masks.anatomy)
        outputs = outputs_that_count(model, batches)
        request = Request(
            prunable=plain,
            groups=masks.groups,
            batches=batches,
            masks=masks,
            seed=config.train.seed,
            outputs=outputs,
        )
        return chosen.function(request), outputs
    scores = {name: score.square() / 2 for name, score in masks.scores("taylor").items()}
    if config.score == "compensated":
        scores = redundancy_scores(model, masks.groups, scores, batches)
    return scores, ()


def _trains_outputs(task: Task) -> bool:
    """Whether the loss compares the outputs of the model, so that their Fisher scores measure the effect of a unit."""
    return isinstance(task, ClassificationTask) or (isinstance(task, LossTask) and isinstance(task.function, MatchLoss))


def _sensitivity(
    masks: SoftMasks, scores: Mapping[str, Tensor], config: SearchConfig, data: Data, task: Task
) -> Sensitivity | None:
    """Sensitivity on the first training images, of the outputs of a classifier or of the loss of another task.

    None if it is not asked for, or if there is only one kind.
    """
    if not config.sensitivity or len({group.kind for group in masks.groups}) < 2:
        return None
    model, train = masks.model.eval(), config.train
    device = next(model.parameters()).device
    first = first_batches(data, config.sensitivity, train.images_per_pass, train.seed, train.workers)
    batches = [(batch.images.to(device), batch.labels.to(device)) for batch in first]
    # Autocast caches copies of the weights until it exits, so each evaluation needs a new one.
    precise = partial(autocast, device, train.precision)
    with torch.no_grad(), precise():
        if isinstance(task, ClassificationTask):
            counted = outputs_that_count(model, [labelled(*batch) for batch in batches])
            measure = divergence(model, [images for images, _ in batches], counted)
        else:
            measure = _task_loss(task, device, batches)

    def loss(trial: nn.Module) -> float:
        with precise():
            return measure(trial)

    return sensitivity(masks, scores, config.layout, loss)


def _task_loss(
    task: Task, device: torch.device, batches: Sequence[tuple[Tensor, Tensor]]
) -> Callable[[nn.Module], float]:
    """Return a function that computes the mean loss of a model over the images."""

    def loss(trial: nn.Module) -> float:
        task.start(trial, device)
        try:
            parts = [task.loss(trial, *batch)["loss"].item() * len(batch[0]) for batch in batches]
        finally:
            task.stop()
        return sum(parts) / sum(len(images) for images, _ in batches)

    return loss
