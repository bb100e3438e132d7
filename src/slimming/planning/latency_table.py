"""How long a slim model takes, looked up in a table of its layers that was measured on the device at hand.

A table holds the time of attention, MLPs or single layers at a grid of sizes, for one device, number of threads, type
of numbers, batch size and runtime. Between the points of the grid it interpolates. Times of single layers add up to a
little more or less than a model's: the table's `calibration` is what the dense model took over what its layers sum to.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from slimming.benchmarking.config import check_runtime
from slimming.benchmarking.runtimes import prepare
from slimming.benchmarking.timing import machine, paired_times, summary
from slimming.core.files import FORMAT, atomic_json, read_sealed, seal
from slimming.core.formulas import evaluate
from slimming.core.groups import REST, Anatomy, TimedLayer, keep_all
from slimming.core.kinds import KINDS, check_kinds
from slimming.errors import CheckpointError, ConfigError, PlanError, UnsupportedModelError
from slimming.models.family import TimedModule, TimedModules
from slimming.models.prunable import read

STEPS: Mapping[str, Sequence[float]] = {
    "tokens": (0.05, 0.25, 0.5, 0.75, 1.0),
    "width": (0.25, 0.5, 0.75, 1.0),
    "qkv": (0.125, 0.25, 0.375, 0.5, 0.75, 1.0),
    "hidden": (0.02, 0.125, 0.25, 0.5, 0.75, 1.0),
    "heads": (0.01, 0.5, 1.0),
    "out": (0.25, 0.5, 1.0),
    "in": (0.25, 0.5, 1.0),
    "channels": (0.25, 1.0),
}
"""Points of the grid along each axis, as shares of the size in the dense model."""
MULTIPLES, WHOLE, FAST = (1, 2, 4, 8, 16, 32), 64, 1.03
"""Multiples to measure, the multiple to compare them with, and the largest relative time that still counts as fast."""
WHAT = "latency table"
ONE_SIZE, UNEVEN = "one size", "uneven"
Point = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Measured times of a model's layers; made by `build_latency_table`.

    Attributes:
        setting: what the times are of: machine, device, threads, dtype, batch_size, runtime, heads.
        points: one measurement each: ``kind``, ``like`` (what else tells two layers apart), one entry per axis with
            its size, ``ms`` (median), ``p25``, ``p75``, ``runs``.
        calibration: time of the dense model over the sum of its layers; None before it was measured.
        reference_ms: time of one block of the dense model. It is measured in turns with every point, whose time is
            then given for a machine on which the block takes this long: machines grow faster and slower meanwhile.
        multiples: a power of two -> how many times longer the model's largest layer takes at a size that is an odd
            multiple of it than at multiples of 64, which are taken to be fast; empty if it is too small to tell.
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
        _check_timed_layers(anatomy)
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
        known = {_name(point) for point in self.points}
        # Scaled to the same time of the reference block.
        scale = self.reference_ms / other.reference_ms if self.reference_ms and other.reference_ms else 1.0
        added = [
            {k: v * scale if k in ("ms", "p25", "p75") else v for k, v in point.items()}
            for point in other.points
            if _name(point) not in known
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
        atomic_json(Path(path), seal({"format": FORMAT, "what": WHAT, "setting": dict(self.setting), **measured}))

    @staticmethod
    def load(path: str | Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, of a newer format, or not a latency table.
        """
        value = read_sealed(Path(path))
        if not isinstance(value, dict) or value.get("what") != WHAT:
            raise CheckpointError(f"{path} is not a latency table. Give one that slimming latency-table build wrote.")
        if value.get("format", 0) > FORMAT:
            raise CheckpointError(f"{path} has format {value['format']}, this slimming reads up to {FORMAT}. Upgrade.")
        try:
            points = tuple(dict(point) for point in value["points"])
            for point in points:
                if not (isinstance(point["like"], str) and float(point["ms"]) > 0):
                    raise ValueError(f"a point of {point['kind']} without a time")
            calibration = None if value["calibration"] is None else float(value["calibration"])
            return LatencyTable(
                setting=dict(value["setting"]),
                points=points,
                calibration=calibration,
                reference_ms=float(value["reference_ms"]),
                multiples={int(each): float(slower) for each, slower in value.get("multiples", {}).items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}. Build the table again.") from error


class _Grid:
    """Times of one layer over its axes, interpolated linearly between neighbours and never falling with a size."""

    def __init__(self, axes: Sequence[str], points: Sequence[Point]) -> None:
        from scipy.interpolate import RegularGridInterpolator

        values = [sorted({int(point[name]) for point in points}) for name in axes]
        times = np.full([len(each) for each in values], np.nan)
        for point in points:
            times[tuple(each.index(int(point[name])) for each, name in zip(values, axes, strict=True))] = point["ms"]
        if np.isnan(times).any():
            raise PlanError("The latency table is not complete: resume slimming latency-table build.")
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
                        f"The latency table knows {self.axes[place]} {size} only, the model has {row[place]}: build "
                        "one for this model: slimming latency-table build, with --kinds if its width is to go."
                    )
        if not self.moving:
            return self.one * len(rows)
        found = self.at(np.asarray([[row[place] for place in self.moving] for row in rows], dtype=float))
        return float(np.maximum(found, 0.0).sum())


def _check_timed_layers(anatomy: Anatomy) -> None:
    if not anatomy.timed_layers:
        raise UnsupportedModelError(
            "There is no latency table of this model: it takes no batch of two images, or it is a Vision Transformer "
            "with layers of its own in front of the patches. Give a budget of macs, and measure with slimming bench."
        )


def build_latency_table(
    model: nn.Module,
    *,
    batch_size: int = 1,
    runtime: str = "eager",
    kinds: Collection[str] | None = None,
    uneven_heads: bool = False,
    path: str | Path | None = None,
    seconds: float = 0.15,
    say: Say | None = None,
) -> LatencyTable:
    """Measure the layers of ``model`` where it is: its device, its type of numbers, torch's number of threads.

    Args:
        model: a dense model with any weights.
        batch_size: images per forward pass.
        runtime: ``"eager"``, ``"compile"`` (`torch.compile`) or ``"onnxruntime"``; the last two take seconds per point.
        kinds: kinds of units that plans may prune; None selects the default kinds of a search. With ``width`` a table
            has several times as many points.
        uneven_heads: whether to time attention with heads of different sizes, for plans with a layout without
            ``equal_heads``, or with heads of one size.
        path: file of the table, which is saved after every ten points; an existing table is completed.
        seconds: approximate time to measure each point.
        say: receives one line per point.

    Raises:
        UnsupportedModelError: the model has no timed layers, or its heads keep one size.
        ConfigError: there is no such runtime or kind, or the file at ``path`` is of another setting.
    """
    check_runtime(runtime)
    kinds = {name for name, kind in KINDS.items() if not kind.on_request} if kinds is None else kinds
    check_kinds(kinds, ConfigError)
    prunable = read(copy.deepcopy(model).eval())
    model, anatomy = prunable.model, prunable.anatomy
    _check_timed_layers(anatomy)
    even = prunable.family.timed_modules(model, anatomy)
    timed = prunable.family.timed_modules(model, anatomy, uneven_heads=True) if uneven_heads else even
    moving = {group.name for group in anatomy.groups if group.kind in kinds}
    table = LatencyTable(setting=_setting(model, anatomy, batch_size, runtime, uneven_heads))
    if path is not None and Path(path).exists():
        table = LatencyTable.load(path).merged(table)
    have = {_name(point) for point in table.points}
    left = [(layer, sizes) for layer, sizes in _plan(anatomy, moving) if _name(_point(layer, sizes)) not in have]
    clock = Clock(even(*_largest(anatomy)), next(model.parameters()), batch_size, runtime)
    block = clock.reference(max(1.0, 10 * seconds)) if table.reference_ms is None else table.reference_ms
    table = replace(table, reference_ms=block)
    for number, (layer, sizes) in enumerate(left, start=1):
        times = clock.times(timed(layer, sizes), seconds, block)
        table = replace(table, points=(*table.points, {**_point(layer, sizes), **times}))
        if say is not None:
            at = ", ".join(f"{name} {size}" for name, size in sizes.items())
            say(f"{number} of {len(left)}: {layer.kind}, {at}: {times['ms']:.3f} ms")
        if path is not None and number % 10 == 0:
            table.save(path)
    if left or table.calibration is None:
        whole = clock.times(TimedModule(model, anatomy.input_shape), max(1.0, 10 * seconds), block)["ms"]
        table = _calibrated(table, anatomy, whole)
        table = replace(table, multiples=_multiples(clock, even, anatomy, 5 * seconds, block))
    if path is not None:
        table.save(path)
    return table


def _largest(anatomy: Anatomy) -> tuple[TimedLayer, dict[str, int]]:
    """The layer with the largest sizes in the dense model, and those sizes."""
    full = {group.name: group.size for group in anatomy.groups}
    every = [(layer, {name: dim.value(full) for name, dim in layer.axes}) for layer in anatomy.timed_layers]
    return max((each for each in every if each[0].kind != REST), key=lambda each: math.prod(each[1].values()))


def _multiples(clock: Clock, timed: TimedModules, anatomy: Anatomy, seconds: float, block: float) -> dict[int, float]:
    """How much longer the largest layer takes at about half its size where the size is an odd multiple of 1 … 32."""
    layer, sizes = _largest(anatomy)
    moving = {name: dim for name, dim in layer.axes if dim.groups}
    axis = max(moving, key=lambda name: sizes[name], default=None)
    if axis is None or sizes[axis] < 4 * WHOLE or any(weight > 1 for _, weight in moving[axis].groups):
        return {}
    half = sizes[axis] // (2 * WHOLE) * WHOLE

    def at(size: int) -> float:
        return clock.times(timed(layer, {**sizes, axis: size}), seconds, block)["ms"]

    low, high = at(half), at(half + WHOLE)
    between = {each: low + (high - low) * each / WHOLE for each in MULTIPLES}
    return {**{each: at(half + each) / between[each] for each in MULTIPLES}, WHOLE: 1.0}


def _calibrated(table: LatencyTable, anatomy: Anatomy, whole: float) -> LatencyTable:
    """``table`` such that the dense model takes ``whole`` milliseconds: by its rest, if it has one, and a factor."""
    full = {name: len(units) for name, units in keep_all(anatomy.groups).items()}
    points = [point for point in table.points if point["kind"] != REST]
    for rest in (layer for layer in anatomy.timed_layers if layer.kind == REST):
        ((axis, elements),) = rest.axes
        others = replace(anatomy, timed_layers=tuple(layer for layer in anatomy.timed_layers if layer.kind != REST))
        most = elements.value(full)
        beyond = max(whole - replace(table, calibration=None).predict(others, full), 1e-6)
        for size in (max(1, most // 2), most):  # goes on along this line
            points.append({**_point(rest, {axis: size}), "ms": beyond * size / most})
    table = replace(table, points=tuple(points), calibration=None)
    return replace(table, calibration=whole / table.predict(anatomy, full))


class Clock:
    """Times modules, each in turns with one block of the dense model.

    Args:
        block: the block.
        like: a tensor of the model, on the device and in the dtype that are timed.
        batch_size: images per pass.
        runtime: see `build_latency_table`.
    """

    def __init__(self, block: TimedModule, like: torch.Tensor, batch_size: int, runtime: str) -> None:
        self.like, self.batch_size, self.runtime = like, batch_size, runtime
        dtype, device = like.dtype, like.device
        self.block = _OwnInput(block.module, torch.randn(batch_size, *block.shape, dtype=dtype, device=device))

    def reference(self, seconds: float) -> float:
        """Milliseconds of the block."""
        times = paired_times({"block": self.block}, (1,), 1, runs=100, seconds=seconds, like=self.like)
        return summary(times["block"]).median

    def times(self, timed: TimedModule, seconds: float, reference_ms: float) -> dict[str, Any]:
        """Median and quartiles of one copy in ``timed``, on a machine whose block takes ``reference_ms``."""
        x = torch.randn(self.batch_size, *timed.shape, dtype=self.like.dtype, device=self.like.device)
        both = {"layer": prepare(timed.module, x, self.runtime), "block": self.block}
        times = paired_times(both, timed.shape, self.batch_size, runs=30, seconds=seconds, like=self.like)
        scaled = [
            own / one * reference_ms / timed.copies for own, one in zip(times["layer"], times["block"], strict=True)
        ]
        found = summary(scaled)
        return {"ms": found.median, "p25": found.p25, "p75": found.p75, "runs": found.runs}


class _OwnInput(nn.Module):
    """A module that always gets the same input and ignores the given one."""

    def __init__(self, module: nn.Module, x: torch.Tensor) -> None:
        super().__init__()
        self.module, self.x = module, x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(self.x)


def _setting(model: nn.Module, anatomy: Anatomy, batch_size: int, runtime: str, uneven_heads: bool) -> dict[str, Any]:
    parameter = next(model.parameters())
    found = machine()
    full = {group.name: group.size for group in anatomy.groups}
    layers = [(p.kind, p.like, [(name, dim.value(full)) for name, dim in p.axes]) for p in anatomy.timed_layers]
    return {
        "model": f"{type(model).__name__} {hashlib.sha256(repr(layers).encode()).hexdigest()[:12]}",
        "device": found["gpu"] if parameter.is_cuda else found["cpu"],
        "threads": None if parameter.is_cuda else torch.get_num_threads(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "runtime": runtime,
        "heads": UNEVEN if uneven_heads else ONE_SIZE,
        "torch": torch.__version__,
    }


def _plan(anatomy: Anatomy, groups: Collection[str]) -> Iterator[tuple[TimedLayer, dict[str, int]]]:
    """Every point of the grid along what ``groups`` change, once per kind of layer."""
    full = {group.name: group.size for group in anatomy.groups}
    seen: set[tuple[str, str]] = set()
    for layer in anatomy.timed_layers:
        if (layer.kind, layer.like) in seen or layer.kind == REST:
            continue
        seen.add((layer.kind, layer.like))
        axes = []
        for name, dim in layer.axes:
            most = dim.value(full)
            if not any(group in groups for group, _ in dim.groups):
                axes.append([most])
                continue
            moving = most - dim.fixed
            # Heads keep as many dimensions each, a unit all its places; multiples of 8 where that leaves a choice.
            parts = 3 * _heads(layer) if name == "qkv" else math.lcm(*(weight for _, weight in dim.groups))
            step = 1 if name in ("tokens", "heads") else 8
            while step > 1 and moving // (parts * step) < 4:
                step //= 2
            step *= parts
            chosen = {min(moving, max(step, math.ceil(moving * share / step) * step)) for share in STEPS[name]}
            axes.append(sorted(dim.fixed + units for units in chosen))
        for sizes in itertools.product(*axes):
            yield layer, dict(zip((name for name, _ in layer.axes), sizes, strict=True))


def _heads(layer: TimedLayer) -> int:
    return int(layer.like.partition(" ")[0])


def _point(layer: TimedLayer, sizes: Mapping[str, int]) -> Point:
    return {"kind": layer.kind, "like": layer.like, **sizes}


def _name(point: Point) -> tuple[tuple[str, Any], ...]:
    """What tells a point from others: all but its times."""
    return tuple(sorted((k, v) for k, v in point.items() if k not in ("ms", "p25", "p75", "runs")))
