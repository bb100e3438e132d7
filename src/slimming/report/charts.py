"""Chart types: each function returns one Altair definition, which is used for the page and for PNG and SVG files.

Colours are CSS variables (see `theme`). User texts are only data of a chart, never part of an expression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt

from slimming.report.theme import colour, config

WIDE, NARROW, FRONTIER, BAR = (300, 180), (224, 140), (540, 200), 150
"""Width and height of plots in pixels, of which three or four fit side by side on a laptop; and the length of a bar."""
TILE, ACROSS = 96, 6
"""Width of one map of token positions in pixels, and the number of maps in a row."""
DASHES = ([1, 0], [7, 3], [2, 3], [9, 3, 2, 3], [12, 4], [4, 2, 1, 2])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
SHORT = "format(datum.value, abs(datum.value) < 1 ? '~g' : '~s')"
"""Expression for axis labels such as 0.5, 20, 4.6G."""
NOTHING = alt.InlineData(values=[{}])
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart with its title, a text description for screen readers, and a caption that may be empty.

    ``data`` contains the chart's data by name. ``columns`` maps fields of the first data set to the column names of
    the table beside the chart and of the tooltips.
    """

    title: str
    told: str
    chart: alt.TopLevelMixin
    data: Mapping[str, Sequence[Record]]
    columns: Mapping[str, str] = field(default_factory=dict)
    caption: str = ""

    def spec(self, *, whole: bool = True) -> dict[str, Any]:
        """Return the Vega-Lite specification, with its data unless ``whole`` is False."""
        spec = self.chart.to_dict(validate=False)
        own = spec.get("datasets", {}) | (dict(self.data) if whole else {})
        return {**spec, "datasets": own, "description": self.told, "config": config()}

    def table(self) -> list[list[str]]:
        """Return the data as rows of text, in the order of the columns."""
        rows = [[record.get(key, "–") for key in self.columns] for record in next(iter(self.data.values()))]
        return [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in rows]


@dataclass(frozen=True, kw_only=True)
class Style:
    """Style of one series: its colour, the dashes of its line (None draws no line) and its marks.

    ``mark`` is a shape of Vega (``"circle"``, ``"square"``, ``"diamond"``), or empty for none; ``hollow`` draws only
    its outline.
    """

    colour: str = "var(--accent)"
    dash: Sequence[int] | None = (1, 0)
    mark: str = "circle"
    hollow: bool = False


def look(index: int, shade: str, *, marks: bool = True) -> Style:
    """Return the style of the series at ``index``; series also differ in dashes and, with ``marks``, in shapes."""
    return Style(colour=shade, dash=DASHES[index % len(DASHES)], mark=SHAPES[index % len(SHAPES)] if marks else "")


def of(name: str) -> alt.Chart:
    """Return a chart of the data called ``name``, which the figure or the page provides."""
    return alt.Chart(alt.NamedData(name=name))


def _tips(columns: Mapping[str, str], numbers: Sequence[str] = ()) -> list[alt.Tooltip]:
    return [
        alt.Tooltip(f"{key}:Q", title=name, format=".4~g") if key in numbers else alt.Tooltip(f"{key}:N", title=name)
        for key, name in columns.items()
    ]


def _scale(domain: Sequence[float] | None) -> alt.Scale:
    return alt.Scale(zero=False) if domain is None else alt.Scale(domain=list(domain), nice=False, zero=False)


def lines(
    records: Sequence[Record],
    styles: Mapping[str, Style],
    columns: Mapping[str, str],
    *,
    x: str,
    y: str,
    x_domain: Sequence[float] | None = None,
    y_domain: Sequence[float] | None = None,
    rule: float | None = None,
    size: tuple[int, int] = WIDE,
) -> alt.LayerChart:
    """Return a chart of the data ``points`` as points and lines with linear axes.

    Args:
        records: the points, with ``series``, ``x`` and ``y``; optionally ``low`` and ``high``, the ends of an
            interval along x, and ``label``, the text beside the point.
        styles: series -> its style, in the order of the legend.
        columns: fields of the tooltips, see `Figure`.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        x_domain: ends of the horizontal axis; None uses those of the data.
        y_domain: ends of the vertical axis. Points below it are drawn as triangles at the lower edge.
        rule: height of a horizontal reference line.
        size: width and height of the plot in pixels.
    """
    names, looks = list(styles), list(styles.values())
    low = y_domain[0] if y_domain is not None else -1e300
    marked = [name for name, style in styles.items() if style.mark]
    side_by_side = 3 if max(map(len, names), default=0) <= 13 or size == FRONTIER else 2
    key = alt.Legend(symbolStrokeWidth=1.6, symbolSize=70 if marked else 400, columns=side_by_side)
    key = key if len(styles) > 1 else None

    def by_series(channel: Any, values: Sequence[Any]) -> Any:
        return channel("series:N", scale=alt.Scale(domain=names, range=list(values)), legend=key)

    def only(chart: alt.Chart, series: Sequence[str]) -> alt.Chart:
        return chart.transform_filter(alt.FieldOneOfPredicate(field="series", oneOf=list(series)))

    chosen = alt.selection_point(fields=["series"], bind="legend")
    base = (
        of("points")
        .transform_calculate(below=f"datum.y < {low!r}", height=f"max(datum.y, {low!r})")
        .encode(
            x=alt.X("x:Q", axis=alt.Axis(title=x, labelExpr=SHORT), scale=_scale(x_domain)),
            y=alt.Y("height:Q", title=y, scale=_scale(y_domain)),
            stroke=by_series(alt.Stroke, [style.colour for style in looks]),
            opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.15)),
        )
    )
    layers: list[Any] = []
    if rule is not None:
        level = alt.YDatum(rule, scale=_scale(y_domain))
        layers.append(alt.Chart(NOTHING).mark_rule(strokeDash=[2, 2]).encode(y=level))
    patterns = {name: list(style.dash) for name, style in styles.items() if style.dash is not None}
    if marked:  # the legend shows shapes, whose outlines should not be dashed
        layers += [only(base, [name]).mark_line(fill=None, strokeDash=dash) for name, dash in patterns.items()]
    elif patterns:
        layers.append(base.mark_line(fill=None).encode(strokeDash=by_series(alt.StrokeDash, list(patterns.values()))))
    if any("low" in record for record in records):
        spreads = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.4)
        layers.append(spreads.encode(x="low:Q", x2="high:Q"))
    if marked:
        numbers = [name for name in columns if records and isinstance(records[0].get(name), float)]
        fills = [colour("paper") if style.hollow else style.colour for style in looks]
        points = only(base, marked).encode(fill=by_series(alt.Fill, fills), tooltip=_tips(columns, numbers))
        shapes = by_series(alt.Shape, [style.mark or "circle" for style in looks])
        layers.append(points.transform_filter("!datum.below").mark_point(size=34, strokeWidth=1.6).encode(shape=shapes))
        if any(record["y"] < low for record in records):
            edge = points.transform_filter("datum.below").mark_point(shape="triangle-down", size=60, yOffset=-4)
            layers.append(edge)
    if any(record.get("label") for record in records):
        text = base.transform_filter("isValid(datum.label) && !datum.below").mark_text(dx=-5, dy=-8, align="right")
        layers.append(text.encode(text="label:N", stroke=alt.value(None)))
    layers[-1] = layers[-1].add_params(chosen)
    return alt.layer(*layers).properties(width=size[0], height=size[1])


def heads(layers: Sequence[str], count: int, kind: str, columns: Mapping[str, str]) -> alt.LayerChart:
    """Return a grid of layers by heads: a darker colour means a larger kept share; a cross is a removed head.

    The data ``units`` has ``layer``, ``head``, ``kept``, ``share`` and ``told``.

    Args:
        layers: labels of the layers, starting at the input.
        count: number of heads.
        kind: name of a colour.
        columns: fields of the tooltips.
    """
    step = min(30.0, max(11.0, 312 / count))
    across = alt.Axis(orient="top", title=None, domain=False, ticks=False, labelAngle=0, offset=-2,
                      values=list(range(0, count, 1 if step >= 18 else 4)))  # fmt: skip
    base = of("units").encode(
        x=alt.X("head:O", axis=across, scale=alt.Scale(domain=list(range(count)), padding=0.06)),
        y=_by_layer(layers),
        tooltip=_tips(columns),
    )
    kept, gone = base.transform_filter("datum.kept > 0"), base.transform_filter("datum.kept == 0")
    deep = alt.FillOpacity("share:Q", scale=alt.Scale(domain=[0, 1], range=[0.1, 1]), legend=None)
    parts: list[Any] = [
        kept.mark_rect(cornerRadius=2, fill=colour(kind)).encode(fillOpacity=deep),
        gone.mark_rect(cornerRadius=2, fill=None, stroke=colour("line")),
        gone.mark_text(text="×", color=colour("soft"), fontSize=12),
    ]
    if step >= 18 and len(layers) <= 16:
        on = alt.when("datum.share > 0.7").then(alt.value(colour("on"))).otherwise(alt.value(colour("ink")))
        parts.append(kept.mark_text(fontSize=10).encode(text="kept:Q", color=on))
    return alt.layer(*parts).properties(width=count * step, height=_height(layers))


def bars(layers: Sequence[str], kind: str, columns: Mapping[str, str]) -> alt.LayerChart:
    """Return one bar per layer for its kept share of units, in front of a grey bar for all units; see `heads`."""
    base = of("units").encode(y=_by_layer(layers), tooltip=_tips(columns))
    across = alt.X("share:Q", scale=alt.Scale(domain=[0, 1], range=[0, BAR]), axis=None)
    whole = base.mark_bar(cornerRadius=2, color=colour("faint")).encode(x=alt.value(0), x2=alt.value(BAR))
    part = base.mark_bar(cornerRadius=2, color=colour(kind)).encode(x=across)
    number = base.mark_text(align="left", color=colour("soft"), fontSize=10).encode(x=alt.value(BAR + 6), text="told:N")
    return alt.layer(whole, part, number).properties(width=BAR + 70, height=_height(layers))


def _by_layer(layers: Sequence[str]) -> alt.Y:
    axis = alt.Axis(title=None, domain=False, ticks=False, labelOverlap=True, labelPadding=6)
    return alt.Y("layer:O", axis=axis, scale=alt.Scale(domain=list(layers), padding=0.12))


def _height(layers: Sequence[str]) -> float:
    return len(layers) * (20 if len(layers) <= 16 else 14 if len(layers) <= 40 else 9)


def token_maps(count: int, pictures: Sequence[str], shape: float) -> alt.LayerChart:
    """Return maps of token positions, one tile per block; removed positions are dark, or empty without a picture.

    The data ``tiles`` has ``column``, ``row``, ``block``, ``told`` and ``picture``, a number among ``pictures``; the
    data ``cells`` has ``x``, ``x2``, ``y`` and ``y2`` in units of tiles.

    Args:
        count: number of tiles.
        pictures: URLs of images; the chart's parameter ``pictures`` can replace them.
        shape: height of the pictures over their width.
    """
    tall, wide, down = TILE * shape, TILE + 8, TILE * shape + 42
    width, height = min(count, ACROSS) * wide, -(-count // ACROSS) * down
    x = alt.X("left:Q", scale=alt.Scale(domain=[0, width], nice=False), axis=None)
    y = alt.Y("top:Q", scale=alt.Scale(domain=[height, 0], nice=False), axis=None)
    base = of("tiles").transform_calculate(
        left=f"datum.column * {wide}", top=f"datum.row * {down:g}", right=f"datum.left + {TILE}",
        bottom=f"datum.top + {tall:g}", url="pictures[datum.picture]",
    ).encode(x=x, y=y)  # fmt: skip
    grid = of("cells").transform_calculate(
        left=f"floor(datum.x + 1e-3) * {wide - TILE} + datum.x * {TILE}",
        right=f"datum.left + (datum.x2 - datum.x) * {TILE}",
        top=f"floor(datum.y + 1e-3) * {down - tall:g} + datum.y * {tall:g}",
        bottom=f"datum.top + (datum.y2 - datum.y) * {tall:g}",
    ).encode(x=x, y=y, x2="right:Q", y2="bottom:Q")  # fmt: skip
    fill = {"fill": "#0b0d10", "fillOpacity": 0.8} if pictures else {"fill": colour("token"), "fillOpacity": 0.85}
    words: dict[str, Any] = {"align": "left", "limit": TILE, "fontSize": 10.5}
    layers = [
        base.mark_rect(fill=colour("faint")).encode(x2="right:Q", y2="bottom:Q"),
        base.mark_image(width=TILE, height=tall, align="left", baseline="top", aspect=False).encode(url="url:N"),
        grid.mark_rect(stroke="#ffffff", strokeOpacity=0.3, strokeWidth=0.5, **fill),
        base.mark_text(dy=tall + 12, fontWeight=600, **words).encode(text="block:N"),
        base.mark_text(dy=tall + 25, color=colour("soft"), **words).encode(text="told:N"),
    ]
    layered = alt.layer(*(layers if pictures else layers[:1] + layers[2:])).properties(width=width, height=height)
    return layered.add_params(alt.param(name="pictures", value=list(pictures)))


def histogram(ends: Sequence[float], groups: Sequence[str], kind: str) -> alt.VConcatChart:
    """Return a histogram of masks over all units, and below it one line per group that is darker in fuller bins.

    The data ``bins`` has ``left``, ``right`` and ``units``; the data ``bands`` has ``group``, ``left``, ``right`` and
    ``share`` of the fullest bin of the group.

    Args:
        ends: ends of the axis.
        groups: labels of the groups, from top to bottom.
        kind: colour of the kind of unit.
    """
    scale, names = _scale(ends), {"left": "from", "right": "to", "units": "units"}
    above = of("bins").mark_bar(color=kind, binSpacing=1).encode(
        x=alt.X("left:Q", scale=scale, axis=None if groups else alt.Axis(title="mask")), x2="right:Q",
        y=alt.Y("units:Q", title="units"), y2=alt.datum(0), tooltip=_tips(names, ("left", "right")),
    )  # fmt: skip
    down = alt.Axis(title=None, domain=False, ticks=False, values=list(groups[:: max(1, round(len(groups) / 12))]))
    below = of("bands").mark_rect(fill=kind).encode(
        x=alt.X("left:Q", scale=scale, title="mask"), x2="right:Q",
        y=alt.Y("group:O", axis=down, scale=alt.Scale(domain=list(groups), padding=0.08)),
        fillOpacity=alt.FillOpacity("share:Q", scale=alt.Scale(domain=[0, 1], range=[0.08, 1]), legend=None),
    )  # fmt: skip
    parts = [above.properties(width=WIDE[0], height=100), below.properties(width=WIDE[0], height=9 * len(groups))]
    return alt.vconcat(*(parts if groups else parts[:1]), spacing=6)


def frontier(measured: alt.LayerChart | None, title: str, most: float, least: float) -> alt.VConcatChart:
    """Return accuracies above the share of the score that plans keep, over one cost.

    Args:
        measured: chart of measured accuracies over the same axis.
        title: title of the cost axis.
        most: right end of the axis.
        least: lower end of the score's axis, in percent.

    The page provides the data ``plans`` and ``chosen``: records with ``side`` (``"A"`` or ``"B"``), ``x`` and ``y``.
    """
    bare = alt.X("x:Q", axis=alt.Axis(labels=False, ticks=False, title=None), scale=_scale([0, most]))
    across = alt.X("x:Q", axis=alt.Axis(title=title, labelExpr=SHORT), scale=_scale([0, most]))
    up = alt.Y("y:Q", title="score kept by each plan, %", axis=alt.Axis(tickCount=2), scale=_scale([least, 100]))
    above: list[Any] = []
    below: list[Any] = []
    for side, dash in (("A", [1, 0]), ("B", [5, 3])):
        shade = colour(f"side-{side.lower()}")
        plans, chosen = (of(name).transform_filter(f"datum.side == '{side}'")
                         for name in ("plans", "chosen"))  # fmt: skip
        here = chosen.mark_rule(strokeWidth=1.6, stroke=shade, strokeDash=dash)
        flag = chosen.mark_text(text=side, dy=-9, fontWeight="bold", fontSize=13, color=shade)
        above += [here.encode(x=bare), flag.encode(x=bare, y=alt.value(0))]
        ring = chosen.mark_point(size=90, strokeWidth=2, stroke=shade, fill=colour("paper"), opacity=1)
        line = plans.mark_line(strokeWidth=1.6, stroke=shade, strokeDash=dash)
        below += [here.encode(x=across), line.encode(x=across, y=up), ring.encode(x=across, y=up)]
    nothing = alt.Chart(NOTHING).mark_text(text="no accuracy was measured yet", color=colour("soft"))
    above.append(measured if measured is not None else nothing)
    width, height = FRONTIER
    top, bottom = alt.layer(*above).properties(width=width, height=height), alt.layer(*below)
    return alt.vconcat(top, bottom.properties(width=width, height=80), spacing=26)
