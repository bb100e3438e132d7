"""Plans from scores and budgets: `plan` and `plans`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from slimming.core.budget import METRICS, Budget
from slimming.core.completion import complete
from slimming.core.groups import Anatomy, keep_all
from slimming.core.layout import SOLVERS, Layout
from slimming.core.pruning_plan import Plan
from slimming.counting.model_cost import total
from slimming.errors import BudgetError, ConfigError, PlanError, nearest
from slimming.masks.soft_masks import SoftMasks
from slimming.models import family_called
from slimming.planning.latency_table import LatencyTable
from slimming.planning.planner import Planner
from slimming.planning.scores import Scored, Scores, load_scores


def plan(
    source: Scored | SoftMasks | str | Path,
    budget: Budget,
    *,
    layout: Layout | None = None,
    score: str | None = None,
    fold: bool | None = None,
    solver: str | None = None,
    latency: LatencyTable | str | Path | None = None,
) -> Plan:
    """Decide which units stay under ``budget``.

    Args:
        source: a search result, attached masks, or a scores file.
        budget: what the slim model may cost.
        layout: which sizes the layers may get; by default that of the search, else equal heads and multiples of 8.
        score: which score of attached masks to use, see `SoftMasks.scores`; other sources have theirs.
        fold: False makes the masks of what stays 1 at the cut, as in the paper; by default as the search says.
        solver: ``"nested"`` takes units away in one order, so that larger budgets keep all that smaller ones keep;
            it is the default for one limit, where it ends within 1 % of it. ``"exact"`` keeps the highest total score
            that fits, by linear programming (see `slimming.planning.knapsack`). It is the default for several limits,
            which a single order meets badly, and where the last step of the order was a large one. Its plans are not
            nested. Keep ratios need no solver.
        latency: the table, or its file, that says how long a model takes; needed for limits of latency.

    Raises:
        ConfigError: there is no such solver, or no latency table for a limit of latency.
        BudgetError: the budget cannot be reached; the message says the smallest that can.
        PlanError: the scores are of another model or not finite, or ``source`` is a model without scores.
        CheckpointError: the scores file is damaged.

    >>> import timm, slimming
    >>> masks = slimming.attach(timm.create_model("test_vit"))
    >>> plan = slimming.plan(masks, slimming.Budget(keep={"mlp": 0.5}))
    >>> sum(len(units) for name, units in plan.kept.items() if name.endswith("hidden"))
    576
    """
    return plans(source, [budget], layout=layout, score=score, fold=fold, solver=solver, latency=latency)[0]


def plans(
    source: Scored | SoftMasks | str | Path,
    budgets: Sequence[Budget],
    *,
    layout: Layout | None = None,
    score: str | None = None,
    fold: bool | None = None,
    solver: str | None = None,
    latency: LatencyTable | str | Path | None = None,
) -> list[Plan]:
    """One plan per budget, as `plan` makes them; faster than one by one, and from the same scores.

    With the solver ``"nested"``, what a smaller budget of one limit keeps, a larger one keeps too.

    >>> import timm, slimming
    >>> masks = slimming.attach(timm.create_model("test_vit"))
    >>> budgets = [slimming.Budget(macs=0.4), slimming.Budget(macs=0.8)]
    >>> small, large = slimming.plans(masks, budgets, solver="nested")
    >>> all(set(units) <= set(large.kept[name]) for name, units in small.kept.items())
    True
    """
    if solver is not None and solver not in SOLVERS:
        raise ConfigError(f"There is no solver {solver!r}; solvers are {', '.join(SOLVERS)}.{nearest(solver, SOLVERS)}")
    metrics = {metric for budget in budgets for metric in budget.limits}
    planner, rating, table = _planner(source, metrics, layout=layout, score=score, latency=latency)
    fold = rating.fold if fold is None else fold
    found = []
    for budget in budgets:
        made = planner.plan(budget, fold=fold, solver=solver)
        if table is not None:
            counts = {name: len(units) for name, units in complete(rating.anatomy, made).items()}
            made = replace(made, solution={**made.solution, "latency_ms": table.predict(rating.anatomy, counts)})
        found.append(made)
    return found


def smallest(
    source: Scored | SoftMasks | str | Path,
    metric: str,
    *,
    layout: Layout | None = None,
    latency: LatencyTable | str | Path | None = None,
) -> float:
    """The smallest share of ``metric`` that a budget may ask for; arguments and errors are those of `plan`.

    >>> import timm, slimming
    >>> from slimming.masks.attachment import smallest
    >>> masks = slimming.attach(timm.create_model("test_vit"))
    >>> 0.1 < smallest(masks, "macs") < 0.3
    True
    """
    return _planner(source, {metric}, layout=layout, latency=latency)[0].smallest(metric)


def _planner(
    source: Scored | SoftMasks | str | Path,
    metrics: Collection[str],
    *,
    layout: Layout | None,
    latency: LatencyTable | str | Path | None,
    score: str | None = None,
) -> tuple[Planner, Scores, LatencyTable | None]:
    """What plans are made by: for limits of ``metrics``, from what, and the table where one of them is a time."""
    if isinstance(source, SoftMasks):
        rating = Scores(anatomy=source.anatomy, scores=source.scores(score))
    elif score is not None:
        raise ConfigError("A score is chosen where there are masks; a search result or a scores file has its own.")
    elif isinstance(source, Scored):
        rating = source.rating
    elif isinstance(source, nn.Module):
        raise PlanError("A model alone has no scores: give what slimming.search or slimming.score found, or its masks.")
    else:
        rating = load_scores(source)
    layout = layout or rating.layout
    if "memory_bytes" in metrics:
        _check_memory(rating.anatomy, layout)
    table = None if latency is None else _latency_table(latency)
    if table is not None and layout.multiple is None:
        layout = replace(layout, multiple=table.multiple)
    if any(METRICS[metric].timed for metric in metrics):
        _check_latency(table, layout)
    else:
        table = None
    measure = partial(costs_of, rating.anatomy, table=table)
    return Planner(rating.anatomy, rating.scores, layout, measure, rating.sensitivity), rating, table


def costs_of(anatomy: Anatomy, kept: Mapping[str, int], *, table: LatencyTable | None = None) -> dict[str, float]:
    """The cost of each metric when group ``name`` keeps ``kept[name]`` units; latency only with a table."""
    found = total(anatomy, kept)
    costs: dict[str, float] = {"params": found.params, "macs": found.macs, "memory_bytes": found.memory_bytes}
    if table is not None:
        costs["latency"] = costs["latency_ms"] = table.predict(anatomy, kept)
    return costs


def _latency_table(given: LatencyTable | str | Path) -> LatencyTable:
    return given if isinstance(given, LatencyTable) else LatencyTable.load(given)


def _check_latency(table: LatencyTable | None, layout: Layout) -> None:
    if table is None:
        raise ConfigError(
            "A budget of latency needs a table of the device: slimming latency-table build MODEL --output FILE, then "
            "plan(…, latency=FILE) or --latency-table FILE."
        )
    if table.uneven_heads == layout.equal_heads or not (layout.equal_heads or layout.equal_qkv):
        table_has = "different sizes" if table.uneven_heads else "one size"
        raise BudgetError(
            f"This latency table is of heads of {table_has}, QK and V alike, and the layout is not. Set "
            "layout.equal_heads and layout.equal_qkv, or build one for the other: slimming latency-table build, with "
            "or without --uneven-heads."
        )


def _check_memory(anatomy: Anatomy, layout: Layout) -> None:
    whole = keep_all(anatomy.groups)
    if not family_called(anatomy.structure.family).has_memory_formula(anatomy, whole):
        raise BudgetError(
            "This model was read by tracing, and its memory has no formula to plan with. Give params or macs; "
            "slimming.cost counts the memory of a plan."
        )
    if not layout.equal_heads:
        raise BudgetError(
            "Heads of several sizes have no formula for memory. Give layout.equal_heads, or params or macs."
        )
