"""How long a slim model takes, looked up in a table of its pieces that was measured on the device at hand.

A table holds the time of attention, MLPs or single layers at a grid of sizes, for one device, number of threads, type
of numbers, batch size and runtime. Between the points of the grid it interpolates. Times of single pieces add up to a
little more or less than a model's: the table's `calibration` is what the dense model took over what its pieces sum to.
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

from slimming.benchmarking.runtimes import check_runtime, prepare
from slimming.benchmarking.timing import machine, paired_times, summary
from slimming.core.files import FORMAT, atomic_json, read_sealed, seal
from slimming.core.formulas import evaluate
from slimming.core.groups import REST, Anatomy, Piece, keep_all
from slimming.core.kinds import KINDS, check_kinds
from slimming.errors import CheckpointError, ConfigError, PlanError, UnsupportedModelError
from slimming.models import family_of
from slimming.models.family import Family, Timed

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
"""Points of the grid along each axis, as shares of the model's own size."""
MULTIPLES, WHOLE, FAST = (1, 2, 4, 8, 16, 32), 64, 1.03
"""Multiples to try, the one that they are held against, and how much longer a size may take and still count as fast."""
WHAT = "latency table"
ONE_SIZE, UNEVEN = "one size", "uneven"
Point = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Measured times of a model's layers at a grid of sizes; made by `build_latency_table`.

    Attributes:
        setting: what the times are of: machine, device, threads, dtype, batch_size, runtime, heads.
        points: one measurement each: ``kind``, ``like`` (what else tells two pieces apart), one entry per axis with
            its size, ``ms`` (median), ``p25``, ``p75``, ``runs``.
        calibration: time of the dense model over the sum of its pieces; None before it was measured.
        reference_ms: time of one block of the dense model. It is measured in turns with every point, whose time is
            then given for a machine on which the block takes this long: machines grow faster and slower meanwhile.
        multiples: a power of two -> how many times longer the model's largest piece takes at a size that is an odd
            multiple of it than at multiples of 64, which are taken to be fast; empty if it is too small to tell.
    """

    setting: Mapping[str, Any]
    points: tuple[Point, ...] = ()
    calibration: float | None = None
    reference_ms: float | None = None
    multiples: Mapping[int, float] = field(default_factory=dict)

    @property
    def uneven_heads(self) -> bool:
        """Whether the times are of attention whose heads differ in size."""
        return self.setting.get("heads") == UNEVEN

    @property
    def multiple(self) -> int | None:
        """The smallest multiple whose sizes are fast here, see `slimming.Layout`; None if that was not measured."""
        return next((each for each in sorted(self.multiples) if self.multiples[each] <= FAST), None)

    @cached_property
    def _grids(self) -> dict[tuple[str, str], _Grid]:
        return {}

    @cached_property
    def _by_piece(self) -> dict[tuple[str, str], list[Point]]:
        found: dict[tuple[str, str], list[Point]] = {}
        for point in self.points:
            found.setdefault((point["kind"], point["like"]), []).append(point)
        return found

    def predict(self, anatomy: Anatomy, kept: Mapping[str, int]) -> float:
        """Milliseconds of one batch when group ``name`` keeps ``kept[name]`` units (complete).

        Raises:
            PlanError: the table has no times for a piece of this model.
            UnsupportedModelError: the model has no pieces.
        """
        _check_pieces(anatomy)
        wanted: dict[tuple[str, str], list[tuple[int, ...]]] = {}
        for piece in anatomy.pieces:
            sizes = {name: dim.value(kept) for name, dim in piece.axes}
            same = piece.unless_same is not None and piece.unless_same.value(kept) == sizes["tokens"]
            if not same and evaluate((piece.alive,), kept):
                wanted.setdefault((piece.kind, piece.like), []).append(tuple(sizes.values()))
        total = sum(self._grid(key, anatomy).total(rows) for key, rows in wanted.items())
        return total * (self.calibration or 1.0)

    def _grid(self, key: tuple[str, str], anatomy: Anatomy) -> _Grid:
        if key not in self._grids:
            piece = next(piece for piece in anatomy.pieces if (piece.kind, piece.like) == key)
            points = self._by_piece.get(key)
            if not points:
                have = sorted(f"{kind} ({like})" for kind, like in self._by_piece)
                raise PlanError(
                    f"The latency table has no times for {key[0]} ({key[1]}); it has {', '.join(have)}. Build one for "
                    "this model: slimming latency-table build."
                )
            self._grids[key] = _Grid([name for name, _ in piece.axes], points)
        return self._grids[key]

    def merged(self, other: LatencyTable) -> LatencyTable:
        """The points of both, those of this table where both have one; its calibration, if it has one.

        Raises:
            ConfigError: they were measured in different settings, or of different models.
        """
        for key in sorted({*self.setting, *other.setting}):
            if self.setting.get(key) != other.setting.get(key):
                raise ConfigError(
                    f"The tables are of different settings: {key} is {self.setting.get(key)!r} and "
                    f"{other.setting.get(key)!r}. Merge tables of one model, device and setting; build "
                    "others in a file of their own."
                )
        own = {_name(point) for point in self.points}
        # Both for a machine on which the block takes as long.
        slower = self.reference_ms / other.reference_ms if self.reference_ms and other.reference_ms else 1.0
        more = [
            {k: v * slower if k in ("ms", "p25", "p75") else v for k, v in point.items()}
            for point in other.points
            if _name(point) not in own
        ]
        mine = self if self.points else other
        return replace(mine, points=(*self.points, *more), calibration=self.calibration or other.calibration)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON with its checksum.

        Raises:
            OutputError: the place is not writable, or the disk is full.
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
            CheckpointError: the file is missing, damaged, of a newer format, or no latency table.
        """
        value = read_sealed(Path(path))
        if not isinstance(value, dict) or value.get("what") != WHAT:
            raise CheckpointError(f"{path} is no latency table. Give one that slimming latency-table build wrote.")
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
    """Times of one piece over its axes, interpolated linearly between neighbours and never falling with a size."""

    def __init__(self, axes: Sequence[str], points: Sequence[Point]) -> None:
        from scipy.interpolate import RegularGridInterpolator

        values = [sorted({int(point[name]) for point in points}) for name in axes]
        times = np.full([len(each) for each in values], np.nan)
        for point in points:
            times[tuple(each.index(int(point[name])) for each, name in zip(values, axes, strict=True))] = point["ms"]
        if np.isnan(times).any():
            raise PlanError("The latency table is not complete: go on with slimming latency-table build.")
        # A larger layer that seems faster is noise, and a plan must not be led by it.
        for axis in range(times.ndim):
            times = np.maximum.accumulate(times, axis=axis)
        self.moving = [place for place, each in enumerate(values) if len(each) > 1]
        self.fixed = {place: each[0] for place, each in enumerate(values) if len(each) == 1}
        self.axes = axes
        self.one = float(times.reshape(-1)[0])
        if self.moving:
            grid = [values[place] for place in self.moving]
            beyond: Any = None  # goes on along the line of the last two points
            self.at = RegularGridInterpolator(grid, times.squeeze(), bounds_error=False, fill_value=beyond)

    def total(self, rows: Sequence[tuple[int, ...]]) -> float:
        """Sum of the times at several sizes, in milliseconds."""
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


def _check_pieces(anatomy: Anatomy) -> None:
    if not anatomy.pieces:
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
    """Measure the layers of ``model`` on its device, in its data type and with torch's number of threads.

    Args:
        model: a dense model; its weights do not matter.
        batch_size: images per pass.
        runtime: ``"eager"``; ``"compile"`` for `torch.compile` or ``"onnxruntime"``, which take some seconds per point.
        kinds: kinds of units whose number may differ; None takes those that a search takes by default. With ``width`` a
            table has some times more points; one that is there already gets what it lacks.
        uneven_heads: attention is timed with heads of different sizes around each mean, for plans whose layout has
            ``equal_heads`` off; otherwise with heads of one size.
        path: where the table goes, point by point; one that is there already is gone on with.
        seconds: about how long to measure each point.
        say: told what is measured, one line at a time.

    Raises:
        UnsupportedModelError: the model has no pieces, or its heads keep one size.
        ConfigError: there is no such runtime or kind, or the file at ``path`` is of another setting.
    """
    check_runtime(runtime)
    kinds = {name for name, kind in KINDS.items() if not kind.on_request} if kinds is None else kinds
    check_kinds(kinds, ConfigError)
    family = family_of(model)
    model = copy.deepcopy(model).eval()
    anatomy = family.read(model)
    _check_pieces(anatomy)
    moving = {group.name for group in anatomy.groups if group.kind in kinds}
    table = LatencyTable(setting=_setting(model, anatomy, batch_size, runtime, uneven_heads))
    if path is not None and Path(path).exists():
        table = LatencyTable.load(path).merged(table)
    have = {_name(point) for point in table.points}
    left = [(piece, sizes) for piece, sizes in _plan(anatomy, moving) if _name(_point(piece, sizes)) not in have]
    clock = Clock(family, model, anatomy, batch_size, runtime)
    block = clock.reference(max(1.0, 10 * seconds)) if table.reference_ms is None else table.reference_ms
    table = replace(table, reference_ms=block)
    for number, (piece, sizes) in enumerate(left, start=1):
        times = clock.times(family.piece_module(model, piece, sizes, uneven_heads=uneven_heads), seconds, block)
        table = replace(table, points=(*table.points, {**_point(piece, sizes), **times}))
        if say is not None:
            at = ", ".join(f"{name} {size}" for name, size in sizes.items())
            say(f"{number} of {len(left)}: {piece.kind}, {at}: {times['ms']:.3f} ms")
        if path is not None and number % 10 == 0:
            table.save(path)
    if left or table.calibration is None:
        whole = clock.times(Timed(model, anatomy.input_shape), max(1.0, 10 * seconds), block)["ms"]
        table = _calibrated(table, anatomy, whole)
        table = replace(table, multiples=_multiples(clock, family, model, anatomy, 5 * seconds, block))
    if path is not None:
        table.save(path)
    return table


def _largest(anatomy: Anatomy) -> tuple[Piece, dict[str, int]]:
    """The piece with the largest sizes in the dense model, and those sizes."""
    full = {group.name: group.size for group in anatomy.groups}
    every = [(piece, {name: dim.value(full) for name, dim in piece.axes}) for piece in anatomy.pieces]
    return max((each for each in every if each[0].kind != REST), key=lambda each: math.prod(each[1].values()))


def _multiples(
    clock: Clock, family: Family, model: nn.Module, anatomy: Anatomy, seconds: float, block: float
) -> dict[int, float]:
    """How much longer the largest piece takes at about half its size where the size is an odd multiple of 1 … 32."""
    piece, sizes = _largest(anatomy)
    moving = {name: dim for name, dim in piece.axes if dim.groups}
    axis = max(moving, key=lambda name: sizes[name], default=None)
    if axis is None or sizes[axis] < 4 * WHOLE or any(weight > 1 for _, weight in moving[axis].groups):
        return {}
    half = sizes[axis] // (2 * WHOLE) * WHOLE

    def at(size: int) -> float:
        return clock.times(family.piece_module(model, piece, {**sizes, axis: size}), seconds, block)["ms"]

    low, high = at(half), at(half + WHOLE)
    between = {each: low + (high - low) * each / WHOLE for each in MULTIPLES}
    return {**{each: at(half + each) / between[each] for each in MULTIPLES}, WHOLE: 1.0}


def _calibrated(table: LatencyTable, anatomy: Anatomy, whole: float) -> LatencyTable:
    """``table`` such that the dense model takes ``whole`` milliseconds: by its rest, if it has one, and a factor."""
    full = {name: len(units) for name, units in keep_all(anatomy.groups).items()}
    points = [point for point in table.points if point["kind"] != REST]
    for rest in (piece for piece in anatomy.pieces if piece.kind == REST):
        ((axis, elements),) = rest.axes
        others = replace(anatomy, pieces=tuple(piece for piece in anatomy.pieces if piece.kind != REST))
        most = elements.value(full)
        beyond = max(whole - replace(table, calibration=None).predict(others, full), 1e-6)
        for size in (max(1, most // 2), most):  # goes on along this line
            points.append({**_point(rest, {axis: size}), "ms": beyond * size / most})
    table = replace(table, points=tuple(points), calibration=None)
    return replace(table, calibration=whole / table.predict(anatomy, full))


class Clock:
    """Times modules, each in turns with one block of the dense model."""

    def __init__(self, family: Family, model: nn.Module, anatomy: Anatomy, batch_size: int, runtime: str) -> None:
        self.like = next(model.parameters())
        self.batch_size, self.runtime = batch_size, runtime
        block = family.piece_module(model, *_largest(anatomy))
        dtype, device = self.like.dtype, self.like.device
        self.block = _OwnInput(block.module, torch.randn(batch_size, *block.shape, dtype=dtype, device=device))

    def reference(self, seconds: float) -> float:
        """Milliseconds of the block."""
        times = paired_times({"block": self.block}, (1,), 1, runs=100, seconds=seconds, like=self.like)
        return summary(times["block"]).median

    def times(self, timed: Timed, seconds: float, reference_ms: float) -> dict[str, Any]:
        """Median and quartiles of one copy in ``timed``, on a machine whose block takes ``reference_ms``."""
        x = torch.randn(self.batch_size, *timed.shape, dtype=self.like.dtype, device=self.like.device)
        both = {"piece": prepare(timed.module, x, self.runtime), "block": self.block}
        times = paired_times(both, timed.shape, self.batch_size, runs=30, seconds=seconds, like=self.like)
        scaled = [
            own / one * reference_ms / timed.copies for own, one in zip(times["piece"], times["block"], strict=True)
        ]
        found = summary(scaled)
        return {"ms": found.median, "p25": found.p25, "p75": found.p75, "runs": found.runs}


class _OwnInput(nn.Module):
    """A module that always sees the same input, whatever it is given."""

    def __init__(self, module: nn.Module, x: torch.Tensor) -> None:
        super().__init__()
        self.module, self.x = module, x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(self.x)


def _setting(model: nn.Module, anatomy: Anatomy, batch_size: int, runtime: str, uneven_heads: bool) -> dict[str, Any]:
    parameter = next(model.parameters())
    found = machine()
    full = {group.name: group.size for group in anatomy.groups}
    pieces = [(p.kind, p.like, [(name, dim.value(full)) for name, dim in p.axes]) for p in anatomy.pieces]
    return {
        "model": f"{type(model).__name__} {hashlib.sha256(repr(pieces).encode()).hexdigest()[:12]}",
        "device": found["gpu"] if parameter.is_cuda else found["cpu"],
        "threads": None if parameter.is_cuda else torch.get_num_threads(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "runtime": runtime,
        "heads": UNEVEN if uneven_heads else ONE_SIZE,
        "torch": torch.__version__,
    }


def _plan(anatomy: Anatomy, groups: Collection[str]) -> Iterator[tuple[Piece, dict[str, int]]]:
    """Every point of the grid along what ``groups`` change, once per kind of piece."""
    full = {group.name: group.size for group in anatomy.groups}
    seen: set[tuple[str, str]] = set()
    for piece in anatomy.pieces:
        if (piece.kind, piece.like) in seen or piece.kind == REST:
            continue
        seen.add((piece.kind, piece.like))
        axes = []
        for name, dim in piece.axes:
            most = dim.value(full)
            if not any(group in groups for group, _ in dim.groups):
                axes.append([most])
                continue
            moving = most - dim.fixed
            # Heads keep as many dimensions each, a unit all its places; multiples of 8 where that leaves a choice.
            parts = 3 * _heads(piece) if name == "qkv" else math.lcm(*(weight for _, weight in dim.groups))
            step = 1 if name in ("tokens", "heads") else 8
            while step > 1 and moving // (parts * step) < 4:
                step //= 2
            step *= parts
            chosen = {min(moving, max(step, math.ceil(moving * share / step) * step)) for share in STEPS[name]}
            axes.append(sorted(dim.fixed + units for units in chosen))
        for sizes in itertools.product(*axes):
            yield piece, dict(zip((name for name, _ in piece.axes), sizes, strict=True))


def _heads(piece: Piece) -> int:
    return int(piece.like.partition(" ")[0])


def _point(piece: Piece, sizes: Mapping[str, int]) -> Point:
    return {"kind": piece.kind, "like": piece.like, **sizes}


def _name(point: Point) -> tuple[tuple[str, Any], ...]:
    """What tells a point from others: all but its times."""
    return tuple(sorted((k, v) for k, v in point.items() if k not in ("ms", "p25", "p75", "runs")))
