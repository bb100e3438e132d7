"""One kind of chart, points and lines over two linear axes, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimming.report.markup import Html, svg, tag
from slimming.report.numbers import tick_text, ticks

WIDE, NARROW = (360.0, 240.0), (272.0, 196.0)
"""Width and height of a chart in pixels: three or four stand side by side on a laptop."""
LEFT, RIGHT, TOP, BOTTOM = 40.0, 12.0, 22.0, 38.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a series.

    Attributes:
        x: in data units.
        y: in data units.
        tip: what is said of it on demand.
        label: what is written beside it.
        low: left end of its spread along x, if known.
        high: right end.
    """

    x: float
    y: float
    tip: str | None = None
    label: str | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points that belong together.

    Attributes:
        name: for the legend.
        points: in the order in which the line joins them.
        colour: a CSS colour.
        dash: a dash pattern of the line; empty draws it solid.
        line: join the points.
        marker: ``"disc"``, ``"dot"``, ``"ring"``, ``"diamond"`` or empty.
    """

    name: str
    points: Sequence[Point]
    colour: str = "var(--accent)"
    dash: str = ""
    line: bool = True
    marker: str = ""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis: its title and, where the data do not decide, its ends."""

    title: str
    low: float | None = None
    high: float | None = None


def chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    label: str,
    rule: float | None = None,
    size: tuple[float, float] = WIDE,
) -> Html:
    """Draw ``series``.

    Args:
        series: what is drawn, the last on top.
        x: the horizontal axis.
        y: the vertical axis. Points outside its ends are drawn as arrows at the edge.
        label: what the picture shows, for those who do not see it.
        rule: height of a horizontal reference line.
        size: width and height in pixels.
    """
    points = [point for one in series for point in one.points]
    across = [v for p in points for v in (p.x, p.low, p.high) if v is not None]
    frame = _Frame(*_ends(across, x), *_ends([p.y for p in points], y), *size)
    parts = [_axes(frame, x, y)]
    if rule is not None:
        height = frame.y(rule)
        parts.append(tag("line", x1=LEFT, x2=frame.right, y1=height, y2=height, class_="rule"))
    parts += [_draw(one, frame) for one in series]
    parts += _marks(points, frame)
    return svg(*size, label, parts, class_="chart")


def legend(series: Sequence[Series]) -> Html:
    """Name the series, each behind a sample of its line and marker."""
    entries = []
    for one in series:
        sample = []
        if one.line:
            dash = one.dash or None
            sample.append(
                tag("line", x1=1, x2=25, y1=6, y2=6, class_="curve", style=_stroke(one), stroke_dasharray=dash)
            )
        if one.marker:
            sample.append(_marker(one, 13.0, 6.0))
        drawing = tag("svg", sample, viewBox="0 0 26 12", width=26, height=12, aria_hidden="true")
        entries.append(tag("li", drawing, one.name))
    return tag("ul", entries, class_="legend")


@dataclass(frozen=True)
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.width - RIGHT

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - LEFT)

    def y(self, value: float) -> float:
        inside = min(max(value, self.y_low), self.y_high)
        return self.bottom - (inside - self.y_low) / (self.y_high - self.y_low) * (self.bottom - TOP)


def _ends(values: Sequence[float], axis: Axis) -> tuple[float, float]:
    """The ends of an axis: those it has, or the data's with some air."""
    low = axis.low if axis.low is not None else min(values, default=0.0)
    high = axis.high if axis.high is not None else max(values, default=1.0)
    air = 0.05 * (high - low)
    if air <= 0:
        air = 0.05 * abs(high) or 0.5
    return (low if axis.low is not None else low - air), (high if axis.high is not None else high + air)


def _axes(frame: _Frame, x: Axis, y: Axis) -> Html:
    bottom, right = frame.bottom, frame.right
    parts = []
    values = ticks(frame.y_low, frame.y_high, 4)
    for value, text in zip(values, tick_text(values), strict=True):
        height = frame.y(value)
        parts.append(tag("line", x1=LEFT, x2=right, y1=height, y2=height, class_="grid"))
        parts.append(tag("text", text, x=LEFT - 6, y=height + 3.5, class_="tick end"))
    values = ticks(frame.x_low, frame.x_high, 5)
    for value, text in zip(values, tick_text(values), strict=True):
        place = frame.x(value)
        parts.append(tag("line", x1=place, x2=place, y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(tag("text", text, x=place, y=bottom + 16, class_="tick mid"))
    parts.append(tag("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(tag("text", y.title, x=2, y=11, class_="title"))
    parts.append(tag("text", x.title, x=right, y=frame.height - 4, class_="title end"))
    return tag("g", parts)


def _draw(one: Series, frame: _Frame) -> Html:
    places = [(frame.x(p.x), frame.y(p.y)) for p in one.points]
    parts = []
    if one.line and len(places) > 1:
        way = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(tag("path", d=way, class_="curve", style=_stroke(one), stroke_dasharray=one.dash or None))
    for point, (x, y) in zip(one.points, places, strict=True):
        if point.low is not None and point.high is not None:
            low, high = frame.x(point.low), frame.x(point.high)
            parts.append(tag("line", x1=low, x2=high, y1=y, y2=y, class_="spread", style=_stroke(one)))
        if not one.marker and len(places) > 1:
            continue
        tip = tag("title", point.tip) if point.tip else None
        below = point.y < frame.y_low
        parts.append(tag("g", tip, _arrow(one, x, y) if below else _marker(one, x, y), class_="point"))
    return tag("g", parts)


def _marks(points: Sequence[Point], frame: _Frame) -> list[Html]:
    """Labels, each at the first free place around its point; one that finds none is left to its tip."""
    # Boxes (left, top, right, bottom) of what is there already.
    places = [(frame.x(point.x), frame.y(point.y)) for point in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    parts = []
    for point, (x, y) in zip(points, places, strict=True):
        wide = 6.0 * len(point.label or "")
        for side, left, base in (("start", x + 7, y + 15), ("end", x - 7 - wide, y - 7), ("start", x + 7, y - 7)):
            box = (left, base - 9, left + wide, base + 2)
            inside = box[0] > LEFT and box[1] > 0 and box[2] < frame.width
            if point.label and inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                at = left if side == "start" else left + wide
                parts.append(tag("text", point.label, x=at, y=base, class_=f"mark {side}"))
                break
    return parts


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _marker(one: Series, x: float, y: float) -> Html:
    if one.marker == "diamond":
        way = f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"
        return tag("path", d=way, style=f"fill:{one.colour}")
    if one.marker == "ring":
        return tag("circle", cx=x, cy=y, r=4, class_="ring", style=_stroke(one))
    return tag("circle", cx=x, cy=y, r=2.6 if one.marker == "dot" else 4.5, style=f"fill:{one.colour}")


def _arrow(one: Series, x: float, y: float) -> Html:
    """A point below the axis: it points to where it is."""
    return tag("path", d=f"M{x:.1f} {y - 1:.1f}l5 -8h-10z", class_="ring", style=_stroke(one))


def _stroke(one: Series) -> str:
    return f"stroke:{one.colour}"
