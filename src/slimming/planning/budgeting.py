"""Plans from scores and budgets: `plan` and `plans`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from slimming.core.argument_types import checked_arguments
from slimming.core.budget import METRICS, Budget
from slimming.core.completion import complete
from slimming.core.groups import Anatomy, keep_all
from slimming.core.layout import SOLVERS, Layout
from slimming.core.pruning_plan import Plan
from slimming.counting.model_cost import total
from slimming.errors import BudgetError, ConfigError, nearest
from slimming.masks.soft_masks import SoftMasks
from slimming.models.families import family_called
from slimming.planning.latency_table import LatencyTable
from slimming.planning.planner import Planner
from slimming.planning.scores import HasScores, ScoredModel, load_scores


@checked_arguments
def plan(
    source: HasScores | SoftMasks | str | Path,
    budget: Budget,
    *,
    layout: Layout | None = None,
    score: str | None = None,
    fold: bool | None = None,
    solver: str | None = None,
    latency: LatencyTable | str | Path | None = None,
) -> Plan:
    """Choose the units to keep under ``budget``.

    If the plan ends more than 1 % below its limit, `Plan.note` says how far and why.

    Args:
        source: a search result, the result of `slimming.score`, attached masks, or a scores file.
        budget: limits on the cost of the slim model.
        layout: sizes that the layers may have; by default the layout of ``source``, else ``Layout()``.
        score: score of attached masks to use, see `SoftMasks.scores`; only for masks.
        fold: False sets the masks of kept units to 1 at the cut, as in the paper; by default as in ``source``.
        solver: ``"nested"`` removes units in one fixed order, so that larger budgets keep all units that smaller ones
            keep. ``"exact"`` maximises the total score within the limits by linear programming (see
            `slimming.planning.knapsack`), then puts back what still fits; its plans are not nested. For keep ratios it
            only puts back what fits. None takes ``"nested"`` if the plan then uses at least 99 % of its single limit or
            of every keep ratio, else ``"exact"``.
        latency: a latency table or its file; required for limits on latency.

    Raises:
        ConfigError: there is no such solver, or a limit on latency has no latency table.
        BudgetError: the budget cannot be reached; the message names the smallest that can.
        PlanError: the scores belong to another model or are not finite, or ``source`` is a model without scores.
        CheckpointError: the scores file is damaged.

    >>> import timm, slimming
    >>> masks = slimming.attach(timm.create_model("test_vit"))
    >>> plan = slimming.plan(masks, slimming.Budget(keep={"mlp": 0.5}))
    >>> sum(len(units) for name, units in plan.kept.items() if name.endswith("hidden"))
    576
    """
    return plans(source, [budget], layout=layout, score=score, fold=fold, solver=solver, latency=latency)[0]


@checked_arguments
def plans(
    source: HasScores | SoftMasks | str | Path,
    budgets: Sequence[Budget],
    *,
    layout: Layout | None = None,
    score: str | None = None,
    fold: bool | None = None,
    solver: str | None = None,
    latency: LatencyTable | str | Path | None = None,
) -> list[Plan]:
    """Return one plan per budget, like `plan`, but faster than calling it for each.

    With the solver ``"nested"``, a larger budget of the same limits keeps all units that a smaller one keeps, also
    if the plans are made in separate calls.

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
    planner, scored, table = _planner(source, metrics, layout=layout, score=score, latency=latency)
    fold = scored.fold if fold is None else fold
    result = []
    for budget in budgets:
        made = planner.plan(budget, fold=fold, solver=solver)
        if table is not None:
            counts = {name: len(units) for name, units in complete(scored.anatomy, made).items()}
            made = replace(made, solution={**made.solution, "latency_ms": table.predict(scored.anatomy, counts)})
        result.append(made)
    return result


def smallest(
    source: HasScores | SoftMasks | str | Path,
    metric: str,
    *,
    layout: Layout | None = None,
    latency: LatencyTable | str | Path | None = None,
) -> float:
    """Return the smallest share of ``metric`` that a budget may have; arguments and errors are those of `plan`.

    >>> import timm, slimming
    >>> from slimming.planning.budgeting import smallest
    >>> masks = slimming.attach(timm.create_model("test_vit"))
    >>> 0.1 < smallest(masks, "macs") < 0.3
    True
    """
    return _planner(source, {metric}, layout=layout, latency=latency)[0].smallest(metric)


def _planner(
    source: HasScores | SoftMasks | str | Path,
    metrics: Collection[str],
    *,
    layout: Layout | None,
    latency: LatencyTable | str | Path | None,
    score: str | None = None,
) -> tuple[Planner, ScoredModel, LatencyTable | None]:
    """Return the planner for limits on ``metrics``, the scores, and the latency table if a metric is timed."""
    if isinstance(source, SoftMasks):
        scored = ScoredModel(anatomy=source.anatomy, scores=source.scores(score))
    elif score is not None:
        raise ConfigError("score applies to attached masks; a search result or a scores file has its own scores.")
    elif isinstance(source, HasScores):
        scored = source.scored
    else:
        scored = load_scores(source)
    layout = layout or scored.layout
    if "memory_bytes" in metrics:
        _check_memory(scored.anatomy, layout)
    table = None if latency is None else _latency_table(latency)
    if table is not None and layout.multiple is None:
        layout = replace(layout, multiple=table.multiple)
    if any(METRICS[metric].timed for metric in metrics):
        _check_latency(table, layout)
    else:
        table = None
    measure = partial(costs_of, scored.anatomy, table=table)
    return Planner(scored.anatomy, scored.scores, layout, measure, scored.sensitivity), scored, table


def costs_of(anatomy: Anatomy, kept: Mapping[str, int], *, table: LatencyTable | None = None) -> dict[str, float]:
    """Return the cost by metric when group ``name`` keeps ``kept[name]`` units; latency only with a table."""
    cost = total(anatomy, kept)
    costs: dict[str, float] = {"params": cost.params, "macs": cost.macs, "memory_bytes": cost.memory_bytes}
    if table is not None:
        costs["latency"] = costs["latency_ms"] = table.predict(anatomy, kept)
    return costs


def _latency_table(given: LatencyTable | str | Path) -> LatencyTable:
    return given if isinstance(given, LatencyTable) else LatencyTable.load(given)


def _check_latency(table: LatencyTable | None, layout: Layout) -> None:
    if table is None:
        raise ConfigError(
            "A budget of latency needs a latency table of the device: slimming latency-table build MODEL --output "
            "FILE, then plan(…, latency=FILE) or --latency-table FILE."
        )
    if table.uneven_heads == layout.equal_heads or not (layout.equal_heads or layout.equal_qkv):
        table_has = "different sizes" if table.uneven_heads else "one size"
        raise BudgetError(
            f"This latency table was measured with heads of {table_has} and QK and V alike, which the layout does not "
            "match. Set layout.equal_heads and layout.equal_qkv, or build a table for this layout: slimming "
            "latency-table build, with or without --uneven-heads."
        )


def _check_memory(anatomy: Anatomy, layout: Layout) -> None:
    whole = keep_all(anatomy.groups)
    if not family_called(anatomy.structure.family).has_memory_formula(anatomy, whole):
        raise BudgetError(
            "This model was read by tracing, and there is no formula for its memory to plan with. Give params or macs; "
            "slimming.cost counts the memory of a plan."
        )
    if not layout.equal_heads:
        raise BudgetError(
            "There is no formula for the memory of heads of several sizes. Set layout.equal_heads, or give params or "
            "macs."
        )
