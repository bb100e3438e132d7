"""Colours: a ramp for budgets, which are ordered, and fixed colours for kinds of unit.

Both keep apart for the usual kinds of colour blindness: the ramp goes from dark blue over teal to orange, so
that neighbours differ in lightness or between blue and yellow, and lines differ by their dashes besides.
"""

from __future__ import annotations

from collections.abc import Sequence

RAMP_LIGHT = ((23, 37, 84), (29, 97, 164), (28, 140, 140), (189, 112, 14))
RAMP_DARK = ((150, 178, 255), (92, 170, 240), (70, 190, 175), (240, 170, 70))
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2 1 2")
KINDS = {
    "qk": ("query and key dimensions", "--qk"),
    "v": ("value dimensions", "--v"),
    "head_dim": ("head dimensions", "--qk"),
    "head": ("heads", "--v"),
    "mlp": ("MLP hidden units", "--mlp"),
    "channel": ("channels", "--qk"),
    "token": ("token positions", "--token"),
    "block": ("whole attentions and MLPs", "--accent"),
    "width": ("embedding features", "--accent"),
}


def kind_name(kind: str) -> str:
    """Return what a kind of unit is called in text."""
    return KINDS[kind][0] if kind in KINDS else kind


def kind_colour(kind: str) -> str:
    """Return the CSS colour of a kind of unit."""
    return f"var({KINDS[kind][1]})" if kind in KINDS else "var(--accent)"


def budget_colour(index: int) -> str:
    """Return the CSS colour of the budget at ``index``."""
    return f"var(--budget-{index})"


def dash(index: int) -> str:
    """Return the dash pattern of the budget at ``index``."""
    return DASHES[index % len(DASHES)]


def budget_variables(count: int, *, dark: bool) -> str:
    """Return the CSS declarations that give ``count`` budgets their colours.

    >>> budget_variables(2, dark=False)
    '--budget-0:#172554;--budget-1:#bd700e;'
    """
    ramp = RAMP_DARK if dark else RAMP_LIGHT
    colours = [_between(ramp, index / max(1, count - 1)) for index in range(count)]
    return "".join(f"--budget-{index}:#{r:02x}{g:02x}{b:02x};" for index, (r, g, b) in enumerate(colours))


def budget_rgb(index: int, count: int) -> tuple[int, ...]:
    """Return the colour of one of ``count`` budgets on white paper: red, green and blue, 0 to 255."""
    return _between(RAMP_LIGHT, index / max(1, count - 1))


def _between(ramp: Sequence[tuple[int, int, int]], where: float) -> tuple[int, ...]:
    place = where * (len(ramp) - 1)
    first = min(int(place), len(ramp) - 2)
    rest = place - first
    return tuple(round(a + (b - a) * rest) for a, b in zip(ramp[first], ramp[first + 1], strict=True))
