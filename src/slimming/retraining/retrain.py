"""Training a model, dense or slim, on labels or distilled from a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from slimming.core.groups import Group
from slimming.errors import ConfigError, UnsupportedModelError
from slimming.masks.attachment import prunable
from slimming.training.config import TrainConfig
from slimming.training.distillation import DistilTask, check_distillation
from slimming.training.loop import History, fit
from slimming.training.samples import Data
from slimming.training.tasks import ClassificationTask, Loss, LossTask, Task


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """How a model learns from a teacher.

    Attributes:
        alpha: share of the teacher in the loss, 0 (labels only) to 1.
        temperature: softens both distributions.
        features: modules that teacher and student share whose outputs are matched too, such as ``"blocks.5"``.
        feature_weight: weight of that match.
        pool: what of the outputs is matched: the ``"first"`` token or the ``"mean"`` over tokens.
        relations: modules whose outputs (B, N, D) are matched by how their tokens relate to one another, such as
            ``"blocks.5.attn.qkv"`` (MiniLMv2, Wang et al. 2021); their widths D may differ.
        relation_weight: weight of that match.
        relation_heads: parts that D is split into, each with relations of its own; a multiple of 3 that divides D keeps
            queries, keys and values of a ``qkv`` apart.

    Raises:
        ConfigError: ``alpha``, ``temperature``, ``pool`` or ``relation_heads`` cannot be.
    """

    alpha: float = 0.8
    temperature: float = 2.0
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0
    pool: str = "first"
    relations: tuple[str, ...] = ()
    relation_weight: float = 1.0
    relation_heads: int = 12

    def __post_init__(self) -> None:
        check_distillation(self.alpha, self.temperature, self.pool, self.relation_heads)


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
    """Train ``model`` in place; with a teacher, mostly from its logits (Hinton et al. 2015).

    Args:
        model: a dense or slim model.
        data: training and validation images, see `slimming.open_data`; or loaders of your own.
        config: the settings.
        teacher: the dense model, usually.
        distil: how to learn from the teacher.
        directory: where the state and the log go, so that a killed training can go on.
        resume: go on from the state in ``directory`` if there is one.
        evaluate: called now and then with the model; what it returns goes to the log.
        loss: of your own, in place of the labels and the teacher, see `slimming.training.tasks.Loss`.
        title: name of the progress bar.

    Raises:
        ConfigError, DataError, NonFiniteLossError, Interrupted, OutputError, CheckpointError: see
            `slimming.training.loop.fit`.

    >>> import timm, slimming
    >>> from slimming.demo import settings
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=8, val_limit=8)
    >>> data = slimming.open_data(images, model)
    >>> slimming.train(model, data, slimming.TrainConfig(steps=2, batch_size=4)).steps
    2
    """
    config = config or TrainConfig()
    task = task_of(model, config, teacher, distil, loss)
    target = Path(directory) if directory is not None else None
    return fit(model, task, data, config, directory=target, resume=resume, evaluate=evaluate, title=title)


def task_of(
    model: nn.Module, config: TrainConfig, teacher: nn.Module | None, distil: DistilConfig | None, loss: Loss | None
) -> Task:
    """What `train` trains ``model`` for: the labels, the teacher, or the loss that was given.

    Raises:
        ConfigError: there are a loss and a teacher, or settings for a teacher that is not there.
    """
    if loss is not None and (teacher is not None or distil is not None):
        raise ConfigError("Give a loss of your own, or a teacher; the loss would not use the teacher.")
    if teacher is None and distil is not None:
        raise ConfigError("distil says how to learn from a teacher, and there is none: give the teacher, or no distil.")
    if loss is not None:
        return LossTask(loss)
    if teacher is None:
        return ClassificationTask(config.label_smoothing)
    distil = distil or DistilConfig()
    return DistilTask(
        teacher,
        **dataclasses.asdict(distil),
        places=common_tokens(model, teacher, distil.relations),
        label_smoothing=config.label_smoothing,
    )


def common_tokens(student: nn.Module, teacher: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The places of the teacher's tokens that the student has, for those of the named modules where it lost some."""
    if not names:
        return {}
    found = {}
    sites = [{g.token.block: g.token for g in _groups(model) if g.token is not None} for model in (student, teacher)]
    for name in names:
        block = next((block for block in sites[0] if f"{name}.".startswith(f"{block}.")), None)
        if block is None or block not in sites[1]:
            continue
        mine, theirs = sites[0][block], sites[1][block]
        if mine.positions != theirs.positions:
            place_of = {position: mine.prefix + place for place, position in enumerate(theirs.positions)}
            # A position that the teacher lacks cannot be compared; the task says so when it sees the shapes.
            shared = [place_of[position] for position in mine.positions if position in place_of]
            found[name] = torch.tensor([*range(mine.prefix), *shared])
    return found


def _groups(model: nn.Module) -> tuple[Group, ...]:
    try:
        return prunable(model).anatomy.groups
    except UnsupportedModelError:  # a model of one's own, which lost no tokens
        return ()
