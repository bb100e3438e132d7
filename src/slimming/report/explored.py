"""What the explorer of a report shows: many plans of one search, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slimming.report.model import Layer, Picture, Row, Width


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a model costs.

    MACs are multiply-adds for one image, and memory is that of weights and peak activations at batch 1 (None where
    there is no formula). The latency is of one batch, by a latency table (None without one).
    """

    params: int
    macs: int
    memory_bytes: int | None = None
    latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One plan: what it costs, and what it keeps of the total score, in each layer, and of embedding widths.

    ``share`` is its limit as a share of the dense model, ``name`` that of its budget.
    """

    share: float
    name: str
    costs: Costs
    kept_score: float
    layers: tuple[Layer, ...]
    widths: tuple[Width, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make a model of a budget: a command line and a program, each in three parts.

    ``METRIC=SHARE`` stands between the first two parts, the name of the budget between the last two. ``note`` is what
    the reader must know to use them; it may be empty.
    """

    command: tuple[str, ...]
    python: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Explored:
    """One search, and what can be made of it.

    Attributes:
        name: of the run.
        place: the directory that was read, as the user gave it.
        model: name of the dense model.
        dense: its costs.
        steps: metric -> plans, the smallest budget first.
        measured: the dense model and every budget of the run; empty for a search alone.
        times: name of one of them -> milliseconds by the latency table.
        recipe: how to make one.
        latency: what predicted times are of, in words; empty without a table.
        pictures: images of the data.
    """

    name: str
    place: str
    model: str
    dense: Costs
    steps: Mapping[str, tuple[Step, ...]]
    measured: tuple[Row, ...]
    recipe: Recipe
    times: Mapping[str, float] = field(default_factory=dict)
    latency: str = ""
    pictures: tuple[Picture, ...] = ()
