"""Run the whole pipeline: search, cut to each budget, retrain, measure, report.

A finished stage writes a file, and is skipped if this file exists, so that an interrupted run can be resumed.
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
from slimming.core.files import json_values
from slimming.core.same_settings import check_same_settings
from slimming.counting.model_cost import total
from slimming.errors import ConfigError, MissingExtraError
from slimming.masks.attachment import prunable
from slimming.masks.soft_masks import attach_
from slimming.models.prunable import PrunableModel
from slimming.planning.budgeting import plan
from slimming.pruning.cutting import cut
from slimming.retraining.slimmable import check_tokens
from slimming.runs.config import FREE_SECTIONS, TOGETHER, RunConfig
from slimming.runs.explore import explore
from slimming.runs.files import METRICS, ONE_SHOT, SECONDS, SETTINGS, TIME_ALLOCATION
from slimming.runs.results import dense_entry, measure_all, results_of
from slimming.runs.setup import open_data, open_start
from slimming.runs.stages import Evaluate, Log, RunContext, prune_and_retrain_all
from slimming.runs.time_budget import TimeAllocation, allocate, measure_pace
from slimming.scoring.one_shot import score
from slimming.searching.mask_search import RECORD, SearchResult, groups_to_search, load_search, search
from slimming.training import loop
from slimming.training.batches import calibration_images
from slimming.training.config import FREE_SETTINGS, TrainConfig
from slimming.training.distillation import check_modules
from slimming.training.distributed import distributed_state
from slimming.training.evaluation import evaluate
from slimming.training.samples import Data, ImageDataset
from slimming.training.step_counts import steps_per_epoch


def run(config: RunConfig, directory: str | Path, *, log: Log = print) -> dict[str, Any]:
    """Run the whole pipeline in ``directory``, or resume it there, and write the report.

    Under ``accelerate launch`` or ``torchrun`` every process must call it; the main process writes the files.

    Args:
        config: settings of the run.
        directory: directory for all results.
        log: receives one line per stage.

    Returns:
        The content of ``results.json``; an empty dict on processes other than the main one.

    Raises:
        SlimmingError: a subclass for each cause, such as ConfigError, DataError or BudgetError.
    """
    from slimming.report import write_report, write_table
    from slimming.report.model import RESULTS, parse

    directory, began = Path(directory), time.monotonic()
    world = distributed_state()
    if not world.is_main_process:
        log = _discard
    dense, data, notes = open_start(config.model, config.data, config.search.train.seed)
    dense.to(world.device)
    for note in notes:
        log(note)
    whole = prunable(dense)
    shares = check_budgets(whole, config)
    check_training("search.train", config.search.train, data, directory)
    check_training("retrain", config.retrain, data, directory)
    asked, allocation = config, _time_allocation(dense, data, config, shares, directory, began)
    if allocation is not None:
        log(allocation.line(asked))
        config = allocation.applied(asked)
    images_per_pass = min(256, config.search.train.images_per_pass, config.retrain.images_per_pass)
    evaluate_model = partial(evaluate, images=data.val, batch_size=images_per_pass, workers=config.retrain.workers)
    top1 = _dense_metrics(dense, evaluate_model, directory, log)
    check_settings(asked, directory, write=world.is_main_process)
    one_shot = _one_shot(dense, config, directory, evaluate_model, log)
    result, seconds = _search(dense, data, config, directory / "search", evaluate_model, log)
    context = RunContext(
        config=config, dense=whole, data=data, result=result, root=directory, evaluate=evaluate_model, log=log
    )
    slims, rows = prune_and_retrain_all(context)
    if not world.is_main_process:
        return {}
    log("measuring latency, dense and slim in turns")
    models = {name: model.to(world.device) for name, model in {"dense": dense, **slims}.items()}
    timed = measure_all(models, whole.anatomy.input_shape, config.bench)
    rows = [{**row, **one_shot.get(row["name"], {}), **timed[row["name"]]} for row in rows]
    dense_row = dense_entry(dense, top1, timed["dense"])
    results = results_of(asked, whole, data, dense_row, rows, result, seconds)
    if allocation is not None:
        results["time_allocation"] = dataclasses.asdict(allocation)
    RESULTS.write(directory / "results.json", results)
    log("report: plans of the search at every hundredth")
    write_report(directory, explored=explore(directory))
    write_table(parse(results), directory / "table.md")
    return results


def check_budgets(dense: PrunableModel, config: RunConfig) -> list[float]:
    """Check before the search that all budgets can be reached, which does not depend on the scores.

    Returns:
        The approximate share of the dense model's MACs that each budget keeps.

    Raises:
        BudgetError: a budget cannot be reached; the message names the smallest that can.
        ConfigError: ``distil`` names modules that the model does not have, or that cannot be compared when one training
            serves all budgets.
    """
    if config.distil is not None:
        check_modules(dense.model, "model", (*config.distil.features, *config.distil.relations))
    groups = groups_to_search(dense.anatomy, config.search)
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
    """Check that earlier work in ``directory`` has the same settings, and write them if ``write`` is True.

    Raises:
        ConfigError: it has other settings.
    """
    path, now = directory / "settings.json", json_values(config)
    if path.exists():
        check_same_settings(directory, SETTINGS.read(path), now, free=FREE_SETTINGS, free_sections=FREE_SECTIONS)
    if write:
        SETTINGS.write(path, now)


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


def _time_allocation(
    dense: nn.Module, data: Data, config: RunConfig, shares: Sequence[float], directory: Path, began: float
) -> TimeAllocation | None:
    """Return the time allocation, measured now or saved by an earlier call; None if ``config.hours`` is None.

    Raises:
        ConfigError: the number of training images is not known, or a warm-up is longer than its training.
    """
    if config.hours is None:
        return None
    target = directory / "time_allocation.json"
    if not target.exists():
        epochs = [steps_per_epoch(data.train, train.batch_size) for train in (config.search.train, config.retrain)]
        if epochs[0] is None or epochs[1] is None:
            raise ConfigError("hours needs data with a known number of images; set steps instead.")
        pace = measure_pace(dense, data, config.retrain)
        val = len(data.val) if isinstance(data.val, ImageDataset) else getattr(data.val, "length", None) or 0
        spent = time.monotonic() - began
        chosen = allocate(config, pace, shares, epochs=(epochs[0], epochs[1]), val_images=val, spent_seconds=spent)
        applied = chosen.applied(config)
        check_training("search.train", applied.search.train, data, directory)
        check_training("retrain", applied.retrain, data, directory)
        if distributed_state().is_main_process:
            TIME_ALLOCATION.write(target, dataclasses.asdict(chosen))
        distributed_state().wait_for_everyone()
    return TIME_ALLOCATION.read(target)


def _dense_metrics(dense: nn.Module, evaluate_model: Evaluate, directory: Path, log: Log) -> float:
    target = directory / "dense" / "metrics.json"
    if not target.exists():
        log("evaluating the dense model")
        METRICS.write(target, evaluate_model(dense))
    return METRICS.read(target).top1


def _one_shot(
    dense: nn.Module, config: RunConfig, directory: Path, evaluate_model: Evaluate, log: Log
) -> dict[str, dict[str, float]]:
    """Cut every budget in one shot and evaluate it; return budget -> entries of its table row."""
    if not config.one_shot:
        return {}
    target = directory / "one_shot.json"
    if target.exists():
        log("one shot: already done")
        return ONE_SHOT.read_values(target)
    began, seed = time.monotonic(), config.search.train.seed
    still = open_data(dataclasses.replace(config.data, augment="none"), dense, seed)
    images = calibration_images(still, config.one_shot, seed=seed)
    kinds = config.search.kinds
    scored = score(dense, images, kinds=kinds, layout=config.search.layout, seed=seed)
    log(f"one shot: {config.one_shot} images without labels scored in {time.monotonic() - began:.0f} s")
    entries = {}
    for budget in config.budgets:
        small = cut(scored.model, plan(scored, budget, latency=config.latency_table), images=images)
        entries[budget.name] = {"top1_one_shot": evaluate_model(small)["top1"]}
        log(f"{budget.name}: one shot, top-1 {entries[budget.name]['top1_one_shot']:.4f} without training")
    if distributed_state().is_main_process:
        ONE_SHOT.write(target, entries)
    return entries


def _search(
    dense: nn.Module, data: Data, config: RunConfig, directory: Path, evaluate_model: Evaluate, log: Log
) -> tuple[SearchResult, float]:
    if (directory / RECORD).exists():
        log("search: already done")
        result = load_search(directory)
        result.model.to(distributed_state().device)
        return result, SECONDS.read(directory / "seconds.json").seconds
    log("search: weights and masks train together")
    began = time.monotonic()
    model = copy.deepcopy(dense)
    result = search(model, data, config.search, directory=directory, resume=True, evaluate=evaluate_model)
    seconds = time.monotonic() - began
    if distributed_state().is_main_process:
        SECONDS.write(directory / "seconds.json", {"seconds": seconds})
        result.save(directory)
    return result, seconds


def _discard(line: str) -> None:
    """Log nothing; only the main process logs."""
