"""Latency tables: predict the latency of a slim model from measured times of its layers.

A table holds the times of attention, MLPs or single layers at a grid of sizes, for one device, number of threads,
dtype, batch size and runtime. It interpolates linearly between the points of the grid. The times of single layers do
not add up exactly to the time of the model: `calibration` is the time of the dense model over the sum of its layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from slimming.core.formulas import evaluate
from slimming.core.groups import Anatomy
from slimming.core.records import FileKind, shown
from slimming.errors import ConfigError, PlanError, UnsupportedModelError

WHAT = "latency table"
ONE_SIZE, UNEVEN = "one size", "uneven"
FAST = 1.03
"""Largest time, relative to multiples of 64, of a size that still counts as fast."""
Point = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Measured times of a model's layers; made by `slimming.build_latency_table`.

    Attributes:
        setting: conditions of the measurement: model, device, threads, dtype, batch_size, runtime, heads, torch.
        points: the measurements: ``kind`` and ``like`` of the layer, one entry per axis with its size, ``ms`` (median),
            ``p25``, ``p75`` and ``runs``.
        calibration: time of the dense model over the sum of its layers; None before it was measured.
        reference_ms: time of a reference block of the dense model. The block is measured alternately with every point,
            whose time is scaled accordingly, because the machine's speed varies during the measurement.
        multiples: power of two -> time of the largest layer at sizes that are odd multiples of it, relative to
            multiples of 64, which are assumed to be fast; empty if the layer is too small for this.
    """

    setting: Mapping[str, Any]
    points: tuple[Point, ...] = ()
    calibration: float | None = None
    reference_ms: float | None = None
    multiples: Mapping[int, float] = field(default_factory=dict)

    @property
    def uneven_heads(self) -> bool:
        """Whether attention was measured with heads of different sizes."""
        return self.setting.get("heads") == UNEVEN

    @property
    def multiple(self) -> int | None:
        """The smallest multiple whose sizes are fast, see `slimming.Layout`; None if it was not measured."""
        return next((multiple for multiple in sorted(self.multiples) if self.multiples[multiple] <= FAST), None)

    @cached_property
    def _grids(self) -> dict[tuple[str, str], _Grid]:
        return {}

    @cached_property
    def _by_layer(self) -> dict[tuple[str, str], list[Point]]:
        found: dict[tuple[str, str], list[Point]] = {}
        for point in self.points:
            found.setdefault((point["kind"], point["like"]), []).append(point)
        return found

    def predict(self, anatomy: Anatomy, kept: Mapping[str, int]) -> float:
        """Return the milliseconds of one batch when group ``name`` keeps ``kept[name]`` units, for every group.

        Raises:
            PlanError: the table has no times for a layer of this model.
            UnsupportedModelError: the model has no timed layers.
        """
        check_timed_layers(anatomy)
        wanted: dict[tuple[str, str], list[tuple[int, ...]]] = {}
        for layer in anatomy.timed_layers:
            sizes = {name: dim.value(kept) for name, dim in layer.axes}
            same = layer.unless_same is not None and layer.unless_same.value(kept) == sizes["tokens"]
            if not same and evaluate((layer.alive,), kept):
                wanted.setdefault((layer.kind, layer.like), []).append(tuple(sizes.values()))
        total = sum(self._grid(key, anatomy).total(rows) for key, rows in wanted.items())
        return total * (self.calibration or 1.0)

    def _grid(self, key: tuple[str, str], anatomy: Anatomy) -> _Grid:
        if key not in self._grids:
            layer = next(layer for layer in anatomy.timed_layers if (layer.kind, layer.like) == key)
            points = self._by_layer.get(key)
            if not points:
                have = sorted(f"{kind} ({like})" for kind, like in self._by_layer)
                raise PlanError(
                    f"The latency table has no times for {key[0]} ({key[1]}); it has {', '.join(have)}. Build one for "
                    "this model: slimming latency-table build."
                )
            self._grids[key] = _Grid([name for name, _ in layer.axes], points)
        return self._grids[key]

    def merged(self, other: LatencyTable) -> LatencyTable:
        """Return a table with the points of both; this table takes precedence for points and calibration.

        Raises:
            ConfigError: the tables were measured in different settings, or for different models.
        """
        for key in sorted({*self.setting, *other.setting}):
            if self.setting.get(key) != other.setting.get(key):
                raise ConfigError(
                    f"The tables are of different settings: {key} is {self.setting.get(key)!r} and "
                    f"{other.setting.get(key)!r}. Merge tables of one model, device and setting; build "
                    "others in separate files."
                )
        known = {point_key(point) for point in self.points}
        # Scaled to the same time of the reference block.
        scale = self.reference_ms / other.reference_ms if self.reference_ms and other.reference_ms else 1.0
        added = [
            {k: v * scale if k in TIMES else v for k, v in point.items()}
            for point in other.points
            if point_key(point) not in known
        ]
        base = self if self.points else other
        return replace(base, points=(*self.points, *added), calibration=self.calibration or other.calibration)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON with a checksum.

        Raises:
            OutputError: ``path`` is not writable, or the disk is full.
        """
        measured = {
            "calibration": self.calibration,
            "reference_ms": self.reference_ms,
            "multiples": {str(each): slower for each, slower in self.multiples.items()},
            "points": list(self.points),
        }
        LATENCY_TABLE.write(path, {"what": WHAT, "setting": dict(self.setting), **measured})

    @staticmethod
    def load(path: str | Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, of a newer format, or not a latency table.
        """
        content = LATENCY_TABLE.read(path)
        return LatencyTable(
            setting=content.setting,
            points=tuple(content.points),
            calibration=content.calibration,
            reference_ms=content.reference_ms,
            multiples=content.multiples,
        )


Milliseconds = Annotated[float, Meta(gt=0, le=1e12)]
TIMES = ("ms", "p25", "p75")


class LatencyTableContent(msgspec.Struct, frozen=True):
    """The content of the file of a latency table."""

    what: Literal["latency table"]
    setting: dict[str, str | int | None]
    points: list[Point]
    calibration: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    reference_ms: Milliseconds | None = None
    multiples: dict[Annotated[int, Meta(ge=1)], Annotated[float, Meta(gt=0, le=1e6)]] = {}

    def __post_init__(self) -> None:
        for number, point in enumerate(self.points):
            for name in ("kind", "like"):
                if not isinstance(point.get(name), str):
                    raise ValueError(f"{name} of point {number} is {shown(point.get(name))}, not text")
            for name in TIMES:
                if name == "ms" or name in point:
                    _check_time(f"{name} of point {number}", point.get(name))
            for name in point.keys() - {"kind", "like", *TIMES}:
                if type(point[name]) is not int or point[name] < 0:
                    raise ValueError(f"{name} of point {number} is {shown(point[name])}, not a size of 0 or more")


def _check_time(name: str, value: Any) -> None:
    try:
        msgspec.convert(value, Milliseconds)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name} is {shown(value)}, not a time in milliseconds above 0") from error


LATENCY_TABLE = FileKind(
    name="a latency table",
    schema=LatencyTableContent,
    mend="Build the table again: slimming latency-table build.",
)


class _Grid:
    """Times of one layer over its axes, interpolated linearly between neighbours and never falling with a size."""

    def __init__(self, axes: Sequence[str], points: Sequence[Point]) -> None:
        from scipy.interpolate import RegularGridInterpolator

        found = {tuple(point.get(name, -1) for name in axes): point["ms"] for point in points}
        values = [sorted({sizes[place] for sizes in found}) for place in range(len(axes))]
        # The grid has a place for each combination of sizes; check before it is made.
        if len(found) < math.prod(map(len, values)) or any(-1 in sizes for sizes in found):
            raise PlanError("The latency table is not complete: resume slimming latency-table build.")
        times = np.full([len(each) for each in values], np.nan)
        for sizes, ms in found.items():
            times[tuple(each.index(size) for each, size in zip(values, sizes, strict=True))] = ms
        # Times that fall with the size are measurement noise, which must not influence plans.
        for axis in range(times.ndim):
            times = np.maximum.accumulate(times, axis=axis)
        self.moving = [place for place, each in enumerate(values) if len(each) > 1]
        self.fixed = {place: each[0] for place, each in enumerate(values) if len(each) == 1}
        self.axes = axes
        self.one = float(times.reshape(-1)[0])
        if self.moving:
            grid = [values[place] for place in self.moving]
            beyond: Any = None  # extrapolates linearly
            self.at = RegularGridInterpolator(grid, times.squeeze(), bounds_error=False, fill_value=beyond)

    def total(self, rows: Sequence[tuple[int, ...]]) -> float:
        """Return the sum of the times at several sizes, in milliseconds."""
        for place, size in self.fixed.items():
            for row in rows:
                if row[place] != size:
                    raise PlanError(
                        f"The latency table has only {self.axes[place]} {size}, but the model has {row[place]}: build "
                        "a table for this model: slimming latency-table build, with --kinds if its width is pruned."
                    )
        if not self.moving:
            return self.one * len(rows)
        times = self.at(np.asarray([[row[place] for place in self.moving] for row in rows], dtype=float))
        return float(np.maximum(times, 0.0).sum())


def check_timed_layers(anatomy: Anatomy) -> None:
    """Check that the layers of the model can be timed.

    Raises:
        UnsupportedModelError: they cannot.
    """
    if not anatomy.timed_layers:
        raise UnsupportedModelError(
            "A latency table cannot be built for this model: it does not accept a batch of two images, or it is a "
            "Vision Transformer with custom layers before its blocks. Give a budget of macs, and measure with slimming "
            "bench."
        )


def point_key(point: Point) -> tuple[tuple[str, Any], ...]:
    """Return the key of a point: all its entries except the times."""
    return tuple(sorted((k, v) for k, v in point.items() if k not in (*TIMES, "runs")))
