"""The search: weights and masks train together once; every budget is read off its result."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.checkpoints import checkpoint
from slimming.core.files import FORMAT, atomic_json, check_json, read_sealed, seal
from slimming.core.groups import Anatomy
from slimming.core.modules import check_trainable, in_evaluation
from slimming.errors import CheckpointError
from slimming.masks.attachment import independent, joint, prunable, searched
from slimming.masks.soft_masks import SoftMasks, attach_, attached
from slimming.models.family import fill_
from slimming.models.prunable import read_as
from slimming.planning.scores import Scored, Scores, load_scores, save_scores
from slimming.planning.sensitivity import Sensitivity
from slimming.scoring.redundancy import redundancy_scores
from slimming.scoring.registry import Request, score_called
from slimming.scoring.rotation import rotate_
from slimming.scoring.sensitivity import sensitivity
from slimming.searching.config import SearchConfig, config_from_dict
from slimming.training.batches import calibration_batches, calibration_images, first_batches
from slimming.training.distillation import MatchLoss
from slimming.training.distributed import distributed_state, rank_and_world_size
from slimming.training.evaluation import autocast
from slimming.training.loop import History, fit
from slimming.training.samples import Data
from slimming.training.tasks import ClassificationTask, Loss, LossTask, PenaltyTask, Task, logits_by_head

WEIGHTS, MASKS, SCORES_FILE, RECORD = "weights.safetensors", "masks.safetensors", "scores.safetensors", "search.json"


@dataclass(frozen=True, kw_only=True)
class SearchResult(Scored):
    """What a search leaves: the masked model, one score per unit, and how it came about.

    Attributes:
        model: the trained model with its masks attached.
        masks: those masks.
        scores: group name -> score of each unit.
        config: the settings.
        sensitivity: what cutting each kind does, see `slimming.scoring.sensitivity`; None if it was not measured.
        metrics: the last evaluation of the masked model.
        history: the log of the training.
    """

    model: nn.Module
    masks: SoftMasks
    scores: Mapping[str, Tensor]
    config: SearchConfig
    sensitivity: Sensitivity | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: History | None = None

    @property
    def anatomy(self) -> Anatomy:
        """What the family read in the model."""
        return self.masks.anatomy

    @property
    def rating(self) -> Scores:
        """Scores, with the layout and the fold of the search."""
        return Scores(
            anatomy=self.anatomy,
            scores=self.scores,
            layout=self.config.layout,
            fold=self.config.fold,
            sensitivity=self.sensitivity,
        )

    def save(self, directory: str | Path) -> None:
        """Write weights, masks, scores and settings into ``directory``, each file whole or not at all.

        Raises:
            ConfigError: the metrics or the settings hold what JSON cannot, such as NaN.
            OutputError: the place is not writable, or the disk is full.
        """
        directory, metrics, config = Path(directory), dict(self.metrics), dataclasses.asdict(self.config)
        check_json(metrics, "metrics")
        check_json(config, "config")
        tensors = {WEIGHTS: self.masks.weights(), MASKS: dict(self.masks)}
        for name, content in tensors.items():
            checkpoint.write_tensors(directory / name, checkpoint.untied(content))
        save_scores(directory / SCORES_FILE, self.rating)
        record = {
            "format": FORMAT,
            "structure": self.anatomy.structure.to_dict(),
            "config": config,
            "metrics": metrics,
            "files_sha256": {name: checkpoint.sha256(directory / name) for name in (*tensors, SCORES_FILE)},
        }
        atomic_json(directory / RECORD, seal(record))


def search(
    model: nn.Module,
    data: Data,
    config: SearchConfig | None = None,
    *,
    directory: str | Path | None = None,
    resume: bool = False,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    loss: Loss | None = None,
) -> SearchResult:
    """Train ``model`` together with soft masks, in place, and score every unit (ViT-Slim, section 3).

    Args:
        model: a pretrained model without masks. Afterwards its weights are trained and its masks attached.
        data: training and validation images, see `slimming.open_data`; or loaders of your own.
        config: the settings; by default `preset` ``"default"``.
        directory: where the state and the log of the training go, so that a killed search can go on.
        resume: go on from the state in ``directory`` if there is one.
        evaluate: called now and then with the masked model; what it returns goes to the log.
        loss: of your own, in place of the cross-entropy with the labels, see `slimming.training.tasks.Loss`.

    Raises:
        UnsupportedModelError: no family reads the model.
        PlanError: the model has masks already.
        ConfigError, DataError, NonFiniteLossError, Interrupted, OutputError, CheckpointError: see
            `slimming.training.loop.fit`.

    >>> import timm, slimming
    >>> from slimming.demo import settings
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=8, val_limit=8)
    >>> data = slimming.open_data(images, model)
    >>> config = slimming.SearchConfig(train=slimming.TrainConfig(steps=2, batch_size=4))
    >>> result = slimming.search(model, data, config)
    >>> result.scores["blocks.0.mlp.hidden"].shape
    torch.Size([192])
    """
    check_trainable(model)
    config = config or SearchConfig()
    found = prunable(model)
    own = joint(found.anatomy.groups) if config.coupled else independent(found.anatomy.groups)
    groups = searched(own, config.kinds)
    once = isinstance(data.train, Iterator)  # its images are for the training
    if config.rotate and not once and any(group.kind == "head_dim" for group in groups):
        # A search that goes on takes its weights from its state, which were turned at its start.
        model.to(distributed_state().device)
        with in_evaluation(model):
            rotate_(found, calibration_images(data, config.images, seed=config.train.seed))
    masks = attach_(found, groups, tokens=config.tokens, penalty=config.penalty, norms=config.norms)
    masks.penalty_sum = config.penalty_sum
    inner = LossTask(loss) if loss is not None else ClassificationTask(config.train.label_smoothing)
    mask_names = {
        name for name, parameter in model.named_parameters() if any(parameter is m for m in masks.own().values())
    }
    history = fit(
        model,
        PenaltyTask(
            inner,
            lambda: {f"penalty_{kind}": term for kind, term in masks.penalties().items()},
            masks.collect,
            masks.collected,
        ),
        data,
        config.train,
        directory=Path(directory) if directory is not None else None,
        resume=resume,
        evaluate=evaluate,
        no_decay=mask_names.__contains__,
        lr_scale=lambda name: config.mask_lr if name in mask_names else 1.0,
        title="search",
    )
    if history.averaged is not None:
        averaged = attached(history.averaged)
        assert averaged is not None
        averaged.collected = masks.collected
        model, masks = history.averaged, averaged
    scores = _scores(masks, config, data, inner)
    measured: Sensitivity | None = None
    if config.sensitivity and len({group.kind for group in groups}) > 1:
        try:
            measured = _sensitivity(masks, scores, config, data, inner)
        except Exception as error:  # a loader that cannot be read again, memory, a loss of one's own: keep the search
            warnings.warn(
                f"What cutting each kind does could not be measured ({type(error).__name__}: {error}); kinds are "
                "weighed against each other by their scores. search.sensitivity: 0 leaves the measurement out.",
                stacklevel=2,
            )
    scores, measured = _agree(scores, measured)
    return SearchResult(
        model=model,
        masks=masks,
        scores=scores,
        config=config,
        sensitivity=measured,
        metrics=history.metrics,
        history=history,
    )


def _scores(masks: SoftMasks, config: SearchConfig, data: Data, task: Task) -> dict[str, Tensor]:
    """One score per unit of the trained model; what the search collected where the one asked for cannot be had."""
    chosen = score_called(config.score)
    if chosen.needs_training or not chosen.needs_images:
        return masks.scores(config.score)
    try:
        model = copy.deepcopy(masks.model).eval()
        own = attached(model)
        assert own is not None
        if config.fold:
            own.fold_()
        own.detach_()
        batches = calibration_batches(data, config.images, seed=config.train.seed)
        if _trains_outputs(task):
            plain = read_as(model, masks.anatomy)
            request = Request(prunable=plain, groups=masks.groups, batches=batches, masks=masks, seed=config.train.seed)
            return chosen.function(request)
        found = {name: score.square() / 2 for name, score in masks.scores("taylor").items()}
        if config.score == "compensated":
            found = redundancy_scores(model, masks.groups, found, [batch.images for batch in batches])
        return found
    except Exception as error:  # a loader that cannot be read again, memory, a model that takes more: keep the search
        if config.train.steps == 0:
            raise
        warnings.warn(
            f"Score {config.score!r} could not be taken ({type(error).__name__}: {error}); units are ranked by what "
            "the search collected. search.score: taylor asks for that.",
            stacklevel=2,
        )
        return masks.scores("taylor")


def _trains_outputs(task: Task) -> bool:
    """Whether the loss is of the model's own outputs, whose Fisher scores then say what a unit matters."""
    return isinstance(task, ClassificationTask) or (isinstance(task, LossTask) and isinstance(task.function, MatchLoss))


def _sensitivity(
    masks: SoftMasks, scores: Mapping[str, Tensor], config: SearchConfig, data: Data, task: Task
) -> Sensitivity:
    """What cutting each kind does on the first training images, to what a classifier says or to the task's loss."""
    model, train = masks.model.eval(), config.train
    device = next(model.parameters()).device
    found = first_batches(data, config.sensitivity, train.images_per_pass, train.seed, train.workers)
    batches = [(batch.images.to(device), batch.labels.to(device)) for batch in found]
    # Autocast keeps copies of weights until it ends: it must not outlive one trial.
    precise = partial(autocast, device, train.precision)
    with torch.no_grad(), precise():
        judge = (
            _divergence(model, batches) if isinstance(task, ClassificationTask) else _task_loss(task, device, batches)
        )

    def loss(trial: nn.Module) -> float:
        with precise():
            return judge(trial)

    return sensitivity(masks, scores, config.layout, loss)


def _divergence(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Callable[[nn.Module], float]:
    """Mean divergence of a classifier from ``model`` over the images.

    It is exactly 0 where nothing changes, so that few images do, and a model that knows its training images by heart
    still shows what it loses.
    """

    def log_shares(classifier: nn.Module) -> Tensor:
        return torch.cat([logits_by_head(classifier(images))[0].double().log_softmax(1) for images, _ in batches])

    whole = log_shares(model)
    return lambda trial: F.kl_div(log_shares(trial), whole, reduction="batchmean", log_target=True).item()


def _task_loss(
    task: Task, device: torch.device, batches: Sequence[tuple[Tensor, Tensor]]
) -> Callable[[nn.Module], float]:
    """Mean loss of a model over the images."""

    def loss(trial: nn.Module) -> float:
        task.start(trial, device)
        try:
            parts = [task.loss(trial, *batch)["loss"].item() * len(batch[0]) for batch in batches]
        finally:
            task.stop()
        return sum(parts) / sum(len(images) for images, _ in batches)

    return loss


def _agree(scores: dict[str, Tensor], measured: Sensitivity | None) -> tuple[dict[str, Tensor], Sensitivity | None]:
    """What the first process found on every process, so that all make the same plan."""
    if rank_and_world_size()[1] > 1:
        shared: list[Any] = [{name: score.tolist() for name, score in scores.items()}, measured]
        torch.distributed.broadcast_object_list(shared, src=0)
        return {name: torch.tensor(values) for name, values in shared[0].items()}, shared[1]
    return scores, measured


def search_directory(directory: Path) -> Path | None:
    """The search in ``directory``: itself, or that of a whole run; None if there is none."""
    return next((place for place in (directory, directory / "search") if (place / RECORD).exists()), None)


def load_search(directory: str | Path) -> SearchResult:
    """Read what `SearchResult.save` wrote: the masked model and its scores, in evaluation mode.

    Raises:
        CheckpointError: a file is missing, damaged, or of a newer format.
    """
    directory = Path(directory)
    record = read_sealed(directory / RECORD)
    for name, digest in record["files_sha256"].items():
        if checkpoint.sha256(directory / name) != digest:
            raise CheckpointError(
                f"{directory / name} is not as it was written: its checksum differs. Take an intact copy."
            )
    rating = load_scores(directory / SCORES_FILE)
    config = config_from_dict(record["config"])
    model = checkpoint.build(rating.anatomy.structure)
    weights = checkpoint.read_tensors(directory / WEIGHTS)
    values = checkpoint.read_tensors(directory / MASKS)
    try:
        fill_(model, weights)
        groups = [rating.anatomy.group(name) for name in values]
        masks = attach_(
            read_as(model, rating.anatomy), groups, tokens=config.tokens, penalty=config.penalty, norms=config.norms
        )
        for name, value in values.items():
            masks[name].data.copy_(value)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"The files in {directory} do not fit together: {error}") from error
    masks.penalty_sum = config.penalty_sum
    return SearchResult(
        model=model.eval(),
        masks=masks,
        scores=rating.scores,
        config=config,
        sensitivity=rating.sensitivity,
        metrics=record["metrics"],
    )
