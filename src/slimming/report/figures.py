"""The figures of a run, for its page and for PNG and SVG files."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from slimming.core.metric import PERCENT, TOP1, Metric
from slimming.report import charts
from slimming.report.charts import NARROW, Figure, Record, Style, lines, look
from slimming.report.curves import Log
from slimming.report.model import Kept, Layer, Masks, Picture, Results, Row, Width
from slimming.report.theme import KINDS, budget_colour, colour, kind_colour, kind_name

PARTS = {
    "qk": ("Query and key dimensions, per head", "qk"),
    "v": ("Value dimensions, per head", "v"),
    "whole_heads": ("Whole heads", "v"),
    "mlp": ("MLP hidden units", "mlp"),
    "channels": ("Channels", "qk"),
    "tokens": ("Token positions", "token"),
    "width": ("Embedding width", "accent"),
}
"""Part of a layer -> its title and its colour."""
IMAGES = 4
"""Largest number of images that are shown."""
THUMBNAIL = 160
"""Larger images are reduced to this size in pixels."""
POINT = {"row": "budget", "series": "measured", "x": "cost"}
AROUND = {"low": "lower quartile", "high": "upper quartile"}


def accuracy(results: Results) -> list[Figure]:
    """Return the metric against MACs, parameters and latency."""
    rows, metric = (results.dense, *results.rows), results.metric
    good = [metric.factor * row.metric for row in rows if row.metric is not None]
    cut = [metric.factor * row.metric_cut for row in results.rows if row.metric_cut is not None]
    if not good and not cut:
        return []
    domain = around(good or cut, cut, metric)
    rule = None if results.dense.metric is None else metric.factor * results.dense.metric
    what_for = quality(metric)

    def panel(what: str, records: list[Record], styles: Mapping[str, Style], title: str) -> Figure:
        most = 1.06 * max(record.get("high", record["x"]) for record in records)
        columns = {**POINT, "told": metric.name, "x": title, **(AROUND if "low" in records[0] else {})}
        chart = lines(apart(records, most), styles, columns, x=title, y=metric.title, x_domain=[0, most],
                      y_domain=domain, rule=rule)  # fmt: skip
        below = "A triangle lies below the axis." if any(one["y"] < domain[0] for one in records) else ""
        below += "" if metric.higher_is_better else f"{' ' if below else ''}Lower is better."
        told = f"{what_for} against {what}. {told_points(records)}."
        return Figure(title=f"{'Accuracy' if metric == TOP1 else metric.name} against {what}", told=told, chart=chart,
                      data={"points": records}, columns=columns, caption=below)  # fmt: skip

    found = [panel("MACs", *stages(rows, lambda row: row.macs, metric=metric), "MACs for one image"),
             panel("parameters", *stages(rows, lambda row: row.params, metric=metric), "parameters")]  # fmt: skip
    timed, styles = [], {}
    for size in dict.fromkeys((*results.batch_sizes[:1], *results.batch_sizes[-1:])):
        name = f"batch {size}"
        styles[name] = Style(colour=colour("v"), dash=[7, 3], hollow=True) if styles else Style()
        for row in rows:
            if (spread := row.latency_ms.get(size)) is not None and row.metric is not None:
                label = row.short if len(styles) == 1 else None
                low, middle, high = (value / size for value in (spread.p25, spread.median, spread.p75))
                timed.append({**point(row.label, middle, row.metric, name, label, metric), "low": low, "high": high})
    return [*found, *([panel("latency", timed, styles, "ms per image")] if timed else [])]


def stages(
    rows: Sequence[Row], cost: Callable[[Row], float | None], shade: str | None = None, *, metric: Metric = TOP1
) -> tuple[list[Record], dict[str, Style]]:
    """Return the accuracies of every stage as a function of a cost, with the style of each stage.

    Args:
        rows: the models, the dense model first.
        cost: returns the cost of a model; None if it is not known.
        shade: colour of all stages.
        metric: the metric of the models.
    """
    accent, soft, v, ink = (shade or colour(name) for name in ("accent", "soft", "v", "ink"))
    every: dict[str, tuple[Sequence[Row], str, Style]] = {
        "after the cut": (rows[1:], "metric_cut", Style(colour=soft, dash=None, hollow=True)),
        "in one shot": (rows[1:], "metric_one_shot", Style(colour=v, dash=None, mark="square", hollow=True)),
        "retrained": (rows[1:], "metric", Style(colour=accent)),
        "dense": (rows[:1], "metric", Style(colour=ink, dash=None, mark="diamond")),
    }
    records = [
        point(row.label, x, value, stage, row.short if field == "metric" else None, metric)
        for stage, (own, field, _) in every.items()
        for row in sorted(own, key=lambda row: row.macs)
        if (x := cost(row)) is not None and (value := getattr(row, field)) is not None
    ]
    names = {record["series"] for record in records}
    return records, {stage: style for stage, (_, _, style) in every.items() if stage in names}


def around(good: Sequence[float], others: Sequence[float], metric: Metric = TOP1) -> list[float]:
    """Return the ends of an axis that fits the values ``good``; much worse ones in ``others`` may lie outside."""
    percent_ = metric.unit == PERCENT
    least = 1.0 if percent_ else 0.01 * max(abs(value) for value in good) or 1.0
    span = max(max(good) - min(good), least)
    fits = (
        (lambda value: value >= min(good) - 1.5 * span)
        if metric.higher_is_better
        else (lambda value: value <= max(good) + 1.5 * span)
    )
    near = [*good, *filter(fits, others)]
    air = 0.14 * max(max(near) - min(near), least)
    low, high = min(near) - 1.5 * air, max(near) + air
    return [max(0.0, low) if min(near) >= 0 else low, min(100.0, high) if percent_ else high]


def point(row: str, x: float, value: float, series: str, label: str | None = None, metric: Metric = TOP1) -> Record:
    """Return the record of a value of the metric at a cost."""
    found = {"row": row, "series": series, "x": float(x), "y": metric.factor * value, "told": metric.show(value)}
    return {**found, **({} if label is None else {"label": label})}


def told_points(records: Sequence[Record]) -> str:
    """Return a description of accuracies as text."""
    return "; ".join(f"{one['row']}: {one['told']} {one['series']}" for one in records)


def apart(records: Sequence[Record], most: float) -> list[Record]:
    """Return records without the labels that would overlap an earlier one."""
    taken: list[float] = []
    found = []
    for record in records:
        near = any(abs(record["x"] - other) < 0.12 * most for other in taken)
        taken += [record["x"]] if "label" in record and not near else []
        found.append({key: value for key, value in record.items() if key != "label" or not near})
    return found


def compared(runs: Sequence[Results]) -> list[Figure]:
    """Return the metric of several runs against MACs and parameters, one line per run; apart for each metric."""
    return [figure for metric in dict.fromkeys(run.metric for run in runs) for figure in _compared(runs, metric)]


def _compared(runs: Sequence[Results], metric: Metric) -> list[Figure]:
    names, found = distinct([run.name for run in runs]), []
    styles = {name: look(index, budget_colour(index)) for index, name in enumerate(names)}
    for title, cost in (("MACs for one image", lambda row: row.macs), ("parameters", lambda row: row.params)):
        records = [
            point(row.label, cost(row), row.metric, name, None, metric)
            for name, run in zip(names, runs, strict=True)
            for row in sorted((run.dense, *run.rows), key=cost)
            if row.metric is not None and run.metric == metric
        ]
        if records:
            columns = {**POINT, "told": metric.name, "series": "run", "x": title}
            chart = lines(records, styles, columns, x=title, y=metric.title)
            what = f"against {title.partition(' ')[0]}"
            found.append(Figure(title=f"{'Accuracy' if metric == TOP1 else metric.name} {what}", chart=chart,
                                told=f"{quality(metric)} {what}. {told_points(records)}.",
                                data={"points": records}, columns=columns))  # fmt: skip
    return found


def quality(metric: Metric) -> str:
    """Return the metric in words, at the start of a sentence."""
    return "Top-1 accuracy" if metric == TOP1 else metric.name


def distinct(names: Sequence[str]) -> list[str]:
    """Return the names, with numbers added to repeated names."""
    many = Counter(names)
    return [f"{name} ({place})" if many[name] > 1 else name for place, name in enumerate(names, 1)]


def depth(results: Results) -> list[Figure]:
    """Return, per kind of unit, the share that each layer keeps under every budget."""
    deepest = max(len(row.layers or ()) for row in results.rows)
    styles = {row.label: look(index, budget_colour(index)) for index, row in enumerate(results.rows)}
    columns, found = {"series": "budget", "layer": "layer", "told": "kept"}, []
    for part, (title, _) in PARTS.items():
        records = [
            {"series": row.label, "x": place, "y": 100 * kept.share, "layer": layer.label, "told": str(kept)}
            for row in results.rows
            for place, layer in enumerate(row.layers or ())
            if (kept := layer.whole(part)) is not None
        ]
        if records:
            name = title.partition(",")[0]
            chart = lines(records, styles, columns, x="layer", y="kept, %", x_domain=[-0.3, deepest - 0.7],
                          y_domain=[0, 104], rule=100.0, size=NARROW)  # fmt: skip
            found.append(Figure(title=name, told=f"{name}: share kept in each layer, one line per budget.", chart=chart,
                                data={"points": records}, columns=columns))  # fmt: skip
    return found


def structure(layers: Sequence[Layer], widths: Sequence[Width], label: str) -> dict[str, Figure]:
    """Return the figures of kept units, one per part of the layers.

    Args:
        layers: the layers, starting at the input.
        widths: embedding widths, if they can be pruned.
        label: label of the budget.
    """
    found = {}
    for part, (title, shade) in PARTS.items():
        if not (records := units(layers, widths, part)):
            continue
        labels = list(dict.fromkeys(record["layer"] for record in records))
        heads = 1 + max(record.get("head", 0) for record in records)
        if heads > 1:
            columns, name = {"layer": "layer", "head": "head", "told": "kept"}, title
            chart = charts.heads(labels, heads, shade, columns)
        else:
            columns, name = {"layer": "layer", "told": "kept"}, title.partition(",")[0]
            chart = charts.bars(labels, shade, columns)
        found[part] = Figure(title=name, told=f"{name} kept in each layer under {label}.", chart=chart,
                             data={"units": records}, columns=columns)  # fmt: skip
    return found


def units(layers: Sequence[Layer], widths: Sequence[Width], part: str) -> list[Record]:
    """Return the kept units of one part by layer and head, as records of a chart."""
    if part == "width":
        # The stage of a width is its name up to the first number.
        return [_unit(re.split(r"(?<=\d)\.", one.name)[0] if len(widths) > 1 else "all", one) for one in widths]
    if part not in ("qk", "v"):
        return [_unit(layer.label, kept) for layer in layers if (kept := layer.whole(part)) is not None]
    most = max((len(layer.per_head(part)) for layer in layers), default=0)
    return [
        {**_unit(layer.label, kept), "head": head, **({} if kept.kept else {"told": "gone whole"})}
        for layer in layers
        if (own := layer.per_head(part))
        for head, kept in enumerate((*own, *[Kept(kept=0, of=1)] * (most - len(own))))
    ]


def _unit(layer: str, kept: Kept) -> Record:
    return {"layer": layer, "kept": kept.kept, "of": kept.of, "share": round(kept.share, 4), "told": str(kept)}


def tokens(layers: Sequence[Layer], label: str, images: Sequence[Picture], *, others: bool = True) -> Figure | None:
    """Return the figure of the token positions of each block over an image; None if no layer has them.

    Args:
        layers: the layers, starting at the input.
        label: label of the budget.
        images: images of the data; the first is drawn for every block.
        others: show the other images too, with the positions of the last block.
    """
    shown = [(f"block {layer.label}", layer.tokens, 0) for layer in layers]
    grid = next((kept.grid for _, kept, _ in shown if kept), None)
    if grid is None:
        return None
    more = list(enumerate(images[:IMAGES]))[1:] if others else []
    shown += [(image.label, layers[-1].tokens, place) for place, image in more]
    tiles, cells = [], []
    for place, (block, kept, picture) in enumerate(shown):
        row, column = divmod(place, charts.ACROSS)
        words = str(kept.count) if kept else "all positions"
        tiles.append({"block": block, "told": words, "picture": picture, "row": row, "column": column})
        rows, columns = kept.grid if kept else (0, 0)
        for cell in range(rows * columns):
            if kept and (cell in kept.kept) != bool(images):
                x, y = column + cell % columns / columns, row + cell // columns / rows
                ends = {"x": x, "x2": x + 1 / columns, "y": y, "y2": y + 1 / rows}
                cells.append({key: round(value, 4) for key, value in ends.items()})
    width, height = images[0].size if images else grid[::-1]
    chart = charts.token_maps(len(tiles), [address(image) for image in images[:IMAGES]], height / max(1, width))
    words = "; ".join(f"{tile['block']}: {tile['told']}" for tile in tiles)
    return Figure(title="Token positions, block by block", chart=chart, data={"tiles": tiles, "cells": cells},
                  told=f"Token positions that each block sees under {label}: {words}.",
                  columns={"block": "block or image", "told": "kept"})  # fmt: skip


def address(image: Picture) -> str:
    """Return an image as a data URL; large images are reduced and encoded as JPEG."""
    if max(image.size) <= THUMBNAIL:
        return f"data:image/png;base64,{image.png}"
    try:
        with Image.open(io.BytesIO(base64.b64decode(image.png))) as opened:
            buffer, small = io.BytesIO(), opened.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            small.save(buffer, format="JPEG", quality=82)
    except OSError:  # a truncated PNG is embedded unchanged
        return f"data:image/png;base64,{image.png}"
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def masks(results: Results) -> list[Figure]:
    """Return the histogram of the masks of each kind: over the whole network, and below it by group."""
    found = results.search.masks if results.search else None
    return [_histogram(kind, one) for kind, one in (found or {}).items()]


def _histogram(kind: str, masks: Masks) -> Figure:
    ends = list(zip(masks.edges, masks.edges[1:], strict=False))
    bins = [{"left": left, "right": right, "units": units}
            for (left, right), units in zip(ends, masks.counts, strict=True)]  # fmt: skip
    low, wide = masks.edges[0], masks.edges[-1] - masks.edges[0]
    many = len({re.sub(r"\d+", "*", name) for name in masks.by_layer}) > 1
    bands, groups = [], {}
    for name, values in masks.by_layer.items():
        role = f"{name.rpartition('.')[2].upper()} " if many else ""
        label = groups[name] = role + (".".join(re.findall(r"\d+", name)) or name)
        counts = Counter(min(len(bins) - 1, max(0, int((value - low) / wide * len(bins)))) for value in values)
        bands += [{"group": label, "left": ends[at][0], "right": ends[at][1], "share": count / max(counts.values())}
                  for at, count in sorted(counts.items())]  # fmt: skip
    name = kind_name(kind)
    chart = charts.histogram(masks.edges[:: len(bins)], list(dict.fromkeys(groups.values())), kind_colour(kind))
    told = f"Histogram of the soft masks of {sum(masks.counts)} {name}, from {low:.3g} to {masks.edges[-1]:.3g}."
    return Figure(title=name[0].upper() + name[1:], told=told, chart=chart, data={"bins": bins, "bands": bands},
                  columns={"left": "from", "right": "to", "units": "units"})  # fmt: skip


def searching(log: Log | None, metric: Metric = TOP1) -> list[Figure]:
    """Return the curves of loss, penalty and accuracy of the search; empty if there is no log."""
    if log is None or not log.lines:
        return []
    names = {"loss": "total", "task": "without the penalty"}  # the loss of a search is the task loss plus the penalties
    shades = [colour("accent"), colour("mlp")]
    loss = {names[key]: (log, key, look(i, shades[i], marks=False)) for i, key in enumerate(names)}
    penalties = [key for key in log.entries() if key in KINDS or key.startswith("penalty")]
    kinds = {key: key.removeprefix("penalty").strip("_/.") or "penalty" for key in penalties}
    terms = {kind_name(kind): (log, key, look(i, kind_colour(kind), marks=False))
             for i, (key, kind) in enumerate(kinds.items())}  # fmt: skip
    return [
        *_curves("Loss", "loss", loss),
        *_curves("Penalty on the masks", "penalty", terms, low=0.0),
        *_curves(validation(metric), metric.title, {"masked model": (log, f"val_{metric.key}", Style())}),
    ]


def retraining(results: Results, logs: Mapping[str, Log]) -> list[Figure]:
    """Return the curves of loss and accuracy of the retraining, one line per budget or training; empty without logs."""
    # Budgets that were trained together share one log, with evaluations at the smallest budget.
    counts = Counter(row.log for row in results.rows)
    loss, values, seen = {}, {}, set()
    metric = results.metric
    for index, row in enumerate(results.rows):
        many = counts[row.log] > 1
        if row.name not in logs or (many and row.log in seen):
            continue
        seen.add(row.log)
        log, shade = logs[row.name], budget_colour(index)
        loss["all budgets together" if many else row.label] = (log, "loss", look(index, shade, marks=False))
        values["smallest of all budgets" if many else row.label] = (log, f"val_{metric.key}", look(index, shade))
    rule = None if results.dense.metric is None else metric.factor * results.dense.metric
    return [*_curves("Loss", "loss", loss), *_curves(validation(metric), metric.title, values, rule=rule)]


def validation(metric: Metric) -> str:
    """Return the title of the curve of the metric."""
    return "Validation accuracy" if metric == TOP1 else f"{metric.name} on validation images"


def _curves(
    title: str,
    unit: str,
    curves: Mapping[str, tuple[Log, str, Style]],
    *,
    low: float | None = None,
    rule: float | None = None,
) -> list[Figure]:
    axis = "epoch" if all(log.axis == "epoch" for log, _, _ in curves.values()) else "step"
    points = {name: log.curve(key, 100.0 if "%" in unit else 1.0) for name, (log, key, _) in curves.items()}
    points = {name: found for name, found in points.items() if found}
    if not points:
        return []
    records = [{"series": name, "x": x, "y": y} for name, found in points.items() for x, y in found]
    values = [*(record["y"] for record in records), *([] if rule is None else [rule])]
    air = 0.06 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 0.5
    domain = [min(values) - air if low is None else low, max(values) + air]
    columns, styles = {"series": "curve", "x": axis, "y": unit}, {name: curves[name][2] for name in points}
    chart = lines(records, styles, columns, x=axis, y=unit, y_domain=domain, rule=rule)
    ends = "; ".join(f"{name}: from {found[0][1]:.3g} to {found[-1][1]:.3g}" for name, found in points.items())
    return [Figure(title=title, told=f"{title} over {axis}s. {ends}.", chart=chart, data={"points": records},
                   columns=columns, caption="" if rule is None else "The dotted line is the dense model.")]  # fmt: skip


def alone(results: Results) -> list[Figure]:
    """Return the sensitivity of each kind; empty if it was not measured."""
    measured = (results.search.sensitivity if results.search else None) or {}
    found = {kind_name(kind): (curve, kind_colour(kind)) for kind, curve in measured.items() if curve}
    if not found:
        return []
    every = [(kind, trial) for kind, (curve, _) in found.items() for trial in curve]
    records = [{"series": kind, "x": 0.0, "y": 0.0} for kind in found]
    records += [{"series": kind, "x": 100 * (1 - trial.kept), "y": trial.loss} for kind, trial in every]
    # The loss at the smallest shares is so large that the other values would not be distinguishable.
    firsts = [curve[0] for curve, _ in found.values()]
    top = max(0.0, 1.2 * max(trial.loss for _, trial in every if trial.kept >= 0.3 or trial in firsts))
    styles = {kind: look(i, shade) for i, (kind, (_, shade)) in enumerate(found.items())}
    columns = {"series": "kind", "x": "units cut, %", "y": "loss added"}
    chart = lines([record for record in records if record["y"] <= top], styles, columns, x="units cut, %",
                  y="loss added", x_domain=[0, 100], y_domain=[0, max(top, 1e-6)])  # fmt: skip
    ends = "; ".join(f"{kind} up to {100 * (1 - curve[-1].kept):.0f} %: {curve[-1].loss:.3g}"
                     for kind, (curve, _) in found.items())  # fmt: skip
    return [Figure(title="Loss added by cutting one kind", told=f"Loss added by cutting one kind alone. {ends}.",
                   chart=chart, data={"points": records}, columns=columns)]  # fmt: skip
