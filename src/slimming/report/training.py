"""Pictures of the search and of retraining: mask histograms, curves of loss, accuracy and penalty."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from slimming.core.kinds import KINDS
from slimming.report.curves import Log
from slimming.report.markup import Html, figure, join, svg, tag
from slimming.report.model import Masks, Results
from slimming.report.numbers import tick_text, ticks
from slimming.report.palette import budget_colour, dash, kind_colour, kind_name
from slimming.report.plot import Axis, Point, Series, chart, legend

WIDTH, LEFT, RIGHT, TALL = 360.0, 44.0, 8.0, 120.0


def histograms(results: Results) -> Html | None:
    """Return the distribution of each kind's masks: over the network, and below it group by group."""
    if not results.masks:
        return None
    return tag("div", [_histogram(masks) for masks in results.masks], class_="panels")


def _histogram(masks: Masks) -> Html:
    colour = f"fill:{kind_colour(masks.kind)}"
    low, high = masks.edges[0], masks.edges[-1]
    most = max(1, *masks.counts)

    def across(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts = [tag("text", "units", x=2, y=11, class_="title")]
    base = 18.0 + TALL
    for value in ticks(0, most, 3):
        y = base - value / most * TALL
        if value == int(value):
            parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
            parts.append(tag("text", f"{int(value)}", x=LEFT - 6, y=y + 3.5, class_="tick end"))
    for left, right, count in zip(masks.edges, masks.edges[1:], masks.counts, strict=False):
        tall = count / most * TALL
        tip = tag("title", f"{left:.3g} to {right:.3g}: {count} units")
        x, wide = across(left), max(0.8, across(right) - across(left) - 1)
        parts.append(tag("g", tip, tag("rect", x=x, y=base - tall, width=wide, height=tall, style=colour)))
    bands, end = _bands(masks, base + 8)
    parts += bands
    values = ticks(low, high, 5)
    for value, text in zip(values, tick_text(values), strict=True):
        parts.append(tag("line", x1=across(value), x2=across(value), y1=end, y2=end + 4, class_="axis"))
        parts.append(tag("text", text, x=across(value), y=end + 16, class_="tick mid"))
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=end, y2=end, class_="axis"))
    parts.append(tag("text", "mask", x=WIDTH - RIGHT, y=end + 30, class_="title end"))
    name = kind_name(masks.kind)
    label = f"Histogram of the soft masks of {sum(masks.counts)} {name}, from {low:.3g} to {high:.3g}."
    drawing = svg(WIDTH, end + 34, label, parts, class_="chart")
    return figure(drawing, title=f"{name[0].upper()}{name[1:]}" if name in _names() else name)


def _names() -> set[str]:
    return {kind_name(kind) for kind in KINDS}


def _bands(masks: Masks, top: float) -> tuple[list[Html], float]:
    """One line per group, its own histogram as shades; groups of one role (QK, V) stand together."""
    roles: dict[str, list[tuple[str, Sequence[float]]]] = {}
    for name, values in masks.by_group.items():
        label = ".".join(re.findall(r"\d+", name)) or name
        roles.setdefault(re.sub(r"\d+", "*", name), []).append((label, values))
    low, high, bins = masks.edges[0], masks.edges[-1], len(masks.counts)
    step = (WIDTH - LEFT - RIGHT) / bins
    parts, y = [], top
    for role, groups in roles.items():
        if len(roles) > 1:
            parts.append(tag("text", role.rpartition(".")[2].upper(), x=2, y=y + 8, class_="title"))
        every = max(2 if len(groups) > 2 else 1, round(len(groups) / 6))
        for place, (label, values) in enumerate(groups):
            counts = [0] * bins
            for value in values:
                counts[min(bins - 1, max(0, int((value - low) / (high - low) * bins)))] += 1
            most = max(1, *counts)
            for index, count in enumerate(counts):
                if count:
                    shade = f"fill:{kind_colour(masks.kind)};fill-opacity:{0.08 + 0.92 * count / most:.2f}"
                    parts.append(tag("rect", x=LEFT + index * step, y=y, width=step, height=8, style=shade))
            if place % every == 0:
                parts.append(tag("text", label, x=LEFT - 6, y=y + 7.5, class_="tick end"))
            y += 9
        y += 5
    return parts, y


def search_curves(log: Log | None) -> Html | None:
    """Return loss, penalty and accuracy over the search; None when nothing was logged."""
    if log is None or not log.lines:
        return None
    # The loss of a search is its task's plus the penalties.
    logged = log.keys()
    names = {"loss": "total", "task": "without the penalty"}
    losses = [(key, names[key]) for key in names if key in logged]
    penalties = [key for key in logged if key in KINDS or key.startswith("penalty")]
    looks = [("var(--accent)", ""), ("var(--mlp)", "7 3")]
    loss = [_curve(log, key, name, *look) for (key, name), look in zip(losses, looks, strict=False)]
    terms = [
        _curve(log, key, kind_name(kind), kind_colour(kind), dash(index))
        for index, key in enumerate(penalties)
        for kind in [key.removeprefix("penalty").strip("_/.") or "penalty"]
    ]
    panels = [
        _panel("Loss", "loss", loss, log.axis),
        _panel("Penalty on the masks", "penalty", terms, log.axis, low=0.0),
        _panel("Validation accuracy", "top-1, %", [_accuracy(log, "masked model", "var(--accent)", "")], log.axis),
    ]
    return tag("div", panels, class_="panels")


def sensitivity(results: Results) -> Html | None:
    """Return what cutting each kind alone does; None when it was not measured."""
    found = {kind: curve for kind, curve in results.sensitivity.items() if curve}
    if not found:
        return None
    series = [
        Series(
            name=kind_name(kind),
            points=[Point(x=0.0, y=0.0)]
            + [
                Point(x=100 * (1 - kept), y=loss, tip=f"{100 * (1 - kept):.0f} % cut: {loss:.3g}")
                for kept, loss in curve
            ],
            colour=kind_colour(kind),
            dash=dash(index),
            marker="dot",
        )
        for index, (kind, curve) in enumerate(found.items())
    ]
    # Where next to nothing is left the loss is so large that all else would lie flat.
    top = max(loss for curve in found.values() for kept, loss in curve if kept >= 0.3 or kept == curve[0][0])
    y = Axis(title="loss added", low=0.0, high=1.2 * max(top, 1e-6))
    ends = "; ".join(f"{one.name} up to {one.points[-1].x:.0f} %: {one.points[-1].y:.3g}" for one in series)
    drawing = chart(
        series,
        Axis(title="units cut, %", low=0.0, high=100.0),
        y,
        label=f"Loss added by cutting one kind alone. {ends}.",
    )
    return tag("div", figure(join(drawing, legend(series) if len(series) > 1 else None)), class_="panels")


def retrain_curves(results: Results, logs: Mapping[str, Log]) -> Html | None:
    """Return loss and accuracy over retraining, one line per budget or training; None when nothing was logged."""
    if not logs:
        return None
    looks = [(row, budget_colour(i), dash(i)) for i, row in enumerate(results.rows) if row.name in logs]
    # Budgets that were trained together have one log, which was evaluated at the smallest of them.
    many = {name for name, count in Counter(row.log for row in results.rows).items() if name is not None and count > 1}
    first = {row.log: row for row in reversed(results.rows)}
    looks = [look for look in looks if look[0].log not in many or look[0] is first[look[0].log]]
    axis = "epoch" if all(log.axis == "epoch" for log in logs.values()) else "step"
    loss, top1 = [], []
    for row, colour, line in looks:
        names = ("all budgets together", "smallest of all budgets") if row.log in many else (row.label, row.label)
        loss.append(_curve(logs[row.name], "loss", names[0], colour, line))
        top1.append(_accuracy(logs[row.name], names[1], colour, line))
    rule = None if results.dense.top1 is None else 100 * results.dense.top1
    panels = [
        _panel("Loss", "loss", loss, axis),
        _panel("Validation accuracy", "top-1, %", top1, axis, rule=rule),
    ]
    return tag("div", panels, class_="panels")


def _curve(log: Log, key: str, name: str, colour: str, line: str) -> Series:
    points = [Point(x=x, y=y) for x, y in log.curve(key)]
    return Series(name=name, points=points, colour=colour, dash=line)


def _accuracy(log: Log, name: str, colour: str, line: str) -> Series:
    points = [Point(x=x, y=y, tip=f"{name}, {log.axis} {x:g}: {y:.1f} %") for x, y in log.curve("val_top1", 100.0)]
    return Series(name=name, points=points, colour=colour, dash=line, marker="dot" if len(points) <= 40 else "")


def _panel(
    title: str,
    unit: str,
    series: Sequence[Series],
    axis: str,
    *,
    low: float | None = None,
    rule: float | None = None,
) -> Html | None:
    shown = [one for one in series if one.points]
    if not shown:
        return None
    ends = "; ".join(f"{one.name}: from {one.points[0].y:.3g} to {one.points[-1].y:.3g}" for one in shown)
    y = Axis(title=unit, low=low)
    if rule is not None:
        values = [p.y for one in shown for p in one.points] + [rule]
        air = 0.06 * max(max(values) - min(values), 1.0)
        y = Axis(title=unit, low=min(values) - air, high=min(max(values) + air, 100.5))
    drawing = chart(shown, Axis(title=axis, low=0.0), y, label=f"{title} over {axis}s. {ends}.", rule=rule)
    caption = "The thin line is the dense model." if rule is not None else None
    return figure(join(drawing, legend(shown) if len(shown) > 1 else None), caption, title=title)
