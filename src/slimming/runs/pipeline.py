"""Run the whole pipeline: search, cut to each budget, retrain, measure, report.

A finished stage writes a file, and is skipped if this file exists, so that an interrupted run can be resumed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from slimming.checkpoints import checkpoint
from slimming.core.argument_types import checked_arguments
from slimming.core.completion import complete
from slimming.core.copies import copied
from slimming.core.files import check_free, exclusive, json_values
from slimming.core.inputs import Inputs, check_inputs, inputs_are_checked, recorded_inputs
from slimming.core.interrupts import interruptible
from slimming.core.metric import TOP1, Metric
from slimming.core.plain_text import without_places
from slimming.core.same_settings import check_same_settings, differing
from slimming.counting.model_cost import total
from slimming.errors import CheckpointError, ConfigError, MissingExtraError
from slimming.masks.attachment import prunable
from slimming.masks.soft_masks import attach_
from slimming.models.prunable import PrunableModel
from slimming.planning.budgeting import plan
from slimming.pruning.cutting import cut
from slimming.report.model import RESULTS as RESULTS_KIND
from slimming.report.pages import RESULTS as RESULTS_FILE
from slimming.report.pages import TABLE
from slimming.retraining.slimmable import check_tokens
from slimming.runs.config import CONFIG_FILE, FREE_SECTIONS, TOGETHER, RunConfig, is_unscored
from slimming.runs.explore import explore
from slimming.runs.files import (
    DENSE_FILE,
    HOURS_FILE,
    METRICS,
    ONE_SHOT,
    SEARCH_PLACE,
    SECONDS,
    SECONDS_FILE,
    SETTINGS,
    SETTINGS_FILE,
    SHOTS_FILE,
    TIME_ALLOCATION,
    is_started,
    missing_files,
    missing_in_search,
)
from slimming.runs.inputs import check_named_inputs
from slimming.runs.results import dense_entry, entry_of, measure_all, results_of
from slimming.runs.setup import open_start
from slimming.runs.stages import Evaluate, Log, RunContext, prune_and_retrain_all, value_of
from slimming.runs.time_budget import TimeAllocation, allocate, measure_pace
from slimming.scoring.one_shot import score
from slimming.searching.config import scoring_settings
from slimming.searching.mask_search import SearchResult, groups_to_search, load_search, search
from slimming.training import loop
from slimming.training.batches import calibration_images
from slimming.training.config import FREE_SETTINGS, TrainConfig
from slimming.training.distillation import check_modules
from slimming.training.distributed import agreed, check_others, distributed_state, of_main_process
from slimming.training.evaluation import evaluate as evaluate_top1
from slimming.training.inputs import weights_checksum
from slimming.training.log import LOG_FILE
from slimming.training.samples import Data, ImageDataset
from slimming.training.step_counts import steps_per_epoch

TIMES = ("latency_ms", "speedup")
"""Entries of a row that are measured after all budgets are finished."""


@agreed()
@checked_arguments
def run(
    config: RunConfig,
    directory: str | Path,
    *,
    log: Log = print,
    evaluate: Evaluate | None = None,
    metric: Metric = TOP1,
) -> dict[str, Any]:
    """Run the whole pipeline in ``directory``, or resume it there, and write the report.

    Under ``accelerate launch`` or ``torchrun`` every process must call it; the main process writes the files.

    Args:
        config: settings of the run.
        directory: directory for all results.
        log: receives one line per stage.
        evaluate: replaces `slimming.evaluate`: gets a model and returns its metrics by name.
        metric: the metric among them that results and report show. Give it with ``evaluate``.

    Returns:
        The content of ``results.json``; an empty dict on processes other than the main one.

    Raises:
        OutputError: the directory contains files of others, is in use by another process, or is not writable.
        Interrupted: Ctrl-C was pressed, or SIGTERM received; finished stages and the state of a training are kept.
        SlimmingError: a subclass for each other cause, such as ConfigError, DataError or BudgetError.
    """
    directory, is_main = Path(directory), distributed_state().is_main_process
    stop = interruptible(f"Finished stages are kept in {directory}; run again to go on.")
    with stop, exclusive(directory) if is_main else nullcontext():
        if is_main and not is_started(directory):
            check_free(directory, besides=(CONFIG_FILE,))
        return _run(config, directory, log if is_main else _discard, evaluate, metric)


def _run(config: RunConfig, directory: Path, log: Log, own: Evaluate | None, metric: Metric) -> dict[str, Any]:
    began, world = time.monotonic(), distributed_state()
    dense, data, notes = open_start(config.model, config.data, config.search.train.seed)
    dense.to(world.device)
    for note in notes:
        log(note)
    whole = prunable(dense)
    shares = check_budgets(whole, config)
    check_training("search.train", config.search.train, data, directory)
    check_training("retrain", config.retrain, data, directory)
    check_settings(config, directory, write=world.is_main_process)
    if world.is_main_process:
        _check_files(config, directory)
        weights = Inputs(checksums={"the weights of the dense model": weights_checksum(dense)})
        check_inputs(directory, weights, fresh=not (directory / DENSE_FILE).exists())
    with inputs_are_checked():
        return _stages(config, directory, log, whole, data, shares, began, own, metric)


def _check_files(config: RunConfig, directory: Path) -> None:
    """Check that the files that the settings name are those of the earlier work in ``directory``.

    Raises:
        ConfigError: they are not; the message names them.
    """
    fresh = not (directory / DENSE_FILE).exists()
    check_named_inputs(directory, config.model, config.data, latency_table=config.latency_table, fresh=fresh)


def _stages(
    config: RunConfig,
    directory: Path,
    log: Log,
    whole: PrunableModel,
    data: Data,
    shares: Sequence[float],
    began: float,
    own: Evaluate | None,
    metric: Metric,
) -> dict[str, Any]:
    """Run the stages that are not finished; see `run`."""
    from slimming.report import write_report, write_table
    from slimming.report.model import parse

    dense, world = whole.model, distributed_state()
    asked, allocation = config, _time_allocation(dense, data, config, shares, directory, began)
    if allocation is not None:
        log(allocation.line(asked))
        config = allocation.applied(asked)
    images_per_pass = min(256, config.search.train.images_per_pass, config.retrain.images_per_pass)
    evaluate_model = own or partial(
        evaluate_top1, images=data.val, batch_size=images_per_pass, workers=config.retrain.workers
    )
    value = _dense_metric(dense, evaluate_model, metric, directory, log)
    one_shot = _one_shot(dense, data, config, directory, evaluate_model, metric, log)
    result, seconds = _search(dense, data, config, directory / SEARCH_PLACE, evaluate_model, log)
    inputs = recorded_inputs(directory) if world.is_main_process else {}
    context = RunContext(
        config=config,
        dense=whole,
        data=data,
        result=result,
        root=directory,
        inputs=inputs,
        evaluate=evaluate_model,
        log=log,
        metric=metric,
    )
    slims, rows = prune_and_retrain_all(context)
    if not world.is_main_process:
        return {}
    rows = [{**row, **one_shot.get(row["name"], {})} for row in rows]
    results = _stored_results(directory, asked, rows)
    if results is None:
        log("measuring latency, dense and slim in turns")
        models = {name: model.to(world.device) for name, model in {"dense": dense, **slims}.items()}
        timed = measure_all(models, whole.examples()[0], config.bench)
        rows = [{**row, **timed[row["name"]]} for row in rows]
        dense_row = dense_entry(dense, value, timed["dense"], metric)
        results = results_of(asked, whole, data, dense_row, rows, result, seconds, metric)
        results["search"]["log_sha256"] = checkpoint.sha256(directory / SEARCH_PLACE / LOG_FILE)
        results["inputs"] = inputs
        if allocation is not None:
            results["time_allocation"] = dataclasses.asdict(allocation)
        RESULTS_KIND.write(directory / RESULTS_FILE, results)
    log("report: plans of the search at every hundredth")
    write_report(directory, explored=explore(directory))
    write_table(parse(results), directory / TABLE)
    return results


def finished_results(directory: Path, config: RunConfig) -> dict[str, Any] | None:
    """Return the results of a finished run in ``directory`` with these settings; None if a file is missing.

    Raises:
        CheckpointError: a file is damaged.
        ConfigError: the files of an input, such as the data, are no longer those of the run.
    """
    # The settings come first: other settings have other files.
    if not (directory / RESULTS_FILE).exists():
        return None
    results = RESULTS_KIND.read_values(directory / RESULTS_FILE)
    if differing(results["settings"], without_places(json_values(config)), free=FREE_SETTINGS):
        return None
    if missing_files(directory, config):
        return None
    # The settings in the results lack the directories of the data and of the model.
    stored = SETTINGS.read(directory / SETTINGS_FILE)
    if differing(stored, json_values(config), free=FREE_SETTINGS, free_sections=FREE_SECTIONS):
        return None
    if distributed_state().is_main_process:
        _check_files(config, directory)
    return results


def _stored_results(directory: Path, config: RunConfig, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The results in ``directory`` if they are of these settings and of these rows, which lack the latencies."""
    if not (directory / RESULTS_FILE).exists():
        return None
    results = RESULTS_KIND.read_values(directory / RESULTS_FILE)
    stored = [{key: entry for key, entry in row.items() if key not in TIMES} for row in results["rows"]]
    same = not differing(results["settings"], without_places(json_values(config)), free=FREE_SETTINGS)
    return results if same and stored == json_values(rows) else None


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
    path, now = directory / SETTINGS_FILE, json_values(config)
    if path.exists():
        free = (*FREE_SETTINGS, *(scoring_settings(config.search) if is_unscored(directory) else ()))
        check_same_settings(directory, SETTINGS.read(path), now, free=free, free_sections=FREE_SECTIONS)
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
    target = directory / HOURS_FILE
    if not of_main_process(target.exists()):
        if (directory / SEARCH_PLACE).exists():
            raise CheckpointError(
                f"{target} is missing, which says how long the finished stages were. Put it back, or start a new run "
                "in another directory."
            )
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
        check_others()
    return TIME_ALLOCATION.read(target)


def _dense_metric(dense: nn.Module, evaluate_model: Evaluate, metric: Metric, directory: Path, log: Log) -> float:
    target, entry = directory / DENSE_FILE, entry_of(metric)
    if of_main_process(target.exists()):
        stored = getattr(METRICS.read(target), entry)
        if stored is None:
            raise ConfigError(
                f"{directory} was started with another metric than {metric.name}: give the same, or another directory."
            )
        return stored
    log("evaluating the dense model")
    metrics = evaluate_model(dense)
    value = value_of(metric, metrics)
    if distributed_state().is_main_process:
        METRICS.write(target, {**metrics, entry: value})
    return value


def _one_shot(
    dense: nn.Module, data: Data, config: RunConfig, directory: Path, evaluate_model: Evaluate, metric: Metric, log: Log
) -> dict[str, dict[str, float]]:
    """Cut every budget in one shot and evaluate it; return budget -> entries of its table row."""
    if not config.one_shot:
        return {}
    target = directory / SHOTS_FILE
    if of_main_process(target.exists()):
        log("one shot: already done")
        return ONE_SHOT.read_values(target)
    began, seed = time.monotonic(), config.search.train.seed
    images = calibration_images(data, config.one_shot, seed=seed)
    kinds = config.search.kinds
    scored = score(dense, images, kinds=kinds, layout=config.search.layout, seed=seed)
    log(f"one shot: {config.one_shot} images without labels scored in {time.monotonic() - began:.0f} s")
    entries = {}
    for budget in config.budgets:
        small = cut(scored.model, plan(scored, budget, latency=config.latency_table), images=images)
        value = value_of(metric, evaluate_model(small))
        entries[budget.name] = {entry_of(metric, "_one_shot"): value}
        log(f"{budget.name}: one shot, {metric.name} {value:.4f} without training")
    if distributed_state().is_main_process:
        ONE_SHOT.write(target, entries)
    return entries


def _search(
    dense: nn.Module, data: Data, config: RunConfig, directory: Path, evaluate_model: Evaluate, log: Log
) -> tuple[SearchResult, float]:
    if not of_main_process(missing_in_search(directory)):
        log("search: already done")
        result = load_search(directory)
        result.model.to(distributed_state().device)
        return result, SECONDS.read(directory / SECONDS_FILE).seconds
    log("search: weights and masks train together")
    began = time.monotonic()
    model = copied(dense)
    result = search(model, data, config.search, directory=directory, resume=True, evaluate=evaluate_model)
    seconds = time.monotonic() - began
    if distributed_state().is_main_process:
        result.save(directory)
        content = {"seconds": seconds, "log_sha256": checkpoint.sha256(directory / LOG_FILE)}
        SECONDS.write(directory / SECONDS_FILE, content)
    return result, seconds


def _discard(line: str) -> None:
    """Log nothing; only the main process logs."""
