"""Training a model, dense or slim, on labels or distilled from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from slimming.errors import ConfigError
from slimming.training.config import TrainConfig
from slimming.training.loop import History, fit
from slimming.training.samples import Data
from slimming.training.tasks import ClassificationTask, DistilTask, Task


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """How a model learns from a teacher.

    Attributes:
        alpha: share of the teacher in the loss, 0 (labels only) to 1.
        temperature: softens both distributions.
        features: modules that teacher and student share whose outputs are matched too, such as ``"blocks.5"``.
        feature_weight: weight of that match.
        pool: what of the outputs is matched: the ``"first"`` token or the ``"mean"`` over tokens.
    """

    alpha: float = 0.8
    temperature: float = 2.0
    features: tuple[str, ...] = ()
    feature_weight: float = 1.0
    pool: str = "first"


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
    task: Task | None = None,
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
        task: the loss, in place of the labels and the teacher.
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
    if task is not None and (teacher is not None or distil is not None):
        raise ConfigError("Give a task of your own, or a teacher; the task would not use the teacher.")
    if task is None:
        task = ClassificationTask(config.label_smoothing)
    if teacher is not None:
        distil = distil or DistilConfig()
        task = DistilTask(
            teacher,
            alpha=distil.alpha,
            temperature=distil.temperature,
            features=distil.features,
            feature_weight=distil.feature_weight,
            pool=distil.pool,
            label_smoothing=config.label_smoothing,
        )
    target = Path(directory) if directory is not None else None
    return fit(model, task, data, config, directory=target, resume=resume, evaluate=evaluate, title=title)
