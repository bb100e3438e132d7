"""The table of budgets, and accuracy against what a model costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from slimming.report.markup import Content, Html, figure, join, tag
from slimming.report.model import Results, Row, Spread
from slimming.report.numbers import THIN, Scale, decimals, percent, scale
from slimming.report.palette import budget_colour
from slimming.report.plot import Axis, Point, Series, chart, legend

BYTES = ("B", "kB", "MB", "GB", "TB")
NONE = "–"


def budget_table(results: Results) -> Html:
    """Return the table: the dense model and one line per budget, all numbers as measured."""
    every = (results.dense, *results.rows)
    sizes = results.batch_sizes
    one_shot = any(row.top1_one_shot is not None for row in every)
    params, macs = scale(row.params for row in every), scale(row.macs for row in every)
    memory = scale((row.memory_bytes for row in every), BYTES)
    times = {s: _times(row.latency_ms[s] for row in every if s in row.latency_ms) for s in sizes}
    costs = [
        (f"Params, {params.unit}" if params.unit else "Params", params, lambda row: row.params),
        (f"MACs, {macs.unit}" if macs.unit else "MACs", macs, lambda row: row.macs),
        (f"Memory, {memory.unit}", memory, lambda row: row.memory_bytes),
    ]
    body = []
    for index, row in enumerate(every):
        dense = row is results.dense
        cells = [_name_cell(row, None if dense else index - 1)]
        cells += [_cost_cell(row, results.dense, unit, read) for _, unit, read in costs]
        cells += [_spread_cell(row.latency_ms.get(size), times[size]) for size in sizes]
        cells += [_speedup_cell(row, size, dense) for size in sizes]
        cells += [
            *([_top1_cell(None if dense else row.top1_one_shot)] if one_shot else []),
            _top1_cell(None if dense else row.top1_cut),
            _top1_cell(row.top1, results.dense.top1, dense),
        ]
        body.append(tag("tr", cells, class_="dense" if dense else None))
    return tag(
        "div",
        tag(
            "table",
            _table_head([name for name, _, _ in costs], sizes, one_shot=one_shot),
            tag("tbody", body),
            class_="budgets",
        ),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label="Table of budgets",
    )


def _times(spreads: Iterable[Spread]) -> Scale:
    return Scale("ms", 1.0, decimals(spread.median for spread in spreads))


def _table_head(costs: Sequence[str], sizes: Sequence[int], *, one_shot: bool) -> Html:
    def over(text: Content, span: int) -> Html:
        return tag("th", text, colspan=span, scope="colgroup", class_="over")

    def down(text: Content) -> Html:
        return tag("th", text, rowspan=2, scope="col")

    batches = [tag("th", f"batch {size}", scope="col") for size in sizes]
    accuracies = [*(["in one shot"] if one_shot else []), "after the cut", "retrained"]
    groups = [over("Latency, ms", len(sizes)), over("Speed-up over dense, ×", len(sizes))] if sizes else []
    return tag(
        "thead",
        tag("tr", tag("th", "Budget", rowspan=2, scope="col", class_="name"), map(down, costs), groups,
            over("Top-1, %", len(accuracies))),
        tag("tr", batches, batches, [tag("th", text, scope="col") for text in accuracies]),
    )  # fmt: skip


def _name_cell(row: Row, index: int | None) -> Html:
    dot = None if index is None else tag("span", class_="dot", style=f"background:{budget_colour(index)}")
    below = None if row.name in (row.label, "dense") else tag("small", row.name)
    return tag("th", tag("span", dot, row.label, class_="label"), below, scope="row", class_="name")


def _cell(value: float, text: str, below: Content = None) -> Html:
    return tag("td", tag("data", text, value=repr(value)), tag("small", below) if below else None)


def _cost_cell(row: Row, dense: Row, unit: Scale, read: Callable[[Row], int]) -> Html:
    return _cell(read(row), unit.show(read(row)), percent(read(row) / read(dense)))


def _spread_cell(spread: Spread | None, unit: Scale) -> Html:
    if spread is None:
        return tag("td", NONE)
    return _cell(spread.median, unit.show(spread.median), f"{unit.show(spread.p25)}–{unit.show(spread.p75)}")


def _speedup_cell(row: Row, size: int, dense: bool) -> Html:
    if dense:
        return tag("td", "1")
    spread = row.speedup.get(size)
    return _spread_cell(spread, Scale("×", 1.0, 2))


def _top1_cell(top1: float | None, dense_top1: float | None = None, dense: bool = False) -> Html:
    if top1 is None:
        return tag("td", NONE)
    below = None
    if dense_top1 is not None and not dense:
        below = f"{100 * (top1 - dense_top1):+.1f}".replace("-", "−")
    return _cell(top1, f"{100 * top1:.1f}", below)


def table_notes(results: Results) -> Html:
    """Return what a reader must know to trust the table's numbers."""
    notes = [
        "One multiply-add is one MAC; MACs and memory are for one image, memory is weights plus the peak of "
        "activations. Shares below are of the dense model.",
        "Latency is that of this machine, not a claim about others: medians, with the quartiles below; dense and "
        "slim models took turns, and the speed-up is the median of the ratio turn by turn.",
    ]
    images, top1 = results.data.get("val_images"), results.dense.top1
    if isinstance(images, int) and images > 0 and top1 is not None:
        error = 1.96 * math.sqrt(max(top1 * (1 - top1), 1e-9) / images)
        notes.append(
            f"Top-1 is counted on {images:,} validation images".replace(",", THIN)
            + f": at {percent(top1, 1)} the sampling error is ±{100 * error:.1f} points (95 % interval). "
            "Differences to dense, below, are in points."
        )
    return tag("ul", [tag("li", note) for note in notes], class_="notes")


def trade_off(results: Results) -> Html:
    """Return accuracy against MACs, parameters and latency, side by side."""
    every = (results.dense, *results.rows)
    if all(row.top1 is None and row.top1_cut is None for row in every):
        return tag("p", "No accuracy was measured in this run.")
    params, macs = scale(row.params for row in every), scale(row.macs for row in every)
    y = _accuracy_axis(results)
    panels = [
        _panel(results, "MACs", f"{macs.unit}MACs for one image", y, lambda row: row.macs / macs.factor),
        _panel(results, "parameters", f"{params.unit} parameters", y, lambda row: row.params / params.factor),
        *_latency_panel(results, y),
    ]
    return tag("div", panels, class_="panels")


def _accuracy_axis(results: Results) -> Axis:
    """Fit what is good enough to use; what the bare cut leaves may lie far below and is then an arrow."""
    good = [100 * row.top1 for row in (results.dense, *results.rows) if row.top1 is not None]
    bare = [100 * row.top1_cut for row in results.rows if row.top1_cut is not None]
    good = good or bare
    low, high = min(good), max(good)
    span = max(high - low, 1.0)
    near = [value for value in bare if value >= low - 1.5 * span]
    low, high = min([low, *near]), max([high, *near])
    air = 0.12 * max(high - low, 1.0)
    return Axis(title="Top-1, %", low=max(0.0, low - 1.6 * air), high=min(100.0, high + air))


def _panel(results: Results, what: str, title: str, y: Axis, cost: Callable[[Row], float]) -> Html:
    def point(row: Row, top1: float, when: str, label: str | None) -> Point:
        return Point(x=cost(row), y=100 * top1, label=label, tip=f"{row.label}: {percent(top1, 1)} {when}")

    dense = results.dense
    series = []
    if bare := [point(r, r.top1_cut, "after the cut", None) for r in results.rows if r.top1_cut is not None]:
        below = y.low is not None and any(p.y < y.low for p in bare)
        name = "straight after the cut" + (" (arrow: below the axis)" if below else "")
        series.append(Series(name=name, points=bare, colour="var(--soft)", line=False, marker="ring"))
    if bare := [point(r, r.top1_one_shot, "in one shot", None) for r in results.rows if r.top1_one_shot is not None]:
        series.append(Series(name="in one shot, untrained", points=bare, colour="var(--v)", line=False, marker="ring"))
    if good := [point(r, r.top1, "retrained", r.short) for r in results.rows if r.top1 is not None]:
        series.append(Series(name="retrained", points=good, marker="disc"))
    if dense.top1 is not None:
        alone = [point(dense, dense.top1, "as it was", "dense")]
        series.append(Series(name="dense", points=alone, colour="var(--ink)", line=False, marker="diamond"))
    rule = None if dense.top1 is None else 100 * dense.top1
    told = "; ".join(p.tip for one in series for p in one.points if p.tip)
    drawing = chart(series, Axis(title=title, low=0.0), y, label=f"Top-1 accuracy against {what}. {told}.", rule=rule)
    return figure(join(drawing, legend(series)), title=f"Accuracy against {what}")


def _latency_panel(results: Results, y: Axis) -> list[Html]:
    """Time per image, so that batch sizes share an axis."""
    series = []
    for index, size in enumerate((results.batch_sizes[:1] + results.batch_sizes[-1:])[: len(results.batch_sizes)]):
        points = []
        for row in (results.dense, *results.rows):
            spread = row.latency_ms.get(size)
            if spread is None or row.top1 is None:
                continue
            low, mid, high = (value / size for value in (spread.p25, spread.median, spread.p75))
            tip = f"{row.label}, batch {size}: {mid:.3g} ms per image ({low:.3g}–{high:.3g}), "
            tip += percent(row.top1, 1)
            points.append(
                Point(x=mid, y=100 * row.top1, low=low, high=high, tip=tip, label=None if index else row.short)
            )
        colour, dash, marker = ("var(--v)", "7 3", "ring") if index else ("var(--accent)", "", "disc")
        if points:
            series.append(Series(name=f"batch {size}", points=points, colour=colour, dash=dash, marker=marker))
    if not series:
        return []
    told = "; ".join(p.tip for one in series for p in one.points if p.tip)
    rule = None if results.dense.top1 is None else 100 * results.dense.top1
    drawing = chart(
        series,
        Axis(title="ms per image", low=0.0),
        y,
        label=f"Top-1 accuracy against latency. {told}.",
        rule=rule,
    )
    return [figure(join(drawing, legend(series)), title="Accuracy against latency")]
