"""Search for the units to keep: train weights and soft masks together once, then score every unit."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.checkpoints import checkpoint
from slimming.core.files import check_json
from slimming.core.groups import Anatomy, Group
from slimming.core.modules import check_trainable, in_evaluation
from slimming.core.records import FileKind
from slimming.errors import CheckpointError
from slimming.masks.attachment import independent, joint, prunable, select_kinds
from slimming.masks.soft_masks import SoftMasks, attach_, attached
from slimming.models.family import assign_state_
from slimming.models.hosts import name_classes
from slimming.models.prunable import read_as
from slimming.planning.scores import HasScores, ScoredModel, load_scores, save_scores
from slimming.planning.sensitivity import Sensitivity
from slimming.scoring.redundancy import redundancy_scores
from slimming.scoring.registry import Request, score_called
from slimming.scoring.rotation import rotate_
from slimming.scoring.sensitivity import sensitivity
from slimming.searching.config import SearchConfig
from slimming.training.batches import calibration_batches, calibration_images, first_batches
from slimming.training.distillation import MatchLoss
from slimming.training.distributed import distributed_state, rank_and_world_size
from slimming.training.evaluation import autocast
from slimming.training.loop import History, fit
from slimming.training.samples import Data
from slimming.training.tasks import ClassificationTask, Loss, LossTask, PenaltyTask, Task, logits_by_head

WEIGHTS, MASKS, SCORES_FILE, RECORD = "weights.safetensors", "masks.safetensors", "scores.safetensors", "search.json"


@dataclass(frozen=True, kw_only=True)
class SearchResult(HasScores):
    """The result of a search, from which plans for any budget can be made.

    Attributes:
        model: the trained model with its masks attached.
        masks: the masks.
        scores: group name -> score of each unit.
        config: settings of the search.
        sensitivity: increase of the loss when units of each kind are removed, see `slimming.scoring.sensitivity`; None
            if it was not measured.
        metrics: last evaluation of the masked model.
        history: history of the training; None if the result was loaded from files.
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
        """Anatomy of the model."""
        return self.masks.anatomy

    @property
    def scored(self) -> ScoredModel:
        """The scores, with the layout and ``fold`` of the search."""
        return ScoredModel(
            anatomy=self.anatomy,
            scores=self.scores,
            layout=self.config.layout,
            fold=self.config.fold,
            sensitivity=self.sensitivity,
        )

    def save(self, directory: str | Path) -> None:
        """Write weights, masks, scores and settings into ``directory``, each file atomically.

        Raises:
            ConfigError: the metrics or the settings contain values that JSON cannot hold, such as NaN.
            OutputError: the directory is not writable, or the disk is full.
        """
        directory, metrics, config = Path(directory), dict(self.metrics), dataclasses.asdict(self.config)
        check_json(metrics, "metrics")
        check_json(config, "config")
        tensors = {WEIGHTS: self.masks.weights(), MASKS: dict(self.masks)}
        for name, content in tensors.items():
            checkpoint.write_tensors(directory / name, checkpoint.untied(content))
        save_scores(directory / SCORES_FILE, self.scored)
        record = {
            "structure": self.anatomy.structure.to_dict(),
            "config": config,
            "metrics": metrics,
            "files_sha256": {name: checkpoint.sha256(directory / name) for name in (*tensors, SCORES_FILE)},
        }
        SEARCH.write(directory / RECORD, record)


class SearchContent(msgspec.Struct, frozen=True):
    """The content of the file of a search."""

    config: SearchConfig
    metrics: dict[str, float]
    files_sha256: dict[str, str]

    def __post_init__(self) -> None:
        if missing := {WEIGHTS, MASKS, SCORES_FILE} - self.files_sha256.keys():
            raise ValueError(f"files_sha256 lacks {min(missing)}")


SEARCH = FileKind(name="the record of a search", schema=SearchContent, mend="Repeat the search in another directory.")


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
        model: a pretrained model without masks; it is trained in place and its masks stay attached.
        data: training and validation images, see `slimming.open_data`; or your own data loaders.
        config: settings; by default `preset` ``"default"``.
        directory: directory for the state and the log, from which an interrupted search can be resumed.
        resume: resume from the state in ``directory`` if there is one.
        evaluate: called with the masked model every ``config.train.eval_every`` epochs; the result is written to the
            log.
        loss: custom loss that replaces the cross-entropy with the labels, see `slimming.training.tasks.Loss`.

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
    masks = _attach_masks(model, data, config)
    task = LossTask(loss) if loss is not None else ClassificationTask(config.train.label_smoothing, data.classes)
    if loss is None:
        name_classes(model, data.classes)
    mask_names = {
        name for name, parameter in model.named_parameters() if any(parameter is m for m in masks.own().values())
    }
    history = fit(
        model,
        PenaltyTask(
            task,
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
    scores = _scores(masks, config, data, task)
    scores, measured = _agree(scores, _try_sensitivity(masks, scores, config, data, task))
    return SearchResult(
        model=model,
        masks=masks,
        scores=scores,
        config=config,
        sensitivity=measured,
        metrics=history.metrics,
        history=history,
    )


def groups_to_search(anatomy: Anatomy, config: SearchConfig) -> list[Group]:
    """Return the groups that get a mask in a search.

    Raises:
        ConfigError: the model has no group of a kind that ``config`` names.
    """
    groups = joint(anatomy.groups) if config.coupled else independent(anatomy.groups)
    return select_kinds(groups, config.kinds)


def _attach_masks(model: nn.Module, data: Data, config: SearchConfig) -> SoftMasks:
    """Rotate the attention heads of the model, if the settings ask for it, and attach its masks."""
    read_model = prunable(model)
    groups = groups_to_search(read_model.anatomy, config)
    once = isinstance(data.train, Iterator)  # its images are needed for the training
    if config.rotate and not once and any(group.kind == "head_dim" for group in groups):
        # A resumed search replaces these weights by those of its state, which were rotated at the start.
        model.to(distributed_state().device)
        with in_evaluation(model):
            rotate_(read_model, calibration_images(data, config.images, seed=config.train.seed))
    masks = attach_(read_model, groups, tokens=config.tokens, penalty=config.penalty, norms=config.norms)
    masks.penalty_sum = config.penalty_sum
    return masks


def _scores(masks: SoftMasks, config: SearchConfig, data: Data, task: Task) -> dict[str, Tensor]:
    """One score per unit of the trained model; if the configured score cannot be computed, the collected one."""
    chosen = score_called(config.score)
    if chosen.needs_training or not chosen.needs_images:
        return masks.scores(config.score)
    try:
        model = copy.deepcopy(masks.model).eval()
        copied_masks = attached(model)
        assert copied_masks is not None
        if config.fold:
            copied_masks.fold_()
        copied_masks.detach_()
        batches = calibration_batches(data, config.images, seed=config.train.seed)
        if _trains_outputs(task):
            plain = read_as(model, masks.anatomy)
            request = Request(prunable=plain, groups=masks.groups, batches=batches, masks=masks, seed=config.train.seed)
            return chosen.function(request)
        scores = {name: score.square() / 2 for name, score in masks.scores("taylor").items()}
        if config.score == "compensated":
            scores = redundancy_scores(model, masks.groups, scores, [batch.images for batch in batches])
        return scores
    except Exception as error:  # data that cannot be read again, memory, a custom model: keep the trained search
        if config.train.steps == 0:
            raise
        warnings.warn(
            f"Score {config.score!r} could not be computed ({type(error).__name__}: {error}); units are ranked by the "
            "Taylor scores that the search collected. search.score: taylor selects these.",
            stacklevel=2,
        )
        return masks.scores("taylor")


def _trains_outputs(task: Task) -> bool:
    """Whether the loss compares the outputs of the model, so that their Fisher scores measure the effect of a unit."""
    return isinstance(task, ClassificationTask) or (isinstance(task, LossTask) and isinstance(task.function, MatchLoss))


def _try_sensitivity(
    masks: SoftMasks, scores: Mapping[str, Tensor], config: SearchConfig, data: Data, task: Task
) -> Sensitivity | None:
    """The sensitivity of each kind; None if it is not asked for, has no use, or cannot be measured (with a warning)."""
    if not config.sensitivity or len({group.kind for group in masks.groups}) < 2:
        return None
    try:
        return _sensitivity(masks, scores, config, data, task)
    except Exception as error:  # data that cannot be read again, memory, a custom loss: keep the trained search
        warnings.warn(
            f"The sensitivity of each kind could not be measured ({type(error).__name__}: {error}); kinds are "
            "weighed against each other by their scores. search.sensitivity: 0 skips the measurement.",
            stacklevel=3,
        )
        return None


def _sensitivity(
    masks: SoftMasks, scores: Mapping[str, Tensor], config: SearchConfig, data: Data, task: Task
) -> Sensitivity:
    """Sensitivity on the first training images, of the outputs of a classifier or of the loss of another task."""
    model, train = masks.model.eval(), config.train
    device = next(model.parameters()).device
    first = first_batches(data, config.sensitivity, train.images_per_pass, train.seed, train.workers)
    batches = [(batch.images.to(device), batch.labels.to(device)) for batch in first]
    # Autocast caches copies of the weights until it exits, so each evaluation needs a new one.
    precise = partial(autocast, device, train.precision)
    with torch.no_grad(), precise():
        measure = (
            _divergence(model, batches) if isinstance(task, ClassificationTask) else _task_loss(task, device, batches)
        )

    def loss(trial: nn.Module) -> float:
        with precise():
            return measure(trial)

    return sensitivity(masks, scores, config.layout, loss)


def _divergence(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Callable[[nn.Module], float]:
    """Return a function that computes the mean KL divergence of a classifier from ``model`` over the images.

    It is exactly 0 for the unchanged model, so that few images suffice, and it is informative even if the model fits
    its training images perfectly.
    """

    def log_probabilities(classifier: nn.Module) -> Tensor:
        return torch.cat([logits_by_head(classifier(images))[0].double().log_softmax(1) for images, _ in batches])

    reference = log_probabilities(model)
    return lambda trial: F.kl_div(log_probabilities(trial), reference, reduction="batchmean", log_target=True).item()


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


def _agree(scores: dict[str, Tensor], measured: Sensitivity | None) -> tuple[dict[str, Tensor], Sensitivity | None]:
    """The scores and sensitivity of the first process, on every process, so that all make the same plan."""
    if rank_and_world_size()[1] > 1:
        shared: list[Any] = [{name: score.tolist() for name, score in scores.items()}, measured]
        torch.distributed.broadcast_object_list(shared, src=0)
        return {name: torch.tensor(values) for name, values in shared[0].items()}, shared[1]
    return scores, measured


def search_directory(directory: Path) -> Path | None:
    """Return the directory of the search: ``directory``, or its subdirectory in a run; None if there is no search."""
    return next((place for place in (directory, directory / "search") if (place / RECORD).exists()), None)


def verify_search(directory: Path) -> SearchContent:
    """Verify the checksums of the files that `SearchResult.save` wrote, and return the record.

    Raises:
        CheckpointError: a file is missing, damaged, or of a newer format.
    """
    record = SEARCH.read(directory / RECORD)
    for name in (WEIGHTS, MASKS, SCORES_FILE):
        if checkpoint.sha256(directory / name) != record.files_sha256[name]:
            raise CheckpointError(
                f"{directory / name} was changed after it was written: its checksum differs. Take an intact copy."
            )
    return record


def load_search(directory: str | Path) -> SearchResult:
    """Load what `SearchResult.save` wrote, with the masked model in evaluation mode.

    Raises:
        CheckpointError: a file is missing, damaged, or of a newer format.
    """
    directory = Path(directory)
    record = verify_search(directory)
    scored = load_scores(directory / SCORES_FILE)
    config = record.config
    model = checkpoint.build(scored.anatomy.structure)
    weights = checkpoint.read_tensors(directory / WEIGHTS)
    values = checkpoint.read_tensors(directory / MASKS)
    try:
        assign_state_(model, weights)
        groups = [scored.anatomy.group(name) for name in values]
        masks = attach_(
            read_as(model, scored.anatomy), groups, tokens=config.tokens, penalty=config.penalty, norms=config.norms
        )
        for name, value in values.items():
            masks[name].data.copy_(value)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"The files in {directory} do not fit together: {error}") from error
    masks.penalty_sum = config.penalty_sum
    return SearchResult(
        model=model.eval(),
        masks=masks,
        scores=scored.scores,
        config=config,
        sensitivity=scored.sensitivity,
        metrics=record.metrics,
    )
