"""Cut and retrain the model of every budget: each separately, all together, or progressively.

A finished stage writes a file, and is skipped if this file exists.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slimming.checkpoints import checkpoint
from slimming.core.budget import Budget
from slimming.core.metric import TOP1, Metric
from slimming.core.pruning_plan import Plan
from slimming.errors import ConfigError
from slimming.models.prunable import PrunableModel
from slimming.planning.budgeting import plan
from slimming.pruning.cutting import cut
from slimming.retraining.progressive import cut_from_last, order_by_macs
from slimming.retraining.retrain import train
from slimming.retraining.slimmable import recalibrate_batch_norms_, train_slimmable
from slimming.runs.config import EACH, PROGRESSIVE, TOGETHER, RunConfig
from slimming.runs.files import (
    CUT_PLACE,
    PLAN_FILE,
    ROW,
    ROW_FILE,
    SERVED,
    SERVED_FILE,
    SLIM_PLACE,
    missing_in_budget,
    missing_in_shared_training,
)
from slimming.runs.results import provenance, row_entry
from slimming.searching.mask_search import SearchResult, load_search
from slimming.training.batches import calibration_images
from slimming.training.distributed import check_others, distributed_state, of_main_process
from slimming.training.log import LOG_FILE
from slimming.training.samples import Data

Log = Callable[[str], None]
Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What the stages of all budgets share.

    Attributes:
        config: settings of the run.
        dense: the dense model, which is the teacher.
        data: the images.
        result: result of the search.
        root: directory of the run.
        inputs: what the run was started with, as `recorded_inputs` returns it.
        evaluate: returns the metrics of a model on the validation images.
        log: receives one line per stage.
        metric: the metric in what ``evaluate`` returns that results and reports show.
    """

    config: RunConfig
    dense: PrunableModel
    data: Data
    result: SearchResult
    root: Path
    inputs: Mapping[str, Any]
    evaluate: Evaluate
    log: Log
    metric: Metric = TOP1

    def images(self, at_least: int = 0) -> list[Tensor]:
        """Return training images without labels, for the compensation."""
        train, count = self.config.search.train, max(self.config.compensate, at_least)
        return calibration_images(self.data, count, batch_size=train.batch_size, seed=train.seed) if count else []

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher of the retraining, or None."""
        return self.dense.model if self.config.distil is not None else None


def value_of(metric: Metric, metrics: Mapping[str, float]) -> float:
    """Return the value of ``metric`` in what the evaluation of a model returned.

    Raises:
        ConfigError: it has no such entry.
    """
    if metric.key not in metrics:
        raise ConfigError(
            f"evaluate returns {', '.join(metrics) or 'nothing'}, and no {metric.key!r}; give the entry to "
            "Metric(key=...)."
        )
    return float(metrics[metric.key])


def prune_and_retrain_all(context: RunContext) -> tuple[dict[str, nn.Module], list[dict[str, Any]]]:
    """Cut and retrain the models of all budgets; return the models by name, and their table rows without latencies."""
    budgets = {budget.name: budget for budget in context.config.budgets}
    plans = {name: _plan(context, budget) for name, budget in budgets.items()}
    names = list(budgets)
    if context.config.retraining == TOGETHER:
        unfinished = of_main_process([name for name in names if missing_in_budget(context.root, name)])
        shared = _shared_training(context, plans) if unfinished else None
    else:
        shared = None
    if context.config.retraining == PROGRESSIVE:
        names = [names[index] for index in order_by_macs(context.result.model, list(plans.values()))]
    done: list[tuple[Plan, nn.Module]] = []
    models: dict[str, nn.Module] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        before = done if context.config.retraining == PROGRESSIVE else []
        models[name], rows[name] = _prune_and_retrain(context, budgets[name], plans[name], before, shared)
        done.append((plans[name], models[name]))
    return {name: models[name] for name in budgets}, [rows[name] for name in budgets]


def _prune_and_retrain(
    context: RunContext,
    budget: Budget,
    chosen: Plan,
    before: list[tuple[Plan, nn.Module]],
    shared: tuple[SearchResult, float] | None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Cut, retrain and evaluate the model of one budget, and save the results.

    Args:
        context: what all budgets share.
        budget: the budget.
        chosen: its plan.
        before: plans and retrained models of larger budgets, from which the model is cut if possible.
        shared: result of the training for all budgets, and the share of this budget in its seconds; None retrains the
            model separately.
    """
    directory = context.root / budget.name
    row_file = directory / ROW_FILE
    if not (missing := of_main_process(missing_in_budget(context.root, budget.name))):
        context.log(f"{budget.name}: already done")
        return checkpoint.load(directory / SLIM_PLACE).to(distributed_state().device), ROW.read_values(row_file)
    if row_file.exists():
        context.log(f"{budget.name}: {', '.join(missing)} is missing and made again")
    began, config, result = time.monotonic(), context.config, context.result
    images = context.images()
    small = cut_from_last(result.model, chosen, before, images=images).eval()
    seconds = {"cut": time.monotonic() - began}
    metric = context.metric
    value_cut = value_of(metric, context.evaluate(small))
    _save(small, directory / CUT_PLACE, provenance(config, result, chosen, {metric.key: value_cut}, context.inputs))
    context.log(f"{budget.name}: cut, {metric.name} {value_cut:.4f} before retraining")
    if shared is None:
        small, metrics, seconds["retrain"] = _retrain(context, small, budget.name)
    else:
        small = cut(shared[0].model, chosen).eval()
        recalibrate_batch_norms_(small, images or context.images(at_least=256))
        metrics, seconds["retrain"] = context.evaluate(small), shared[1]
    _save(small, directory / SLIM_PLACE, provenance(config, result, chosen, metrics, context.inputs))
    values = value_cut, value_of(metric, metrics)
    row = row_entry(budget, small, context.dense.anatomy, chosen, values, seconds, metric)
    if shared is not None:
        row["log"] = f"{TOGETHER}/{LOG_FILE}"
    if distributed_state().is_main_process:
        row["log_sha256"] = checkpoint.sha256(context.root / row["log"])
        ROW.write(row_file, row)
    return small, row


def _retrain(context: RunContext, small: nn.Module, name: str) -> tuple[nn.Module, dict[str, float], float]:
    """Retrain one cut model; return the model to use, its metrics, and the seconds that the training took."""
    began = time.monotonic()
    history = train(
        small,
        context.data,
        context.config.retrain,
        teacher=context.teacher,
        distil=context.config.distil,
        directory=context.root / name,
        resume=True,
        evaluate=context.evaluate,
        title=name,
    )
    small = history.averaged if history.averaged is not None else small
    return small, dict(history.metrics), time.monotonic() - began


def _shared_training(context: RunContext, plans: Mapping[str, Plan]) -> tuple[SearchResult, float]:
    """Train the shared weights, or load them; return the result, and the share of each budget in the seconds."""
    directory, world = context.root / TOGETHER, distributed_state()
    if not of_main_process(missing_in_shared_training(directory)):
        served = SERVED.read(directory / SERVED_FILE)
        context.log(f"{TOGETHER}: already trained for {', '.join(served.budgets)}")
        result = load_search(directory)
        result.model.to(world.device)
        return result, served.seconds / len(served.budgets)
    context.log(f"{TOGETHER}: one training for {', '.join(plans)}")
    began = time.monotonic()
    result = train_slimmable(
        context.result,
        context.data,
        list(plans.values()),
        context.config.retrain,
        context.teacher,
        distil=context.config.distil,
        directory=directory,
        resume=True,
        evaluate=context.evaluate,
    )
    seconds = time.monotonic() - began
    if world.is_main_process:
        result.save(directory)
        served = {"budgets": list(plans), "seconds": seconds, "log_sha256": checkpoint.sha256(directory / LOG_FILE)}
        SERVED.write(directory / SERVED_FILE, served)
    return result, seconds / len(plans)


def _save(model: nn.Module, directory: Path, record: dict[str, Any]) -> None:
    """Save a checkpoint on the main process, unless it exists."""
    if distributed_state().is_main_process:
        checkpoint.save_again(model, directory, record)


def _plan(context: RunContext, budget: Budget) -> Plan:
    """Make the plan, or load it. Plans whose models share weights or are cut from one another are nested."""
    target = context.root / budget.name / PLAN_FILE
    solver = None if context.config.retraining == EACH else "nested"
    if distributed_state().is_main_process and not target.exists():
        plan(context.result, budget, latency=context.config.latency_table, solver=solver).save(target)
    check_others()
    found = Plan.load(target)
    if found.note:
        context.log(f"{budget.name}: {found.note}")
    return found
