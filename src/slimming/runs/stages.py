"""From one search to one retrained model per budget: each on its own, all together, or one after the other.

Every stage leaves a file when it is done and is skipped when that file is there.
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
from slimming.core.files import atomic_json, read_json
from slimming.core.pruning_plan import Plan
from slimming.models.prunable import PrunableModel
from slimming.planning.budgeting import plan
from slimming.pruning.cutting import cut
from slimming.retraining.progressive import cut_from_last, order_by_macs
from slimming.retraining.retrain import train
from slimming.retraining.slimmable import recalibrate_batch_norms_, train_slimmable
from slimming.runs.config import EACH, PROGRESSIVE, TOGETHER, RunConfig
from slimming.runs.results import provenance, row_entry
from slimming.searching.mask_search import SearchResult, load_search
from slimming.training.batches import calibration_images
from slimming.training.processes import processes
from slimming.training.samples import Data

Log = Callable[[str], None]
Evaluate = Callable[[nn.Module], dict[str, float]]
SERVED = "served.json"
"""In the directory of a training for all budgets: the names of those that it was for, and how long it took."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What every budget has in common.

    Attributes:
        config: the run.
        dense: the teacher, and what sizes are compared with.
        data: the images.
        result: the search.
        root: directory of the run.
        evaluate: evaluates a model on the validation images.
        log: receives one line per stage.
    """

    config: RunConfig
    dense: PrunableModel
    data: Data
    result: SearchResult
    root: Path
    evaluate: Evaluate
    log: Log

    def images(self, at_least: int = 0) -> list[Tensor]:
        """Training images without labels, for the cut."""
        train, count = self.config.search.train, max(self.config.compensate, at_least)
        return calibration_images(self.data, count, batch_size=train.batch_size, seed=train.seed) if count else []

    @property
    def teacher(self) -> nn.Module | None:
        """What retraining learns from."""
        return self.dense.model if self.config.distil is not None else None


def prune_and_retrain_all(context: RunContext) -> tuple[dict[str, nn.Module], list[dict[str, Any]]]:
    """Cut and retrain every budget of the run: the models by name, and their lines of the table, without times."""
    budgets = {budget.name: budget for budget in context.config.budgets}
    plans = {name: _plan(context, budget) for name, budget in budgets.items()}
    names = list(budgets)
    if context.config.retraining == TOGETHER:
        open_rows = [name for name in names if not (context.root / name / "row.json").exists()]
        shared = _shared_training(context, plans) if open_rows else None
    else:
        shared = None
    if context.config.retraining == PROGRESSIVE:
        names = [names[place] for place in order_by_macs(context.result.model, list(plans.values()))]
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
    """Cut to one budget, retrain, evaluate; everything is in files afterwards.

    Args:
        context: what every budget has in common.
        budget: the limits.
        chosen: its plan.
        before: plans and retrained models to cut on from.
        shared: weights that are trained already, and this budget's part of the seconds that took; None retrains here.
    """
    directory = context.root / budget.name
    row_file = directory / "row.json"
    if row_file.exists():
        context.log(f"{budget.name}: done before")
        return checkpoint.load(directory / "slim").to(processes().device), read_json(row_file)
    began, config, result = time.monotonic(), context.config, context.result
    images = context.images()
    small = cut_from_last(result.model, chosen, before, images=images).eval()
    seconds = {"cut": time.monotonic() - began}
    top1_cut = context.evaluate(small)["top1"]
    _save(small, directory / "cut", provenance(config, result, chosen, {"top1": top1_cut}))
    context.log(f"{budget.name}: cut, top-1 {top1_cut:.4f} before retraining")
    if shared is None:
        small, metrics, seconds["retrain"] = _retrain(context, small, budget.name)
    else:
        small = cut(shared[0].model, chosen).eval()
        recalibrate_batch_norms_(small, images or context.images(at_least=256))
        metrics, seconds["retrain"] = context.evaluate(small), shared[1]
    _save(small, directory / "slim", provenance(config, result, chosen, metrics))
    row = row_entry(budget, small, context.dense.anatomy, chosen, top1_cut, metrics["top1"], seconds)
    if shared is not None:
        row["log"] = f"{TOGETHER}/log.jsonl"
    if processes().is_main_process:
        atomic_json(row_file, row)
    return small, row


def _retrain(context: RunContext, small: nn.Module, name: str) -> tuple[nn.Module, dict[str, float], float]:
    """Train a cut model on its own: the model to use, its evaluation, and the seconds that it took."""
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
    """Train the weights that all budgets share, or read them: the result, and each budget's part of the seconds."""
    directory, world = context.root / TOGETHER, processes()
    if (directory / SERVED).exists():
        served = read_json(directory / SERVED)
        context.log(f"{TOGETHER}: trained before, for {', '.join(served['budgets'])}")
        result = load_search(directory)
        result.model.to(world.device)
        return result, served["seconds"] / len(served["budgets"])
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
        atomic_json(directory / SERVED, {"budgets": list(plans), "seconds": seconds})
    return result, seconds / len(plans)


def _save(model: nn.Module, directory: Path, record: dict[str, Any]) -> None:
    """Save a checkpoint from the first process, unless an earlier call has done it."""
    if processes().is_main_process and not directory.exists():
        checkpoint.save(model, directory, record)


def _plan(context: RunContext, budget: Budget) -> Plan:
    """Make the plan, or read it; plans that share weights or follow from one another come from one order."""
    target = context.root / budget.name / "plan.json"
    solver = None if context.config.retraining == EACH else "nested"
    if processes().is_main_process and not target.exists():
        plan(context.result, budget, latency=context.config.latency_table, solver=solver).save(target)
    processes().wait_for_everyone()
    return Plan.load(target)
