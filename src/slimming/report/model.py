"""The schema of ``results.json``: its content as plain data for tables and charts, and the check of this content."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Any, TypeVar

from msgspec import Meta

from slimming.core.budget import LEAST_ABSOLUTE, METRICS
from slimming.core.limits import MIB
from slimming.core.metric import TOP1, Metric
from slimming.core.records import FileKind, converted
from slimming.errors import CheckpointError
from slimming.report.numbers import NBSP, scale

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
LIMIT_NAMES = {"macs": "MACs", "memory_bytes": "memory", "latency_ms": "latency", "head_dim": "head dims", "mlp": "MLP",
               "channel": "channels", "token": "tokens", "block": "branches"}  # fmt: skip
LARGEST = 1e300

Finite = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0, le=LARGEST)]
Count = Annotated[int, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]
Checked = TypeVar("Checked")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A measured number: median and quartiles."""

    median: Positive
    p25: Positive
    p75: Positive


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Number of kept units, and the number of units in the dense model."""

    kept: Count
    of: AtLeastOne

    def __post_init__(self) -> None:
        if self.kept > self.of:
            raise ValueError(f"{self.kept} is not a part of {self.of}")

    @property
    def share(self) -> float:
        """Kept units as a share, 0 to 1."""
        return self.kept / self.of

    def __str__(self) -> str:
        return f"{self.kept} of {self.of}"


@dataclass(frozen=True, kw_only=True)
class Head:
    """Query-key dimensions, and value dimensions, that one attention head keeps, out of ``of`` in the dense model."""

    of: AtLeastOne
    qk: Count | None = None
    v: Count | None = None

    def __post_init__(self) -> None:
        for kept in (self.qk or 0, self.v or 0):
            Kept(kept=kept, of=self.of)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Kept token positions in a grid of patches (rows, columns), numbered row by row."""

    grid: tuple[Count, Count]
    kept: frozenset[Count]

    def __post_init__(self) -> None:
        if max(self.kept, default=-1) >= max(1, self.grid[0] * self.grid[1]):
            raise ValueError(f"kept is not inside a grid of {self.grid[0]} by {self.grid[1]}")

    @property
    def count(self) -> Kept:
        """Number of kept and of all positions."""
        return Kept(kept=len(self.kept), of=self.grid[0] * self.grid[1])


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The kept units of one layer; parts that cannot be pruned or were not searched are None or empty.

    ``tokens`` are the positions present in this layer, ``whole_heads`` counts heads that are kept or removed as a
    whole, and ``label`` is a short name for axes.
    """

    name: str
    heads: tuple[Head, ...] | None = None
    mlp: Kept | None = None
    channels: Kept | None = None
    whole_heads: Kept | None = None
    tokens: Tokens | None = None
    label: str = ""

    def per_head(self, role: str) -> tuple[Kept, ...]:
        """The kept ``"qk"`` or ``"v"`` dimensions of each head."""
        heads = [head for head in self.heads or () if getattr(head, role) is not None]
        return tuple(Kept(kept=getattr(head, role), of=head.of) for head in heads)

    def whole(self, part: str) -> Kept | None:
        """The kept units of a part, summed over all heads; None if the layer has no such part."""
        if part in ("qk", "v"):
            found = self.per_head(part)
            return Kept(kept=sum(one.kept for one in found), of=sum(one.of for one in found)) if found else None
        if part == "tokens":
            return self.tokens.count if self.tokens else None
        return getattr(self, part, None)


@dataclass(frozen=True, kw_only=True)
class Width(Kept):
    """The kept features of an embedding width; hierarchical models have one width per stage."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model: the dense model (without a budget), or the model cut to a budget.

    ``latency_ms`` and ``speedup`` are by batch size, ``seconds`` by stage; MACs are multiply-adds for one image, and
    memory is that of weights and of the peak of activations at batch 1. ``metric`` is the quality after retraining,
    ``metric_one_shot`` and ``metric_cut`` that of the one-shot cut and directly after the cut; in files of
    classifiers, they are called ``top1`` and so on, and lie between 0 and 1. ``log`` is relative to the run's
    directory; ``log_sha256`` is the checksum of this file. ``plan_note`` says why the plan ends below its limit.
    """

    name: str
    params: AtLeastOne
    macs: AtLeastOne
    memory_bytes: AtLeastOne
    budget: Mapping[str, Finite | Mapping[str, Share] | None] | None = None
    latency_ms: Mapping[AtLeastOne, Spread] = field(default_factory=dict)
    speedup: Mapping[AtLeastOne, Spread] = field(default_factory=dict)
    top1_one_shot: Share | None = None
    top1_cut: Share | None = None
    top1: Share | None = None
    metric_one_shot: Finite | None = None
    metric_cut: Finite | None = None
    metric: Finite | None = None
    seconds: Mapping[str, Finite] = field(default_factory=dict)
    layers: tuple[Layer, ...] | None = ()
    widths: tuple[Width, ...] | None = ()
    log: str | None = None
    log_sha256: str | None = None
    plan_note: str = ""

    def __post_init__(self) -> None:
        for key, limit in self.limits.items():
            least = 0 if key == "latency_ms" else LEAST_ABSOLUTE
            if not (0 < limit <= 1 or limit >= max(least, 1e-300)):
                raise ValueError(f"budget.{key} is neither a share between 0 and 1 nor at least {least:g}")

    @property
    def limits(self) -> dict[str, float]:
        """Limits of the budget by metric; empty for keep ratios."""
        found = {key: value for key, value in (self.budget or {}).items() if key in METRICS}
        return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}

    @property
    def _words(self) -> dict[str, str]:
        keep = (self.budget or {}).get("keep")
        given = keep if isinstance(keep, Mapping) else self.limits
        return {LIMIT_NAMES.get(key, key): _limit(key, value).replace(" ", NBSP) for key, value in given.items()}

    @property
    def label(self) -> str:
        """Text of the budget, or the name of the model if it has none."""
        return ", ".join(f"{value}{NBSP}{name}".replace(" ", NBSP) for name, value in self._words.items()) or self.name

    @property
    def short(self) -> str:
        """Value of the limit if there is only one, else the name of the model; for the labels of points."""
        return next(iter(self._words.values())) if len(self._words) == 1 else self.name


def _limit(metric: str, value: float) -> str:
    if metric == "latency_ms":
        return f"{value:g} ms"
    if value <= 1:
        return f"{100 * value:g} %"
    unit = scale([value], base="B" if metric == "memory_bytes" else "")
    return f"{unit.show(value)} {unit.unit}"


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Histogram of the soft masks of one kind, and the masks of each group."""

    edges: tuple[Finite, ...]
    counts: tuple[Count, ...]
    by_layer: Mapping[str, tuple[Finite, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.counts or len(self.edges) != len(self.counts) + 1 or any(b <= a for a, b in pairwise(self.edges)):
            raise ValueError("edges are not increasing and one more than counts")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Increase of the loss when one kind alone is cut to a share of its units."""

    kept: Finite
    loss: Finite


@dataclass(frozen=True, kw_only=True)
class Search:
    """The search of a run: its log, and by kind of unit the masks and the measured sensitivity."""

    log: str | None = None
    log_sha256: str | None = None
    seconds: Finite | None = None
    masks: Mapping[str, Masks] | None = None
    sensitivity: Mapping[str, tuple[Trial, ...]] | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image: its name or class, and base64 of its PNG."""

    label: str
    png: str

    def __post_init__(self) -> None:
        try:
            head = base64.b64decode(self.png, validate=True)[:24]
        except ValueError as error:
            raise ValueError("png is not base64") from error
        if len(head) < 24 or not head.startswith(PNG_MAGIC):
            raise ValueError("png is not a PNG")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        head = base64.b64decode(self.png[:32])
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the models of a run predict on one image: the name of each model, and its picture."""

    label: str
    pictures: Mapping[str, Picture]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The dense model of a run."""

    name: str
    input: tuple[Count, ...]
    classes: tuple[str, ...]
    family: str | None = None


@dataclass(frozen=True, kw_only=True)
class Results:
    """All data of a report except the training curves."""

    name: str
    model: Model
    data: Mapping[str, Any]
    dense: Row
    rows: tuple[Row, ...]
    created: str | None = None
    seed: Count | None = None
    machine: Mapping[str, Any] | None = None
    versions: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] | None = None
    search: Search | None = None
    images: tuple[Picture, ...] | None = None
    metric: Metric = TOP1
    predictions: tuple[Prediction, ...] = ()

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """All batch sizes at which a model was measured."""
        return tuple(sorted({size for row in (self.dense, *self.rows) for size in row.latency_ms}))


RESULTS = FileKind(
    name="the results of a run",
    schema=Results,
    mend="Remove it and repeat `slimming run`, which goes on where it stopped and writes it again.",
    largest=64 * MIB,
)


def parse(value: Any, where: str = "results") -> Results:
    """Check the content of a ``results.json``.

    Args:
        value: the decoded JSON, as `slimming.core.records.FileKind.read_values` returns it.
        where: name of the file, for messages.

    Raises:
        CheckpointError: an entry is missing or malformed, or there is no row.
    """
    found = checked(value, Results, where)
    if not found.rows:
        raise CheckpointError(f"{where} holds no budget: there is nothing to report. Run at least one budget.")
    return replace(
        found,
        dense=with_metric(found.dense),
        rows=tuple(
            replace(with_metric(row), layers=labelled(row.layers or ()), widths=row.widths or ()) for row in found.rows
        ),
        **{key: getattr(found, key) or {} for key in ("machine", "versions", "settings")},
        search=found.search or Search(),
        images=found.images or (),
    )


def with_metric(row: Row) -> Row:
    """A row with its top-1, if there is one, as its metric."""
    found = {
        f"metric{stage}": top1
        for stage in ("", "_cut", "_one_shot")
        if (top1 := getattr(row, f"top1{stage}")) is not None
    }
    return replace(row, **found) if found else row


def checked(value: Any, kind: type[Checked], where: str) -> Checked:
    """Return a part of the results of a run as ``kind``.

    Raises:
        CheckpointError: an entry is missing or malformed.
    """
    return converted(value, kind, where, mend=RESULTS.mend)


def labelled(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return layers with short labels; a layer without token positions gets those of the layer before it.

    A position that was removed in one layer is absent from all later layers.
    """
    labels = [".".join(re.findall(r"\d+", layer.name)) for layer in layers]
    if len(set(labels)) < len(labels) or "" in labels:
        labels = [layer.name for layer in layers]
    found, tokens = [], None
    for layer, label in zip(layers, labels, strict=True):
        tokens = layer.tokens if layer.tokens is not None and 0 not in layer.tokens.grid else tokens
        found.append(replace(layer, label=label, tokens=tokens))
    return tuple(found)
