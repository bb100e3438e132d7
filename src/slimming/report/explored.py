"""What the explorer of a report shows: many plans of one search, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slimming.report.model import Kept, Layer, Picture


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a model costs.

    Attributes:
        params: number of parameters.
        macs: multiply-adds for one image.
        memory_bytes: weights and peak activations at batch 1; None where it has no formula.
        latency_ms: of one batch, by a latency table; None without one.
    """

    params: int
    macs: int
    memory_bytes: int | None = None
    latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One plan.

    Attributes:
        share: the limit, as a share of the dense model.
        name: of its budget, as files are called.
        costs: what the model costs.
        kept_score: share of the total score that stays.
        layers: what stays.
        widths: embedding widths where they can go, by name.
    """

    share: float
    name: str
    costs: Costs
    kept_score: float
    layers: tuple[Layer, ...]
    widths: Mapping[str, Kept] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model whose accuracy was measured: the dense one, or that of a budget.

    Attributes:
        label: as people call it.
        costs: what it costs.
        top1: share of right answers after retraining.
        top1_cut: straight after the cut.
        top1_one_shot: when cut without search and training.
        limit: the metric of its budget, if it has a single one that is a share.
        share: the value of that limit.
    """

    label: str
    costs: Costs
    top1: float | None = None
    top1_cut: float | None = None
    top1_one_shot: float | None = None
    limit: str | None = None
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make a model of a budget: text in parts, between which budget and name are put in turns.

    Attributes:
        command: parts of a command line, around ``METRIC=SHARE`` and then the name of the budget.
        python: the same of a program.
        note: what the reader must know to use them; may be empty.
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
        measured: the dense model, if its accuracy is known, and every budget of the run.
        recipe: how to make one.
        latency: what predicted times are of, in words; empty without a table.
        pictures: images of the data.
    """

    name: str
    place: str
    model: str
    dense: Costs
    steps: Mapping[str, tuple[Step, ...]]
    measured: tuple[Measured, ...]
    recipe: Recipe
    latency: str = ""
    pictures: tuple[Picture, ...] = ()
