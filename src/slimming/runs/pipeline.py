"""The whole chain from one configuration: search, cut to each budget, retrain, measure, report.

Every stage leaves a file when it is done and is skipped when that file is there, so that a chain that was
stopped anywhere goes on where it stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from slimming.core.completion import complete
from slimming.core.files import atomic_json, read_json
from slimming.core.same_settings import check_same_settings
from slimming.counting.model_cost import total
from slimming.errors import ConfigError, MissingExtraError
from slimming.masks.attachment import independent, joint, prunable, searched
from slimming.masks.soft_masks import attach_
from slimming.models.prunable import PrunableModel
from slimming.planning.budgeting import plan
from slimming.pruning.cutting import cut
from slimming.retraining.slimmable import check_tokens
from slimming.runs.config import FREE_SECTIONS, TOGETHER, RunConfig
from slimming.runs.explore import explore
from slimming.runs.results import dense_entry, measure_all, plain, results_of
from slimming.runs.setup import open_data, open_start
from slimming.runs.stages import Judge, Say, Work, slim_all
from slimming.runs.time_budget import Allotment, allot, measure_pace
from slimming.scoring.one_shot import score
from slimming.searching.mask_search import RECORD, SearchResult, load_search, search
from slimming.training import loop
from slimming.training.batches import calibration_images
from slimming.training.config import FREE_SETTINGS, TrainConfig
from slimming.training.distillation import check_modules
from slimming.training.distributed import distributed_state
from slimming.training.evaluation import evaluate
from slimming.training.samples import Data, ImageDataset
from slimming.training.step_counts import steps_per_epoch

SETTINGS = "settings.json"


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
    from slimming.report import write_report, write_table
    from slimming.report.model import parse

    directory, began = Path(directory), time.monotonic()
    world = distributed_state()
    if not world.is_main_process:
        say = _silent
    dense, data, notes = open_start(config.model, config.data, config.search.train.seed)
    dense.to(world.device)
    for note in notes:
        say(note)
    whole = prunable(dense)
    shares = check_budgets(whole, config)
    check_training("search.train", config.search.train, data, directory)
    check_training("retrain", config.retrain, data, directory)
    asked, allotment = config, _allotment(dense, data, config, shares, directory, began)
    if allotment is not None:
        say(allotment.line(asked))
        config = allotment.applied(asked)
    at_once = min(256, config.search.train.images_per_pass, config.retrain.images_per_pass)
    judge = partial(evaluate, images=data.val, batch_size=at_once, workers=config.retrain.workers)
    top1 = _dense_metrics(dense, judge, directory, say)
    check_settings(asked, directory, write=world.is_main_process)
    one_shot = _one_shot(dense, config, directory, judge, say)
    result, seconds = _search(dense, data, config, directory / "search", judge, say)
    work = Work(config=config, dense=whole, data=data, result=result, root=directory, judge=judge, say=say)
    slims, rows = slim_all(work)
    if not world.is_main_process:
        return {}
    say("measuring latency, dense and slim in turns")
    models = {name: model.to(world.device) for name, model in {"dense": dense, **slims}.items()}
    timed = measure_all(models, whole.anatomy.input_shape, config.bench)
    rows = [{**row, **one_shot.get(row["name"], {}), **timed[row["name"]]} for row in rows]
    dense_row = dense_entry(dense, top1, timed["dense"])
    results = results_of(asked, whole, data, dense_row, rows, result, seconds)
    if allotment is not None:
        results["allotment"] = dataclasses.asdict(allotment)
    atomic_json(directory / "results.json", results)
    say("report: plans of the search at every hundredth")
    write_report(directory, explored=explore(directory))
    write_table(parse(results), directory / "table.md")
    return results


def check_budgets(dense: PrunableModel, config: RunConfig) -> list[float]:
    """Check before a search that plans for all budgets can be made; which sizes can be had needs no scores.

    Returns:
        The share of the MACs that each budget leaves, about.

    Raises:
        BudgetError: one cannot be reached; the message says the smallest that can.
        ConfigError: ``distil`` names modules that the model has not, or that one retraining for all budgets cannot
            compare.
    """
    if config.distil is not None:
        check_modules(dense.model, "model", (*config.distil.features, *config.distil.relations))
    own = joint(dense.anatomy.groups) if config.search.coupled else independent(dense.anatomy.groups)
    groups = searched(own, config.search.kinds)
    if config.retraining == TOGETHER:
        check_tokens(config.distil, [group for group in groups if group.kind == "token"])
    masks = attach_(dense.copy(), groups, tokens=config.search.tokens, penalty=config.search.penalty)
    anatomy, shares = masks.anatomy, []
    whole = total(anatomy, {group.name: group.size for group in anatomy.groups}).macs
    for budget in config.budgets:
        trial = plan(masks, budget, layout=config.search.layout, score="mask", latency=config.latency_table)
        counts = {name: len(units) for name, units in complete(anatomy, trial).items()}
        shares.append(total(anatomy, counts).macs / whole)
    return shares


def check_settings(config: RunConfig, directory: Path, *, write: bool) -> None:
    """Check that what an earlier call left in ``directory`` was made with the same settings, or write them down.

    Raises:
        ConfigError: it was not.
    """
    path, now = directory / SETTINGS, plain(config)
    if path.exists():
        check_same_settings(directory, read_json(path), now, free=FREE_SETTINGS, free_sections=FREE_SECTIONS)
    if write:
        atomic_json(path, now)


def check_training(where: str, config: TrainConfig, data: Data, directory: Path) -> None:
    """Check the section ``where`` of the configuration; see `slimming.training.loop.check_training`.

    Raises:
        ConfigError: a setting does not fit the data; the message names the section.
        MissingExtraError: a tracker is not installed.
    """
    try:
        loop.check_training(config, data, directory)
    except (ConfigError, MissingExtraError) as error:
        raise type(error)(f"{where}: {error}") from error


def _allotment(
    dense: nn.Module, data: Data, config: RunConfig, shares: Sequence[float], directory: Path, began: float
) -> Allotment | None:
    """What the hours are enough for, as an earlier call found it, or measured now; None where none were given.

    Raises:
        ConfigError: nobody knows how many training images there are, or a warm-up is longer than its training.
    """
    if config.hours is None:
        return None
    target = directory / "allotment.json"
    if not target.exists():
        epochs = [steps_per_epoch(data.train, train.batch_size) for train in (config.search.train, config.retrain)]
        if epochs[0] is None or epochs[1] is None:
            raise ConfigError("hours needs data that knows how many images it has; set steps in place of it.")
        pace = measure_pace(dense, data, config.retrain)
        val = len(data.val) if isinstance(data.val, ImageDataset) else getattr(data.val, "length", None) or 0
        spent = time.monotonic() - began
        chosen = allot(config, pace, shares, epochs=(epochs[0], epochs[1]), val_images=val, spent_seconds=spent)
        applied = chosen.applied(config)
        check_training("search.train", applied.search.train, data, directory)
        check_training("retrain", applied.retrain, data, directory)
        if distributed_state().is_main_process:
            atomic_json(target, dataclasses.asdict(chosen))
        distributed_state().wait_for_everyone()
    return Allotment(**read_json(target))


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
    if distributed_state().is_main_process:
        atomic_json(target, found)
    return found


def _search(
    dense: nn.Module, data: Data, config: RunConfig, directory: Path, judge: Judge, say: Say
) -> tuple[SearchResult, float]:
    if (directory / RECORD).exists():
        say("search: done before")
        result = load_search(directory)
        result.model.to(distributed_state().device)
        return result, float(read_json(directory / "seconds.json")["seconds"])
    say("search: weights and masks train together")
    began = time.monotonic()
    model = copy.deepcopy(dense)
    result = search(model, data, config.search, directory=directory, resume=True, evaluate=judge)
    seconds = time.monotonic() - began
    if distributed_state().is_main_process:
        atomic_json(directory / "seconds.json", {"seconds": seconds})
        result.save(directory)
    return result, seconds


def _silent(line: str) -> None:
    """Say nothing: the first process speaks for all."""
