"""The whole chain from one configuration: search, cut to each budget, retrain, measure, report.

Every stage leaves a file when it is done and is skipped when that file is there, so that a chain that was
stopped anywhere goes on where it stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimming import checkpoint
from slimming.api import anatomy_of, attach, cut, describe, plan, searched
from slimming.errors import ConfigError, DataError, MissingExtraError, UnsupportedModelError
from slimming.families.create import create_dense
from slimming.families.hosts import classes_of, name_classes, reset_classes_
from slimming.io import atomic_json
from slimming.modes import in_evaluation
from slimming.oneshot import score
from slimming.plan import Budget, Plan, read_json
from slimming.results import BenchConfig, dense_entry, measure_all, provenance, results_of, row_entry
from slimming.retrain import DistilConfig, train
from slimming.search_config import SearchConfig
from slimming.searching import RECORD, SearchResult, load_search, search
from slimming.training.batches import calibration_images, steps_per_epoch
from slimming.training.config import DataConfig, TrainConfig
from slimming.training.data import open_data as open_images
from slimming.training.data import open_pictures
from slimming.training.evaluate import evaluate
from slimming.training.images import ImageSpec
from slimming.training.log import check_trackers
from slimming.training.optimisation import make_optimizer
from slimming.training.processes import processes
from slimming.training.samples import Data

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dense start.

    Attributes:
        name: a timm model name or ``hf-hub:owner/name``; ``transformers:owner/name`` or ``transformers:DIRECTORY``;
            ``torchvision:name``; or a directory that `slimming.save` wrote.
        checkpoint: local weights (``.safetensors``, or ``.pth`` of plain tensors); null takes the host's
            pretrained ones.
        arguments: further arguments of the host's constructor, such as timm's ``img_size``.
    """

    name: str
    checkpoint: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One whole run.

    Attributes:
        name: title of the report.
        model: the dense start.
        data: the images.
        search: the search.
        budgets: what is cut.
        retrain: training of each cut model.
        distil: how it learns from the dense model; null trains on labels only.
        bench: how time is measured.
        note: a sentence on the data or the purpose, for the report.
        latency_table: file of the latency table, where a budget limits the latency.
        compensate: training images, without their labels, on which it is worked out how what stays can stand in for
            what goes (see `slimming.compensation`); 0 cuts without.
        one_shot: training images, without their labels, from which every budget is also cut without search or training
            (see `slimming.score`), for comparison; 0 leaves it out.
    """

    model: ModelConfig
    data: DataConfig
    budgets: tuple[Budget, ...]
    name: str = "slimming"
    search: SearchConfig = field(default_factory=SearchConfig)
    retrain: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=10.0, lr=5e-4))
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


def open_model(config: ModelConfig, *, classes: int | None = None) -> tuple[nn.Module, list[str]]:
    """Open the dense start; also gives notes for the user on what was replaced.

    Raises:
        UnsupportedModelError: unknown model, or arguments that it does not take.
        CheckpointError: weights that are missing, damaged, of another model, or a pickle of more than
            tensors.
    """
    path = Path(config.name)
    if not path.is_dir():
        return create_dense(config.name, checkpoint=config.checkpoint, classes=classes, arguments=config.arguments)
    if config.checkpoint is not None or config.arguments:
        raise ConfigError(f"{path} is a whole model: model.checkpoint and model.arguments have no effect; drop them.")
    model = checkpoint.load(path)
    notes = []
    known = classes_of(model)
    if classes is not None and known != classes:
        reset_classes_(model, classes)
        notes.append(f"{path} knows {known} classes; its classifier was replaced by an untrained one for {classes}.")
    return model, notes


def open_data(config: DataConfig, model: nn.Module, seed: int = 0) -> Data:
    """Open images for ``model``: its own input size, normalisation, interpolation and crop.

    Args:
        config: where the images are.
        model: a model that a family reads.
        seed: decides the augmentation.

    Raises:
        DataError: no such data, an empty class, one class only, labels out of range, splits that differ, or a mean
            or std of another number of channels.

    >>> import timm, slimming
    >>> from slimming.demo import settings
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=8, val_limit=8)
    >>> data = slimming.open_data(images, model)
    >>> len(data.train), data.classes[:3]
    (8, ('AnnualCrop', 'Forest', 'HerbaceousVegetation'))
    """
    return open_images(config, _spec(config, model), seed)


def load_images(source: str, model: nn.Module, images: int = 512, *, seed: int = 0) -> list[Tensor]:
    """Read some training images as ``model`` takes them, without labels: for `slimming.score` and `slimming.cut`.

    Args:
        source: a folder of images, in class folders or not, or anything that `DataConfig` takes.
        model: a model that a family reads.
        images: how many, or all if there are fewer.
        seed: which ones.

    Returns:
        Batches of shape (B, C, H, W).

    Raises:
        ConfigError: ``images`` is below 1.
        DataError: there are no images.

    >>> import timm, slimming
    >>> from slimming.demo import settings
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> [batch.shape for batch in slimming.load_images(settings()["data"]["source"], model, 40)]
    [torch.Size([40, 3, 32, 32])]
    """
    config = DataConfig(source=source, augment="none")
    found = open_pictures(source, _spec(config, model))
    data = Data(found, [], ()) if found is not None else open_data(config, model, seed)
    return calibration_images(data, images, seed=seed)


def _spec(config: DataConfig, model: nn.Module) -> ImageSpec:
    """What the model takes, with what the data says otherwise."""
    spec = dataclasses.replace(ImageSpec.of_model(model), input_size=anatomy_of(model).input_shape)
    asked = {name: value for name in ("mean", "std") if (value := getattr(config, name)) is not None}
    for name, value in asked.items():
        if len(value) != spec.input_size[0]:
            raise DataError(f"data.{name} has {len(value)} numbers, the model's images {spec.input_size[0]} channels.")
    return dataclasses.replace(spec, **asked)


def run(config: RunConfig, directory: str | Path, *, say: Say = print) -> dict[str, Any]:
    """Do the whole chain in ``directory``, going on where an earlier call stopped, and write its report.

    Under ``accelerate launch`` or ``torchrun`` every process takes part; the first one writes the files.

    Args:
        config: the run.
        directory: where everything goes.
        say: told each stage, one line at a time.

    Returns:
        The content of ``results.json``; nothing on processes other than the first.

    Raises:
        SlimmingError: one of its kinds, for whatever is wrong with the configuration or the world.
    """
    from slimming.report import write_report

    directory = Path(directory)
    world = processes()
    if not world.is_main_process:
        say = _silent
    dense, data, notes = open_start(config.model, config.data, config.search.train.seed)
    dense.to(world.device)
    for note in notes:
        say(note)
    check_budgets(dense, config)
    check_training("search.train", config.search.train, data, directory)
    check_training("retrain", config.retrain, data, directory)
    judge = partial(evaluate, images=data.val, batch_size=256, workers=config.retrain.workers)
    top1 = _dense_metrics(dense, judge, directory, say)
    one_shot = _one_shot(dense, config, directory, judge, say)
    result, seconds = _search(dense, data, config, directory / "search", judge, say)
    slims: dict[str, nn.Module] = {}
    rows = []
    for budget in config.budgets:
        slims[budget.name], row = _one_budget(budget, dense, result, data, config, directory, judge, say)
        rows.append(row | one_shot.get(budget.name, {}))
    if not world.is_main_process:
        return {}
    say("measuring latency, dense and slim in turns")
    models = {name: model.to(world.device) for name, model in {"dense": dense, **slims}.items()}
    timed = measure_all(models, anatomy_of(dense).input_shape, config.bench)
    for row in rows:
        row |= timed[row["name"]]
    dense_row = dense_entry(dense, top1, timed["dense"])
    results = results_of(config, dense, data, dense_row, rows, result, seconds)
    atomic_json(directory / "results.json", results)
    write_report(directory)
    return results


def open_start(model_config: ModelConfig, data_config: DataConfig, seed: int) -> tuple[nn.Module, Data, list[str]]:
    """Open model and data and make them fit: the classifier follows the data's classes.

    Args:
        model_config: the model.
        data_config: the images.
        seed: decides the augmentation, and the weights of a new classifier.

    Returns:
        The model, the data, and notes for the user on what was replaced.

    Raises:
        SlimmingError: see `open_model`, `open_data` and `check_input`.
    """
    # A run that goes on must meet the same new classifier again.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, notes = open_model(model_config)
        check_input(model)
        data = open_data(data_config, model, seed)
        if classes_of(model) != len(data.classes):
            model, notes = open_model(model_config, classes=len(data.classes))
    name_classes(model, data.classes)
    return model, data, notes


@torch.no_grad()
def check_input(model: nn.Module) -> None:
    """Check that ``model`` takes images of the size that it was made for.

    Raises:
        UnsupportedModelError: it does not.
    """
    shape = anatomy_of(model).input_shape
    parameter = next(model.parameters())
    image = torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
    try:
        with in_evaluation(model):
            model(image)
    except (AssertionError, RuntimeError) as error:
        size = " x ".join(map(str, shape[1:]))
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"The model does not take images of {size} pixels: {reason} Give another img_size in model.arguments."
        ) from error


def check_budgets(dense: nn.Module, config: RunConfig) -> None:
    """Check before a search that plans for all budgets can be made; which sizes can be had needs no scores.

    Raises:
        BudgetError: one cannot be reached; the message says the smallest that can.
    """
    model = copy.deepcopy(dense)
    groups = searched(describe(model, coupled=config.search.coupled), config.search.kinds)
    masks = attach(model, groups, tokens=config.search.tokens, penalty=config.search.penalty)
    for budget in config.budgets:
        plan(masks, budget, layout=config.search.layout, score="mask", latency=config.latency_table)


def check_training(where: str, config: TrainConfig, data: Data, directory: Path) -> None:
    """Check what of a training's settings can only be checked with the data and the libraries at hand.

    Raises:
        ConfigError: no such optimizer or tracker, a batch larger than the data, or a warm-up without an end.
        MissingExtraError: the tracker is not installed.
    """
    try:
        check_trackers(config.trackers, directory)
        make_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}], config)
        per_epoch = steps_per_epoch(data.train, config.batch_size)
        if per_epoch is None and config.steps is None:
            raise ConfigError("this data does not know how many images it has; set steps in place of epochs.")
        total = max(1, round(config.epochs * (per_epoch or 0))) if config.steps is None else config.steps
        if total and round(config.warmup_epochs * (per_epoch or total)) >= total:
            raise ConfigError(f"warmup_epochs {config.warmup_epochs:g} is all of the {total} steps; shorten it.")
    except (ConfigError, MissingExtraError) as error:
        raise type(error)(f"{where}: {error}") from error


Judge = Callable[[nn.Module], dict[str, float]]


def _dense_metrics(dense: nn.Module, judge: Judge, directory: Path, say: Say) -> float:
    target = directory / "dense" / "metrics.json"
    if not target.exists():
        say("evaluating the dense model")
        atomic_json(target, judge(dense))
    return float(read_json(target)["top1"])


def _one_shot(
    dense: nn.Module, config: RunConfig, directory: Path, judge: Judge, say: Say
) -> dict[str, dict[str, float]]:
    """What is left of the dense model at each budget without search and training: budget -> what its row says of it."""
    if not config.one_shot:
        return {}
    target = directory / "one_shot.json"
    if target.exists():
        say("one shot: done before")
        return read_json(target)
    began, seed = time.monotonic(), config.search.train.seed
    still = open_data(dataclasses.replace(config.data, augment="none"), dense, seed)
    images = calibration_images(still, config.one_shot, seed=seed)
    kinds = config.search.kinds
    scored = score(dense, images, kinds=kinds, layout=config.search.layout, seed=seed)
    say(f"one shot: {config.one_shot} images without labels scored in {time.monotonic() - began:.0f} s")
    found = {}
    for budget in config.budgets:
        small = cut(scored.model, plan(scored, budget, latency=config.latency_table), images=images)
        found[budget.name] = {"top1_one_shot": judge(small)["top1"]}
        say(f"{budget.name}: one shot, top-1 {found[budget.name]['top1_one_shot']:.4f} without training")
    if processes().is_main_process:
        atomic_json(target, found)
    return found


def _search(
    dense: nn.Module, data: Data, config: RunConfig, directory: Path, judge: Judge, say: Say
) -> tuple[SearchResult, float]:
    if (directory / RECORD).exists():
        say("search: done before")
        result = load_search(directory)
        result.model.to(processes().device)
        return result, float(read_json(directory / "seconds.json")["seconds"])
    say("search: weights and masks train together")
    began = time.monotonic()
    model = copy.deepcopy(dense)
    result = search(model, data, config.search, directory=directory, resume=True, evaluate=judge)
    seconds = time.monotonic() - began
    if processes().is_main_process:
        atomic_json(directory / "seconds.json", {"seconds": seconds})
        result.save(directory)
    return result, seconds


def _one_budget(
    budget: Budget,
    dense: nn.Module,
    result: SearchResult,
    data: Data,
    config: RunConfig,
    root: Path,
    judge: Judge,
    say: Say,
) -> tuple[nn.Module, dict[str, Any]]:
    """Cut to one budget, retrain, evaluate; everything is in files afterwards."""
    directory = root / budget.name
    row_file = directory / "row.json"
    if row_file.exists():
        say(f"{budget.name}: done before")
        return checkpoint.load(directory / "slim"), read_json(row_file)
    began = time.monotonic()
    chosen = _plan(budget, result, config.latency_table, directory)
    batch_size, seed = config.search.train.batch_size, config.search.train.seed
    images = calibration_images(data, config.compensate, batch_size=batch_size, seed=seed) if config.compensate else []
    small = cut(result.model, chosen, images=images).eval()
    seconds = {"cut": time.monotonic() - began}
    top1_cut = judge(small)["top1"]
    _save(small, directory / "cut", provenance(config, result, chosen, {"top1": top1_cut}))
    say(f"{budget.name}: cut, top-1 {top1_cut:.4f} before retraining")
    began = time.monotonic()
    history = train(
        small,
        data,
        config.retrain,
        teacher=dense if config.distil is not None else None,
        distil=config.distil,
        directory=directory,
        resume=True,
        evaluate=judge,
        title=budget.name,
    )
    small = history.averaged if history.averaged is not None else small
    seconds["retrain"] = time.monotonic() - began
    top1 = history.metrics["top1"]
    _save(small, directory / "slim", provenance(config, result, chosen, dict(history.metrics)))
    row = row_entry(budget, small, anatomy_of(dense), chosen, top1_cut, top1, seconds)
    if processes().is_main_process:
        atomic_json(row_file, row)
    return small, row


def _save(model: nn.Module, directory: Path, record: dict[str, Any]) -> None:
    """Save a checkpoint from the first process, unless an earlier call has done it."""
    if processes().is_main_process and not directory.exists():
        checkpoint.save(model, directory, record)


def _silent(line: str) -> None:
    """Say nothing: the first process speaks for all."""


def _plan(budget: Budget, result: SearchResult, latency_table: str | None, directory: Path) -> Plan:
    target = directory / "plan.json"
    if processes().is_main_process and not target.exists():
        plan(result, budget, latency=latency_table).save(target)
    processes().wait_for_everyone()
    return Plan.load(target)
