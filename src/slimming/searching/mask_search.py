"""Search for the units to keep: train weights and soft masks together once, then score every unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from torch import Tensor, nn

from slimming.checkpoints import checkpoint
from slimming.core.argument_types import checked_arguments
from slimming.core.files import check_json, exclusive
from slimming.core.groups import Anatomy, Group
from slimming.core.interrupts import interruptible
from slimming.core.modules import check_trainable, in_evaluation
from slimming.core.records import FileKind
from slimming.errors import CheckpointError, PlanError
from slimming.masks.attachment import independent, joint, prunable, select_kinds
from slimming.masks.soft_masks import SoftMasks, attach_, attached
from slimming.models.family import assign_state_
from slimming.models.hosts import name_classes
from slimming.models.prunable import read_as
from slimming.planning.scores import HasScores, ScoredModel, load_scores, save_scores
from slimming.planning.sensitivity import Sensitivity
from slimming.scoring.rotation import rotate_
from slimming.searching.config import RECORD, SearchConfig, scoring_settings
from slimming.searching.trained_scores import score_trained
from slimming.training.batches import calibration_images
from slimming.training.distributed import agreed, distributed_state
from slimming.training.inputs import training_inputs
from slimming.training.loop import History, fit
from slimming.training.resume import STATE_FILE
from slimming.training.samples import Data
from slimming.training.tasks import ClassificationTask, Loss, LossTask, PenaltyTask, Task

WEIGHTS, MASKS, SCORES_FILE = "weights.safetensors", "masks.safetensors", "scores.safetensors"


@dataclass(frozen=True, kw_only=True)
class SearchResult(HasScores):
    """The result of a search, from which plans for any budget can be made.

    Attributes:
        model: the trained model with its masks attached.
        masks: the masks.
        scores: group name -> score of each unit.
        config: settings of the search.
        scored_by: the score that was computed.
        sensitivity: increase of the loss when units of each kind are removed, see `slimming.scoring.sensitivity`; None
            if it was not measured.
        metrics: last evaluation of the masked model.
        history: history of the training; None if the result was loaded from files.
    """

    model: nn.Module
    masks: SoftMasks
    scores: Mapping[str, Tensor]
    config: SearchConfig
    scored_by: str = ""
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
            OutputError: the directory is in use by another process or not writable, or the disk is full.
        """
        directory, metrics, config = Path(directory), dict(self.metrics), dataclasses.asdict(self.config)
        check_json(metrics, "metrics")
        check_json(config, "config")
        tensors = {WEIGHTS: self.masks.weights(), MASKS: dict(self.masks)}
        with exclusive(directory):
            for name, content in tensors.items():
                checkpoint.write_tensors(directory / name, checkpoint.untied(content))
            save_scores(directory / SCORES_FILE, self.scored)
            record = {
                "structure": self.anatomy.structure.to_dict(),
                "config": config,
                "scored_by": self.scored_by,
                "metrics": metrics,
                "files_sha256": {name: checkpoint.sha256(directory / name) for name in (*tensors, SCORES_FILE)},
            }
            SEARCH.write(directory / RECORD, record)


class SearchContent(msgspec.Struct, frozen=True):
    """The content of the file of a search."""

    config: SearchConfig
    metrics: dict[str, float]
    files_sha256: dict[str, str]
    scored_by: str = ""

    def __post_init__(self) -> None:
        if missing := {WEIGHTS, MASKS, SCORES_FILE} - self.files_sha256.keys():
            raise ValueError(f"files_sha256 lacks {min(missing)}")


SEARCH = FileKind(name="the record of a search", schema=SearchContent, mend="Repeat the search in another directory.")


@agreed()
@checked_arguments
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
            `slimming.training.loop.fit`; ConfigError also if a resumed search was started with other weights or images,
            see `slimming.training.inputs`. If the score or the sensitivity cannot be computed, the training is kept:
            with a ``directory`` and ``resume``, the next call goes on from there, also with another ``score`` or
            ``sensitivity``; without a directory, see `score_search`.

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
    config, directory = config or SearchConfig(), Path(directory) if directory is not None else None
    resumed = resume and directory is not None and (directory / STATE_FILE).exists()
    inputs = training_inputs(directory, {"the model": model}, data)
    masks = _attach_masks(model, data, config, rotate=config.rotate and not resumed)
    task = _task(config, data, loss)
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
        directory=directory,
        resume=resume,
        evaluate=evaluate,
        no_decay=mask_names.__contains__,
        lr_scale=lambda name: config.mask_lr if name in mask_names else 1.0,
        title="search",
        inputs=inputs,
    )
    if history.averaged is not None:
        averaged = attached(history.averaged)
        assert averaged is not None
        averaged.collected = masks.collected
        model, masks = history.averaged, averaged
    kept = "The trained model keeps its masks: call slimming.score_search on it"
    if directory is not None:
        kept = f"The training is saved in {directory}: start it again with the same directory"
    with interruptible(f"{kept}."):
        scores, scored_by, measured = score_trained(masks, data, config, task, kept)
    return SearchResult(
        model=model,
        masks=masks,
        scores=scores,
        config=config,
        scored_by=scored_by,
        sensitivity=measured,
        metrics=history.metrics,
        history=history,
    )


@checked_arguments
@agreed()
def score_search(
    model: nn.Module, data: Data, config: SearchConfig | None = None, *, loss: Loss | None = None
) -> SearchResult:
    """Score the units of a model whose masks were trained: the last stage of `search`, with the same arguments.

    Use it to score a trained model by several scores, or if `search` without a directory failed in this stage.

    Args:
        model: the model that `search` trained, with its masks; it is not changed.
        data: training images.
        config: settings, of which ``score``, ``sensitivity`` and ``images`` may differ from those of the training.
        loss: the custom loss of the training.

    Raises:
        PlanError: the model has no masks.
        ConfigError, DataError, NonFiniteLossError: the score or the sensitivity cannot be computed; the message says
            what to do.

    >>> import timm, slimming
    >>> from slimming.demo import settings
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=8, val_limit=8)
    >>> data = slimming.open_data(images, model)
    >>> train = slimming.TrainConfig(steps=2, batch_size=4)
    >>> result = slimming.search(model, data, slimming.SearchConfig(train=train))
    >>> other = slimming.score_search(result.model, data, slimming.SearchConfig(train=train, score="taylor"))
    >>> other.scored_by
    'taylor'
    """
    config, masks = config or SearchConfig(), attached(model)
    if masks is None:
        raise PlanError("The model has no masks; give one that slimming.search trained, or call slimming.score.")
    kept = "The trained model keeps its masks: call this again"
    scores, scored_by, measured = score_trained(masks, data, config, _task(config, data, loss), kept)
    return SearchResult(
        model=model, masks=masks, scores=scores, config=config, scored_by=scored_by, sensitivity=measured
    )


def _task(config: SearchConfig, data: Data, loss: Loss | None) -> Task:
    return LossTask(loss) if loss is not None else ClassificationTask(config.train.label_smoothing, data.classes)


def groups_to_search(anatomy: Anatomy, config: SearchConfig) -> list[Group]:
    """Return the groups that get a mask in a search.

    Raises:
        ConfigError: the model has no group of a kind that ``config`` names.
    """
    groups = joint(anatomy.groups) if config.coupled else independent(anatomy.groups)
    return select_kinds(groups, config.kinds)


def _attach_masks(model: nn.Module, data: Data, config: SearchConfig, *, rotate: bool) -> SoftMasks:
    """Rotate the attention heads of the model, if ``rotate`` is True, and attach its masks."""
    read_model = prunable(model)
    groups = groups_to_search(read_model.anatomy, config)
    once = isinstance(data.train, Iterator)  # its images are needed for the training
    if rotate and not once and any(group.kind == "head_dim" for group in groups):
        model.to(distributed_state().device)
        with in_evaluation(model):
            rotate_(read_model, calibration_images(data, config.images, seed=config.train.seed))
    masks = attach_(read_model, groups, tokens=config.tokens, penalty=config.penalty, norms=config.norms)
    masks.penalty_sum = config.penalty_sum
    return masks


def search_directory(directory: Path) -> Path | None:
    """Return the directory of the search: ``directory``, or its subdirectory in a run; None if there is no search."""
    return next((place for place in (directory, directory / "search") if (place / RECORD).exists()), None)


def is_scored(directory: Path, config: SearchConfig) -> bool:
    """Return whether the finished search in ``directory`` was scored with these settings.

    Raises:
        CheckpointError: it was scored with others, and its training, from which it could be scored again, is gone.
    """
    before = SEARCH.read(directory / RECORD).config
    changed = [name for name in scoring_settings(config) if getattr(before, name) != getattr(config, name)]
    if changed and config.train.steps != 0 and not (directory / STATE_FILE).exists():
        raise CheckpointError(
            f"{directory} was scored with another search.{changed[0]}, and {STATE_FILE} is missing, from which it "
            "could be scored again. Give another directory, which trains anew."
        )
    return not changed


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


@checked_arguments
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
        scored_by=record.scored_by or config.score,
        sensitivity=scored.sensitivity,
        metrics=record.metrics,
    )
