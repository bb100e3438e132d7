"""The files in the directory of a run that a resumed run reads, each with its schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from slimming.core.records import FileKind
from slimming.report.model import Row, Share
from slimming.runs.time_budget import TimeAllocation

MEND = "Remove it to repeat this stage."
Seconds = Annotated[float, Meta(ge=0, le=1e12)]


class Metrics(msgspec.Struct, frozen=True):
    """The metrics of the dense model."""

    top1: Share


class StageSeconds(msgspec.Struct, frozen=True):
    """The time that a stage took."""

    seconds: Seconds


class Served(msgspec.Struct, frozen=True):
    """The budgets that one training for all of them served, and the time that it took."""

    budgets: Annotated[tuple[str, ...], Meta(min_length=1)]
    seconds: Seconds


METRICS = FileKind(name="the metrics of a model", schema=Metrics, mend=MEND)
SECONDS = FileKind(name="the time of a search", schema=StageSeconds, mend=MEND)
SERVED = FileKind(name="the record of a training for all budgets", schema=Served, mend=MEND)
ONE_SHOT = FileKind(
    name="the accuracies of one-shot cuts", schema=dict[str, dict[Literal["top1_one_shot"], Share]], mend=MEND
)
ROW = FileKind(name="the results of a budget", schema=Row, mend=MEND)
TIME_ALLOCATION = FileKind(name="the time allocation of a run", schema=TimeAllocation, mend=MEND)
SETTINGS = FileKind(
    name="the settings of a run", schema=dict[str, Any], mend="Choose another directory to start a new run."
)
