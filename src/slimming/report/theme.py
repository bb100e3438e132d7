"""Colours and style of the charts: CSS variables on a page, and the same colours as values in image files.

The colours can be distinguished with the common kinds of colour blindness: the colours of the budgets range from dark
blue over teal to orange, so that neighbours differ in lightness or between blue and yellow, and lines also differ in
their dashes.
"""

from __future__ import annotations

import re
from typing import Any

LIGHT = {
    "paper": "#ffffff", "ink": "#1a1d21", "text": "#30353b", "soft": "#5d6670", "line": "#d5d9de", "faint": "#eceef1",
    "wash": "#f6f7f9", "accent": "#1d61a4", "qk": "#1d61a4", "v": "#a34a00", "mlp": "#0b7568", "token": "#6b4c9a",
    "on": "#ffffff", "side-a": "#1d61a4", "side-b": "#a34a00",
}  # fmt: skip
DARK = {
    "paper": "#15181c", "ink": "#f1f3f5", "text": "#d3d8dd", "soft": "#9aa4ae", "line": "#3a4149", "faint": "#262b31",
    "wash": "#1c2025", "accent": "#6db0f2", "qk": "#6db0f2", "v": "#f0a35c", "mlp": "#4cc0ae", "token": "#b79be6",
    "on": "#101317", "side-a": "#6db0f2", "side-b": "#f0a35c",
}  # fmt: skip
RAMPS = {
    "light": ((23, 37, 84), (29, 97, 164), (28, 140, 140), (189, 112, 14)),
    "dark": ((150, 178, 255), (92, 170, 240), (70, 190, 175), (240, 170, 70)),
}
KINDS = {
    "qk": ("query and key dimensions", "qk"),
    "v": ("value dimensions", "v"),
    "head_dim": ("head dimensions", "qk"),
    "head": ("heads", "v"),
    "mlp": ("MLP hidden units", "mlp"),
    "channel": ("channels", "qk"),
    "token": ("token positions", "token"),
    "block": ("whole attentions and MLPs", "accent"),
    "width": ("embedding features", "accent"),
}
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif'


def kind_name(kind: str) -> str:
    """Return the display name of a kind of unit."""
    return KINDS[kind][0] if kind in KINDS else kind


def kind_colour(kind: str) -> str:
    """Return the colour of a kind of unit."""
    return colour(KINDS[kind][1] if kind in KINDS else "accent")


def colour(name: str) -> str:
    """Return the CSS variable of a colour."""
    return f"var(--{name})"


def budget_colour(index: int) -> str:
    """Return the colour of the budget at ``index``."""
    return colour(f"budget-{index}")


def variables(budgets: int, mode: str) -> dict[str, str]:
    """Return every colour by name.

    Args:
        budgets: number of budgets that need a colour.
        mode: ``"light"`` or ``"dark"``.

    >>> variables(2, "light")["budget-1"]
    '#bd700e'
    """
    ramp, found = RAMPS[mode], dict(LIGHT if mode == "light" else DARK)
    for index in range(budgets):
        place = index / max(1, budgets - 1) * (len(ramp) - 1)
        first = min(int(place), len(ramp) - 2)
        parts = (round(a + (b - a) * (place - first)) for a, b in zip(ramp[first], ramp[first + 1], strict=True))
        found[f"budget-{index}"] = "#" + "".join(f"{part:02x}" for part in parts)
    return found


def on_paper(text: str, budgets: int) -> str:
    """Return ``text`` with every colour's variable replaced by its value on white paper."""
    known = {**variables(budgets, "light"), "sans": FONT.replace('"', "'")}
    return re.sub(r"var\(--([\w-]+)\)", lambda found: known.get(found[1], found[0]), text)


def config() -> dict[str, Any]:
    """Return the style of all charts, as Vega-Lite's ``config``."""
    axis = {
        "domainColor": colour("soft"), "gridColor": colour("faint"), "labelColor": colour("soft"), "labelFontSize": 10,
        "labelLimit": 150, "tickColor": colour("soft"), "titleColor": colour("soft"), "titleFontSize": 10.5,
        "titleFontWeight": 600, "tickSize": 4,
    }  # fmt: skip
    return {
        "font": "var(--sans)",
        "background": None,
        "aria": False,  # the chart has one description, and a table beside it contains its numbers
        "view": {"stroke": None},
        "axis": axis,
        "axisX": {"grid": False, "titleAnchor": "end", "tickCount": 5},
        "axisY": {"domain": False, "ticks": False, "tickCount": 4, "titleAngle": 0, "titleAnchor": "end",
                  "titleAlign": "left", "titleBaseline": "bottom", "titleY": -8, "titleX": -30},
        "title": {"color": colour("ink"), "fontSize": 12, "fontWeight": 600, "anchor": "start", "offset": 8},
        "legend": {"orient": "bottom", "direction": "horizontal", "title": None, "labelColor": colour("text"),
                   "labelFontSize": 11, "symbolType": "stroke", "labelLimit": 220, "columnPadding": 14, "offset": 6},
        "line": {"strokeWidth": 1.8},
        "point": {"opacity": 1},
        "rule": {"color": colour("ink"), "strokeWidth": 0.8},
        "text": {"color": colour("ink"), "fontSize": 10.5},
    }  # fmt: skip
