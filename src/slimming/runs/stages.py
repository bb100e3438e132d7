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
from slimming.retraining.progressive import cut_on, largest_first
from slimming.retraining.retrain import train
from slimming.retraining.slimmable import settle_norms_, train_slimmable
from slimming.runs.config import EACH, PROGRESSIVE, TOGETHER, RunConfig
from slimming.runs.results import provenance, row_entry
from slimming.searching.mask_search import SearchResult, load_search
from slimming.training.batches import calibration_images
from slimming.training.distributed import distributed_state
from slimming.training.samples import Data

Say = Callable[[str], None]
Judge = Callable[[nn.Module], dict[str, float]]
SERVED = "served.json"
"""In the directory of a training for all budgets: the names of those that it was for, and how long it took."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every budget has in common.

    Attributes:
        config: the run.
        dense: the teacher, and what sizes are compared with.
        data: the images.
        result: the search.
        root: directory of the run.
        judge: evaluates a model on the validation images.
        say: told each stage.
    """

    config: RunConfig
    dense: PrunableModel
    data: Data
    result: SearchResult
    root: Path
    judge: Judge
    say: Say

    def images(self, at_least: int = 0) -> list[Tensor]:
        """Training images without labels, for the cut."""
        train, count = self.config.search.train, max(self.config.compensate, at_least)
        return calibration_images(self.data, count, batch_size=train.batch_size, seed=train.seed) if count else []

    @property
    def teacher(self) -> nn.Module | None:
        """What retraining learns from."""
        return self.dense.model if self.config.distil is not None else None


def slim_all(work: Work) -> tuple[dict[str, nn.Module], list[dict[str, Any]]]:
    """Cut and retrain every budget of the run: the models by name, and their lines of the table, without times."""
    budgets = {budget.name: budget for budget in work.config.budgets}
    plans = {name: _plan(work, budget) for name, budget in budgets.items()}
    names = list(budgets)
    if work.config.retraining == TOGETHER:
        open_rows = [name for name in names if not (work.root / name / "row.json").exists()]
        shared = _together(work, plans) if open_rows else None
    else:
        shared = None
    if work.config.retraining == PROGRESSIVE:
        names = [names[place] for place in largest_first(work.result.model, list(plans.values()))]
    done: list[tuple[Plan, nn.Module]] = []
    models: dict[str, nn.Module] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        before = done if work.config.retraining == PROGRESSIVE else []
        models[name], rows[name] = _one_budget(work, budgets[name], plans[name], before, shared)
        done.append((plans[name], models[name]))
    return {name: models[name] for name in budgets}, [rows[name] for name in budgets]


def _one_budget(
    work: Work,
    budget: Budget,
    chosen: Plan,
    before: list[tuple[Plan, nn.Module]],
    shared: tuple[SearchResult, float] | None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Cut to one budget, retrain, evaluate; everything is in files afterwards.

    Args:
        work: what every budget has in common.
        budget: the limits.
        chosen: its plan.
        before: plans and retrained models to cut on from.
        shared: weights that are trained already, and this budget's part of the seconds that took; None retrains here.
    """
    directory = work.root / budget.name
    row_file = directory / "row.json"
    if row_file.exists():
        work.say(f"{budget.name}: done before")
        return checkpoint.load(directory / "slim").to(distributed_state().device), read_json(row_file)
    began, config, result = time.monotonic(), work.config, work.result
    images = work.images()
    small = cut_on(result.model, chosen, before, images=images).eval()
    seconds = {"cut": time.monotonic() - began}
    top1_cut = work.judge(small)["top1"]
    _save(small, directory / "cut", provenance(config, result, chosen, {"top1": top1_cut}))
    work.say(f"{budget.name}: cut, top-1 {top1_cut:.4f} before retraining")
    if shared is None:
        small, metrics, seconds["retrain"] = _retrain(work, small, budget.name)
    else:
        small = cut(shared[0].model, chosen).eval()
        settle_norms_(small, images or work.images(at_least=256))
        metrics, seconds["retrain"] = work.judge(small), shared[1]
    _save(small, directory / "slim", provenance(config, result, chosen, metrics))
    row = row_entry(budget, small, work.dense.anatomy, chosen, top1_cut, metrics["top1"], seconds)
    if shared is not None:
        row["log"] = f"{TOGETHER}/log.jsonl"
    if distributed_state().is_main_process:
        atomic_json(row_file, row)
    return small, row


def _retrain(work: Work, small: nn.Module, name: str) -> tuple[nn.Module, dict[str, float], float]:
    """Train a cut model on its own: the model to use, its evaluation, and the seconds that it took."""
    began = time.monotonic()
    history = train(
        small,
        work.data,
        work.config.retrain,
        teacher=work.teacher,
        distil=work.config.distil,
        directory=work.root / name,
        resume=True,
        evaluate=work.judge,
        title=name,
    )
    small = history.averaged if history.averaged is not None else small
    return small, dict(history.metrics), time.monotonic() - began


def _together(work: Work, plans: Mapping[str, Plan]) -> tuple[SearchResult, float]:
    """Train the weights that all budgets share, or read them: the result, and each budget's part of the seconds."""
    directory, world = work.root / TOGETHER, distributed_state()
    if (directory / SERVED).exists():
        served = read_json(directory / SERVED)
        work.say(f"{TOGETHER}: trained before, for {', '.join(served['budgets'])}")
        result = load_search(directory)
        result.model.to(world.device)
        return result, served["seconds"] / len(served["budgets"])
    work.say(f"{TOGETHER}: one training for {', '.join(plans)}")
    began = time.monotonic()
    result = train_slimmable(
        work.result,
        work.data,
        list(plans.values()),
        work.config.retrain,
        work.teacher,
        distil=work.config.distil,
        directory=directory,
        resume=True,
        evaluate=work.judge,
    )
    seconds = time.monotonic() - began
    if world.is_main_process:
        result.save(directory)
        atomic_json(directory / SERVED, {"budgets": list(plans), "seconds": seconds})
    return result, seconds / len(plans)


def _save(model: nn.Module, directory: Path, record: dict[str, Any]) -> None:
    """Save a checkpoint from the first process, unless an earlier call has done it."""
    if distributed_state().is_main_process and not directory.exists():
        checkpoint.save(model, directory, record)


def _plan(work: Work, budget: Budget) -> Plan:
    """Make the plan, or read it; plans that share weights or follow from one another come from one order."""
    target = work.root / budget.name / "plan.json"
    solver = None if work.config.retraining == EACH else "nested"
    if distributed_state().is_main_process and not target.exists():
        plan(work.result, budget, latency=work.config.latency_table, solver=solver).save(target)
    distributed_state().wait_for_everyone()
    return Plan.load(target)
