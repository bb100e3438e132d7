"""The explorer: its charts, whose data the script of the page provides, and the plans, packed for that script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from slimming.report import charts, figures
from slimming.report.explored import Costs, Explored, Step
from slimming.report.model import Row, Tokens
from slimming.report.theme import colour

LIMITS = {"macs": "MACs", "params": "parameters", "latency": "predicted time"}
COSTS = {
    "macs": ("macs", "MACs", "MACs for one image"),
    "params": ("params", "parameters", "parameters"),
    "memory": ("memory_bytes", "memory", "bytes of memory"),
    "time": ("latency_ms", "predicted time", "predicted time, ms"),
}
"""Key of a cost in the script -> field of `Costs`, name of the cost, and title of its axis."""
RUN_COLOURS = ("accent", "v", "mlp", "token", "ink", "soft")


def content(runs: Sequence[Explored]) -> dict[str, Any]:
    """Return the variables of the explorer's template.

    Args:
        runs: the searches, at least one.
    """
    known = [key for key, (cost, _, _) in COSTS.items() if any(getattr(run.dense, cost) is not None for run in runs)]
    metrics = dict.fromkeys(metric for run in runs for metric in run.steps)
    limits = {metric: LIMITS[metric] for metric in metrics}
    return {"runs": runs, "costs": {key: COSTS[key][1] for key in known}, "limits": limits}


def specs(runs: Sequence[Explored]) -> dict[str, Any]:
    """Return the charts of the explorer: the frontier over each cost, and each run's structure and token positions."""
    structures, maps = [], []
    for run in runs:
        last = _last(run)
        found = figures.structure(last.layers, last.widths, "the budget")
        structures.append({part: {"title": one.title, "spec": one.spec(whole=False)} for part, one in found.items()})
        tokens = figures.tokens(last.layers, "the budget", run.pictures, others=False)
        maps.append(None if tokens is None else tokens.spec(whole=False))
    frontiers = {key: _frontier(runs, key) for key in content(runs)["costs"]}
    return {"frontier": frontiers, "structure": structures, "tokens": maps}


def _frontier(runs: Sequence[Explored], key: str) -> dict[str, Any]:
    """The chart over one cost: measured accuracies, and the plans, whose data the script of the page provides."""
    field, _, title = COSTS[key]
    records, styles = [], {}
    for index, (name, run) in enumerate(zip(figures.distinct([run.name for run in runs]), runs, strict=True)):
        shade, known = colour(RUN_COLOURS[index % len(RUN_COLOURS)]), run.measured
        cost = (lambda row, run=run: run.times.get(row.name)) if key == "time" else (lambda row: getattr(row, field))
        own, looks = figures.stages(known, cost, shade, metric=run.metric)
        names = {stage: stage if len(runs) == 1 else f"{name}: {stage}" for stage in looks}
        records += [{**one, "series": names[one["series"]]} for one in own]
        styles |= {names[stage]: style for stage, style in looks.items()}
    most = 1.04 * max(getattr(run.dense, field) or 0 for run in runs)
    above = None
    if records:
        records = [{name: value for name, value in one.items() if name != "label"} for one in records]
        good = [one["y"] for one in records if not styles[one["series"]].hollow]
        every = [one["y"] for one in records]
        metric = runs[0].metric
        columns = {**figures.POINT, "told": metric.name, "x": title}
        above = charts.lines(records, styles, columns, x=title, y=metric.title, x_domain=[0, most],
                             y_domain=figures.around(good or every, every, metric), size=charts.FRONTIER)  # fmt: skip
    least = min(100 * step.kept_score for run in runs for steps in run.steps.values() for step in steps)
    told = figures.told_points(records) or "Nothing was measured yet"
    chart = charts.frontier(above, title, most, min(10 * math.floor(least / 10), 90))
    figure = charts.Figure(title="Frontier", told=f"Accuracy against {title}. {told}.", chart=chart,
                           data={"points": records})  # fmt: skip
    return {"spec": figure.spec(), "most": most}


def packed(run: Explored) -> dict[str, Any]:
    """Return a run for the script: records of the units of the dense model, and for each plan the kept units."""
    last = _last(run)
    parts = {part: figures.units(last.layers, last.widths, part) for part in figures.PARTS}
    return {
        "name": run.name,
        "metric": run.metric.name,
        "dense": _costs(run.dense),
        "latency": run.latency,
        "labels": [layer.label for layer in last.layers],
        "grids": [layer.tokens.grid if layer.tokens else None for layer in last.layers],
        "whole": {part: records for part, records in parts.items() if records},
        "steps": {metric: [_step(step) for step in steps] for metric, steps in run.steps.items()},
        "measured": [{"label": row.label, "macs": row.macs, "limits": _shares(row),
                      "quality": None if row.metric is None else run.metric.show(row.metric)}
                     for row in run.measured],
        "recipe": asdict(run.recipe),
        "pictures": [{"label": one.label, "address": figures.address(one)} for one in run.pictures[: figures.IMAGES]],
    }  # fmt: skip


def _shares(row: Row) -> dict[str, float]:
    """The limit of a budget by metric, if it is its only limit and a share."""
    return {metric: limit for metric, limit in row.limits.items() if len(row.limits) == 1 and limit <= 1}


def _last(run: Explored) -> Step:
    """The plan that keeps all units."""
    return next(iter(run.steps.values()))[-1]


def _costs(costs: Costs) -> dict[str, float | None]:
    found = {key: getattr(costs, field) for key, (field, _, _) in COSTS.items()}
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in found.items()}


def _step(step: Step) -> dict[str, Any]:
    """A plan: kept units by part, in the order of the records; positions as hexadecimal bit masks with a leading 1."""
    kept = {part: [unit["kept"] for unit in figures.units(step.layers, step.widths, part)] for part in figures.PARTS}
    return {
        "share": step.share,
        "name": step.name,
        **_costs(step.costs),
        "score": round(step.kept_score, 5),
        "kept": {part: found for part, found in kept.items() if found},
        "positions": [_number(layer.tokens) for layer in step.layers],
    }


def _number(tokens: Tokens | None) -> str:
    places = range(tokens.count.of) if tokens else ()
    return f"{int('1' + ''.join('1' if tokens and place in tokens.kept else '0' for place in places), 2):x}"
