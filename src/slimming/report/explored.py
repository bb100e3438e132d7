"""The data of the explorer in a report: many plans of one search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slimming.core.metric import TOP1, Metric
from slimming.report.model import Layer, Picture, Row, Width


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The costs of a model.

    MACs are multiply-adds for one image, and memory is that of weights and peak activations at batch 1 (None if there
    is no formula). The latency is that of one batch, predicted by a latency table (None without a table).
    """

    params: int
    macs: int
    memory_bytes: int | None = None
    latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One plan: its costs, the kept share of the total score, and the kept units of each layer and embedding width.

    ``share`` is the limit as a share of the dense model, ``name`` the name of the budget.
    """

    share: float
    name: str
    costs: Costs
    kept_score: float
    layers: tuple[Layer, ...]
    widths: tuple[Width, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Instructions to make the model of a budget: a command line and a Python program, each in three parts.

    ``METRIC=SHARE`` is inserted between the first two parts, the name of the budget between the last two. ``note`` is a
    note for their use; it may be empty.
    """

    command: tuple[str, ...]
    python: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Explored:
    """One search with its plans.

    Attributes:
        name: name of the run.
        place: path of the directory, as the user gave it.
        model: name of the dense model.
        dense: costs of the dense model.
        steps: metric -> plans, the smallest budget first.
        measured: the dense model and every budget of the run; empty for a search alone.
        times: name of a model in ``measured`` -> milliseconds predicted by the latency table.
        recipe: instructions to make the model of a budget.
        latency: description of the conditions of predicted times; empty without a table.
        pictures: images of the data.
        metric: the metric of the models in ``measured``.
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
    metric: Metric = TOP1
