"""Format numbers: one unit per column, and three significant digits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NBSP = "\u00a0"
"""Non-breaking space, between a number and its unit."""
THIN = "\u202f"
"""Narrow non-breaking space, between thousands."""


@dataclass(frozen=True)
class Scale:
    """The unit of a column.

    Attributes:
        unit: name of the unit, for the header of the column.
        factor: value of one unit.
        decimals: digits after the point.
    """

    unit: str
    factor: float
    decimals: int

    def show(self, value: float) -> str:
        """Return ``value`` in this unit, without the unit's name."""
        return f"{value / self.factor:,.{self.decimals}f}".replace(",", THIN)


def scale(values: Iterable[float], suffixes: Sequence[str] = ("", "k", "M", "G", "T"), base: str = "") -> Scale:
    """Return the unit in which the largest of ``values`` is below 1000, with decimals for about three digits.

    >>> scale([5_500_000, 2_100_000], base="")
    Scale(unit='M', factor=1000000.0, decimals=2)
    >>> scale([310_000_000], base="MACs").unit
    'MMACs'
    """
    positive = [value for value in values if value > 0]
    largest = max(positive, default=1.0)
    step = 0
    while step + 1 < len(suffixes) and largest >= 1000 ** (step + 1):
        step += 1
    factor = float(1000**step)
    return Scale(suffixes[step] + base, factor, decimals(value / factor for value in positive))


def decimals(values: Iterable[float]) -> int:
    """Return the number of decimals, 0 to 2, that shows three digits of the smallest value.

    >>> decimals([4.2, 130.0]), decimals([42.0]), decimals([420.0])
    (2, 1, 0)
    """
    smallest = min((value for value in values if value > 0), default=1.0)
    return max(0, min(2, 2 - math.floor(math.log10(smallest))))


def percent(value: float, digits: int = 0) -> str:
    r"""Return a share as a percentage.

    >>> percent(0.7), percent(0.9468, 1)
    ('70\xa0%', '94.7\xa0%')
    """
    return f"{100 * value:.{digits}f}{NBSP}%"


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds as text.

    >>> duration(7.34), duration(95), duration(7320)
    ('7.3 s', '1 min 35 s', '2 h 02 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
