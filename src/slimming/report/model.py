"""What ``results.json`` holds, checked entry by entry, as plain data for the pictures."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from slimming.core.budget import METRICS
from slimming.core.files import FORMAT
from slimming.errors import CheckpointError
from slimming.report.nodes import Node, children, entries_of, maybe
from slimming.report.numbers import NBSP, scale

PARTS = {"mlp": "mlp", "channels": "channels", "heads": "whole_heads"}
"""Field of a layer -> its key in the file, for what is one number per layer."""
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A measured number: median and quartiles."""

    median: float
    p25: float
    p75: float


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How many units stay, of how many."""

    kept: int
    of: int

    @property
    def share(self) -> float:
        """Kept units as a share, 0 to 1."""
        return self.kept / self.of


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Positions that stay in a grid of patches, numbered row by row."""

    rows: int
    columns: int
    kept: frozenset[int]

    @property
    def count(self) -> Kept:
        """How many stay."""
        return Kept(kept=len(self.kept), of=self.rows * self.columns)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What stays in one layer; whatever was not searched is None or empty.

    Attributes:
        name: of the module.
        label: a short name for axes.
        qk: query and key dimensions per head.
        v: value dimensions per head.
        mlp: hidden units.
        channels: channels of convolutions.
        heads: whole heads, where their dimensions stay.
        tokens: positions, of this layer or of the last one before it that cut some.
    """

    name: str
    label: str
    qk: tuple[Kept, ...] = ()
    v: tuple[Kept, ...] = ()
    mlp: Kept | None = None
    channels: Kept | None = None
    heads: Kept | None = None
    tokens: Tokens | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model: the dense one, or what a budget left of it.

    Attributes:
        name: as results call it.
        label: as people call it.
        short: the same for the labels of points.
        params: number of parameters.
        macs: multiply-adds for one image.
        memory_bytes: weights and peak activations at batch 1.
        latency_ms: batch size -> time of a forward pass.
        speedup: batch size -> how many times faster than dense.
        top1_one_shot: share of right answers when cut without search and training.
        top1_cut: the same straight after the cut.
        top1: the same after retraining.
        seconds: stage -> how long it took.
        layers: what stays.
        widths: embedding widths where they can go, one per stage in hierarchical models, by name.
        log: the log of its retraining, relative to the run's directory.
        limits: the metrics that its budget limits, with the limits; empty for keep ratios.
    """

    name: str
    label: str
    short: str
    params: int
    macs: int
    memory_bytes: int
    latency_ms: Mapping[int, Spread]
    speedup: Mapping[int, Spread] = field(default_factory=dict)
    top1_one_shot: float | None = None
    top1_cut: float | None = None
    top1: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    widths: Mapping[str, Kept] = field(default_factory=dict)
    log: str | None = None
    limits: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Distribution of the soft masks of one kind.

    Attributes:
        kind: of unit.
        edges: of the bins, one more than there are counts.
        counts: units per bin.
        by_group: group name -> its masks; may be empty.
    """

    kind: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    by_group: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of the data: class name, base64 of its PNG, size in pixels."""

    label: str
    png: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that a report tells, apart from the curves."""

    name: str
    created: str
    seed: int | None
    model: Mapping[str, Any]
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    data: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, Any]
    settings: Mapping[str, Any]
    dense: Row
    rows: tuple[Row, ...]
    search_log: str | None
    search_seconds: float | None
    masks: tuple[Masks, ...]
    sensitivity: Mapping[str, tuple[tuple[float, float], ...]]
    images: tuple[Picture, ...]

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Every batch size that was measured somewhere."""
        return tuple(sorted({size for row in (self.dense, *self.rows) for size in row.latency_ms}))


def parse(value: Any, where: str = "results") -> Results:
    """Check the content of a ``results.json``.

    Args:
        value: what the JSON holds.
        where: the file's name, for complaints.

    Raises:
        CheckpointError: an entry is missing or malformed, there is no row, or the format is newer than ours.
    """
    root = Node(value, where)
    version = root.need("format").count()
    if version > FORMAT:
        raise CheckpointError(f"{where} has format {version}, and this slimming reads up to {FORMAT}. Update slimming.")
    model, search = root.need("model"), root.get("search")
    rows = tuple(_row(node, dense=False) for node in root.need("rows").items())
    if not rows:
        raise CheckpointError(f"{where} holds no budget: there is nothing to report. Run at least one budget.")
    return Results(
        name=root.need("name").text(),
        created=maybe(root, "created", Node.text) or "",
        seed=maybe(root, "seed", Node.count),
        model=model.mapping(),
        input_shape=tuple(node.count() for node in model.need("input").items()),
        classes=tuple(node.text() for node in model.need("classes").items()),
        data=root.need("data").mapping(),
        machine=maybe(root, "machine", Node.mapping) or {},
        versions=maybe(root, "versions", Node.mapping) or {},
        settings=maybe(root, "settings", Node.mapping) or {},
        dense=_row(root.need("dense"), dense=True),
        rows=rows,
        search_log=maybe(search, "log", Node.text),
        search_seconds=maybe(search, "seconds", Node.number),
        masks=tuple(_masks(kind, node) for kind, node in children(search, "masks")),
        sensitivity={kind: _sensitivity(node) for kind, node in children(search, "sensitivity")},
        images=parse_pictures(entries_of(root, "images")),
    )


def _row(node: Node, *, dense: bool) -> Row:
    name = node.need("name").text()
    label, short = ("dense", "dense") if dense else _labels(node.get("budget"), name)
    return Row(
        name=name,
        label=label,
        short=short,
        params=int(node.need("params").positive()),
        macs=int(node.need("macs").positive()),
        memory_bytes=int(node.need("memory_bytes").positive()),
        latency_ms=_spreads(node, "latency_ms"),
        speedup=_spreads(node, "speedup"),
        top1_one_shot=maybe(node, "top1_one_shot", Node.share),
        top1_cut=maybe(node, "top1_cut", Node.share),
        top1=maybe(node, "top1", Node.share),
        seconds={key: found.number() for key, found in children(node, "seconds")},
        layers=parse_layers(entries_of(node, "layers")),
        widths=parse_widths(entries_of(node, "widths")),
        log=maybe(node, "log", Node.text),
        limits={key: limit.limit(key) for key, limit in children(node, "budget") if key in METRICS},
    )


def _labels(budget: Node | None, name: str) -> tuple[str, str]:
    """The budget in words, and its number alone where there is only one."""
    if budget is None or not budget.mapping():
        return name, name
    keep = budget.get("keep")
    limits = {key: node.share() if keep else node.limit(key) for key, node in (keep or budget).entries()}
    words = {
        "macs": "MACs",
        "params": "params",
        "memory_bytes": "memory",
        "latency": "latency",
        "latency_ms": "latency",
        "head_dim": "head dims",
        "mlp": "MLP",
        "channel": "channels",
        "token": "tokens",
        "block": "branches",
        "width": "width",
    }
    shares = {key: limit <= 1 and key != "latency_ms" for key, limit in limits.items()}
    values = {key: f"{100 * limit:g} %" if shares[key] else _absolute(key, limit) for key, limit in limits.items()}
    known = [f"{value} {words.get(key, key)}".replace(" ", NBSP) for key, value in values.items()]
    short = next(iter(values.values())).replace(" ", NBSP) if len(values) == 1 else name
    return ", ".join(known) or name, short


def _absolute(metric: str, limit: float) -> str:
    if metric == "latency_ms":
        return f"{limit:g} ms"
    unit = scale([limit], base="B" if metric == "memory_bytes" else "")
    return f"{unit.show(limit)} {unit.unit}"


def _spreads(node: Node, key: str) -> dict[int, Spread]:
    found: dict[int, Spread] = {}
    for size, entry in children(node, key):
        if not re.fullmatch("[1-9][0-9]*", size):
            raise entry.wrong("under a batch size")
        found[int(size)] = Spread(**{part: entry.need(part).positive() for part in ("median", "p25", "p75")})
    return dict(sorted(found.items()))


def parse_layers(nodes: list[Node]) -> tuple[Layer, ...]:
    """Check what stays layer by layer; a later layer without token positions has those of the one before.

    Raises:
        CheckpointError: an entry is missing or malformed.
    """
    names = [node.need("name").text() for node in nodes]
    labels = [".".join(re.findall(r"\d+", name)) for name in names]
    if len(set(labels)) < len(labels) or "" in labels:
        labels = names
    layers: list[Layer] = []
    tokens: Tokens | None = None
    for node, name, label in zip(nodes, names, labels, strict=True):
        heads = entries_of(node, "heads")
        own = node.get("tokens")
        # A position that one layer cut is gone for every later one, whether it names it or not.
        tokens = tokens if own is None else _tokens(own, tokens)
        parts = {field: node.get(key) for field, key in PARTS.items()}
        layers.append(
            Layer(
                name=name,
                label=label,
                qk=tuple(_kept(head, "qk") for head in heads if head.get("qk") is not None),
                v=tuple(_kept(head, "v") for head in heads if head.get("v") is not None),
                tokens=tokens,
                **{field: _kept(part, "kept") for field, part in parts.items() if part is not None},
            )
        )
    return tuple(layers)


def _kept(node: Node, key: str) -> Kept:
    kept, of = node.need(key).count(), node.need("of").count()
    if of < 1 or kept > of:
        raise node.need(key).wrong(f"a part of {of}")
    return Kept(kept=kept, of=of)


def _tokens(node: Node, before: Tokens | None) -> Tokens | None:
    grid = [entry.count() for entry in node.need("grid").items()]
    if len(grid) != 2:
        raise node.need("grid").wrong("rows and columns")
    if 0 in grid:
        return before
    kept = frozenset(entry.count() for entry in node.need("kept").items())
    if max(kept, default=0) >= grid[0] * grid[1]:
        raise node.need("kept").wrong(f"inside a grid of {grid[0]} by {grid[1]}")
    return Tokens(rows=grid[0], columns=grid[1], kept=kept)


def _masks(kind: str, node: Node) -> Masks:
    edges = tuple(entry.number() for entry in node.need("edges").items())
    counts = tuple(entry.count() for entry in node.need("counts").items())
    if not counts or len(edges) != len(counts) + 1 or any(b <= a for a, b in pairwise(edges)):
        raise node.need("edges").wrong("increasing and one more than counts")
    groups = {name: tuple(v.number() for v in found.items()) for name, found in children(node, "by_layer")}
    return Masks(kind=kind, edges=edges, counts=counts, by_group=groups)


def _sensitivity(node: Node) -> tuple[tuple[float, float], ...]:
    return tuple((entry.need("kept").number(), entry.need("loss").number()) for entry in node.items())


def parse_widths(nodes: list[Node]) -> dict[str, Kept]:
    """Check embedding widths: name -> what stays."""
    return {one.need("name").text(): _kept(one, "kept") for one in nodes}


def parse_pictures(nodes: list[Node]) -> tuple[Picture, ...]:
    """Check images of the data.

    Raises:
        CheckpointError: one is not a PNG.
    """
    return tuple(map(_picture, nodes))


def _picture(node: Node) -> Picture:
    text = node.need("png").text()
    try:
        head = base64.b64decode(text, validate=True)[:24]
    except (binascii.Error, ValueError) as error:
        raise node.need("png").wrong("base64") from error
    if len(head) < 24 or not head.startswith(PNG_MAGIC):
        raise node.need("png").wrong("a PNG")
    width, height = (int.from_bytes(head[i : i + 4], "big") for i in (16, 20))
    return Picture(label=node.need("label").text(), png=text, width=width, height=height)
