"""Train a dense or slim model on labels, by distillation from a teacher, or with a custom loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from slimming.core.argument_types import checked_arguments
from slimming.core.groups import Group
from slimming.errors import ConfigError, UnsupportedModelError
from slimming.masks.attachment import prunable
from slimming.models.hosts import name_classes
from slimming.retraining.config import DistilConfig
from slimming.training.config import TrainConfig
from slimming.training.distillation import DistilTask
from slimming.training.distributed import agreed
from slimming.training.inputs import training_inputs
from slimming.training.loop import History, fit
from slimming.training.samples import Data
from slimming.training.tasks import ClassificationTask, Loss, LossTask, Task


@checked_arguments
@agreed()
def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    teacher: nn.Module | None = None,
    *,
    distil: DistilConfig | None = None,
    directory: str | Path | None = None,
    resume: bool = False,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    loss: Loss | None = None,
    title: str = "training",
) -> History:
    """Train ``model`` in place; with a teacher, by distillation from its logits (Hinton et al. 2015).

    Without a custom loss, the names of the classes are stored in the model, as ``label_names`` in ``pretrained_cfg``.

    Args:
        model: a dense or slim model.
        data: training and validation images, see `slimming.open_data`; or your own data loaders.
        config: the settings.
        teacher: model to distil from, usually the dense model.
        distil: settings of the distillation.
        directory: directory for the state and the log, from which an interrupted training can be resumed.
        resume: resume from the state in ``directory`` if there is one.
        evaluate: called with the model every ``config.eval_every`` epochs; the result is written to the log.
        loss: custom loss that replaces labels and teacher, see `slimming.training.tasks.Loss`.
        title: name of the progress bar.

    Raises:
        ConfigError, DataError, NonFiniteLossError, Interrupted, OutputError, CheckpointError: see
            `slimming.training.loop.fit`; ConfigError also if a resumed training was started with other weights or
            images, see `slimming.training.inputs`.

    >>> import timm, slimming
    >>> from slimming.demo import settings
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=8, val_limit=8)
    >>> data = slimming.open_data(images, model)
    >>> slimming.train(model, data, slimming.TrainConfig(steps=2, batch_size=4)).steps
    2
    """
    config = config or TrainConfig()
    target = Path(directory) if directory is not None else None
    task = task_of(model, config, teacher, distil, loss, data.classes)
    inputs = training_inputs(target, {"the model": model, "the teacher": teacher}, data)
    if loss is None:
        name_classes(model, data.classes)
    return fit(
        model, task, data, config, directory=target, resume=resume, evaluate=evaluate, title=title, inputs=inputs
    )


def task_of(
    model: nn.Module,
    config: TrainConfig,
    teacher: nn.Module | None,
    distil: DistilConfig | None,
    loss: Loss | None,
    classes: Sequence[str],
) -> Task:
    """Return the task of `train`: classification, distillation, or the custom loss.

    Raises:
        ConfigError: both a loss and a teacher are given, or ``distil`` without a teacher.
    """
    if loss is not None and (teacher is not None or distil is not None):
        raise ConfigError("Give either your own loss or a teacher: the loss would not use the teacher.")
    if teacher is None and distil is not None:
        raise ConfigError("distil needs a teacher: give the teacher, or leave distil out.")
    if loss is not None:
        return LossTask(loss)
    if teacher is None:
        return ClassificationTask(config.label_smoothing, classes)
    distil = distil or DistilConfig()
    return DistilTask(
        teacher,
        **dataclasses.asdict(distil),
        places=common_tokens(model, teacher, distil.relations),
        label_smoothing=config.label_smoothing,
        classes=classes,
    )


def common_tokens(student: nn.Module, teacher: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Return, for the named modules in which the student lacks tokens, the indices of its tokens in the teacher."""
    if not names:
        return {}
    indices = {}
    student_sites, teacher_sites = (
        {group.token.block: group.token for group in _groups(model) if group.token is not None}
        for model in (student, teacher)
    )
    for name in names:
        block = next((block for block in student_sites if f"{name}.".startswith(f"{block}.")), None)
        if block is None or block not in teacher_sites:
            continue
        site, teacher_positions = student_sites[block], teacher_sites[block].positions
        if site.positions != teacher_positions:
            index_of = {position: site.prefix + index for index, position in enumerate(teacher_positions)}
            # Positions that the teacher lacks cannot be compared; the task raises when the shapes differ.
            shared = [index_of[position] for position in site.positions if position in index_of]
            end = site.prefix + len(teacher_positions)
            indices[name] = torch.tensor([*range(site.prefix), *shared, *range(end, end + site.suffix)])
    return indices


def _groups(model: nn.Module) -> tuple[Group, ...]:
    try:
        return prunable(model).anatomy.groups
    except UnsupportedModelError:  # a model that slimming cannot prune has all its tokens
        return ()
