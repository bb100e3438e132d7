"""Measure latency tables: time the layers of a model at a grid of sizes on the device at hand."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimming.benchmarking.runtimes import check_runtime, prepare
from slimming.benchmarking.timing import machine, paired_times, summary
from slimming.core.argument_types import checked_arguments
from slimming.core.copies import copied
from slimming.core.files import exclusive_file
from slimming.core.groups import REST, Anatomy, TimedLayer, keep_all
from slimming.core.kinds import KINDS, check_kinds
from slimming.errors import ConfigError
from slimming.models.family import TimedModule, TimedModules
from slimming.models.prunable import read
from slimming.planning.latency_table import ONE_SIZE, UNEVEN, LatencyTable, Point, check_timed_layers, point_key

STEPS: Mapping[str, Sequence[float]] = {
    "tokens": (0.05, 0.25, 0.5, 0.75, 1.0),
    "width": (0.25, 0.5, 0.75, 1.0),
    "qkv": (0.125, 0.25, 0.375, 0.5, 0.75, 1.0),
    "dims": (0.125, 0.25, 0.375, 0.5, 0.75, 1.0),
    "hidden": (0.02, 0.125, 0.25, 0.5, 0.75, 1.0),
    "heads": (0.01, 0.5, 1.0),
    "out": (0.25, 0.5, 1.0),
    "in": (0.25, 0.5, 1.0),
    "channels": (0.25, 1.0),
}
"""Points of the grid along each axis, as shares of the size in the dense model."""
MULTIPLES, WHOLE = (1, 2, 4, 8, 16, 32), 64
"""Multiples to measure, and the multiple with which they are compared."""
Log = Callable[[str], None]


@checked_arguments
def build_latency_table(
    model: nn.Module,
    *,
    batch_size: int = 1,
    runtime: str = "eager",
    kinds: Collection[str] | None = None,
    uneven_heads: bool = False,
    path: str | Path | None = None,
    seconds: float = 0.15,
    log: Log | None = None,
) -> LatencyTable:
    """Measure the layers of ``model`` on its device, in its dtype, with the current number of threads.

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
        log: receives one line per point.

    Raises:
        UnsupportedModelError: the model has no timed layers, or its heads keep one size.
        ConfigError: there is no such runtime or kind, or the file at ``path`` is of another setting.
        OutputError: another process builds the table at ``path``, or it is not writable.
    """
    check_runtime(runtime)
    kinds = {name for name, kind in KINDS.items() if not kind.on_request} if kinds is None else kinds
    check_kinds(kinds, ConfigError)
    prunable = read(copied(model).eval())
    model, anatomy = prunable.model, prunable.anatomy
    check_timed_layers(anatomy)
    even = prunable.family.timed_modules(model, anatomy)
    timed = prunable.family.timed_modules(model, anatomy, uneven_heads=True) if uneven_heads else even
    moving = {group.name for group in anatomy.groups if group.kind in kinds}
    with exclusive_file(Path(path)) if path is not None else nullcontext():
        table = LatencyTable(setting=_setting(model, anatomy, batch_size, runtime, uneven_heads))
        if path is not None and Path(path).exists():
            table = LatencyTable.load(path).merged(table)
        known = {point_key(point) for point in table.points}
        missing = [
            (layer, sizes)
            for layer, sizes in grid_points(anatomy, moving)
            if point_key(_point(layer, sizes)) not in known
        ]
        clock = Clock(even(*_largest(anatomy)), next(model.parameters()), batch_size, runtime)
        block = clock.reference(max(1.0, 10 * seconds)) if table.reference_ms is None else table.reference_ms
        table = replace(table, reference_ms=block)
        for number, (layer, sizes) in enumerate(missing, start=1):
            times = clock.times(timed(layer, sizes), seconds, block)
            table = replace(table, points=(*table.points, {**_point(layer, sizes), **times}))
            if log is not None:
                at = ", ".join(f"{name} {size}" for name, size in sizes.items())
                log(f"{number} of {len(missing)}: {layer.kind}, {at}: {times['ms']:.3f} ms")
            if path is not None and number % 10 == 0:
                table.save(path)
        if missing or table.calibration is None:
            whole = clock.times(TimedModule(model, anatomy.input_shape), max(1.0, 10 * seconds), block)["ms"]
            table = calibrated(table, anatomy, whole)
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
    """Times of the largest layer at odd multiples of 1 … 32 near half its size, relative to multiples of 64."""
    layer, sizes = _largest(anatomy)
    moving = {name: dim for name, dim in layer.axes if dim.groups and name != "tokens"}
    axis = max(moving, key=lambda name: sizes[name], default=None)
    if axis is None or sizes[axis] < 4 * WHOLE or any(weight > 1 for _, weight in moving[axis].groups):
        return {}
    half = sizes[axis] // (2 * WHOLE) * WHOLE

    def at(size: int) -> float:
        return clock.times(timed(layer, {**sizes, axis: size}), seconds, block)["ms"]

    low, high = at(half), at(half + WHOLE)
    interpolated = {multiple: low + (high - low) * multiple / WHOLE for multiple in MULTIPLES}
    return {**{multiple: at(half + multiple) / interpolated[multiple] for multiple in MULTIPLES}, WHOLE: 1.0}


def calibrated(table: LatencyTable, anatomy: Anatomy, whole: float) -> LatencyTable:
    """``table`` scaled so that the prediction for the dense model is ``whole`` milliseconds.

    The difference is divided among the timed layers `REST` by their elements if the model has any; otherwise all times
    are scaled by a factor.
    """
    full = {name: len(units) for name, units in keep_all(anatomy.groups).items()}
    points = [point for point in table.points if point["kind"] != REST]
    rests = [layer for layer in anatomy.timed_layers if layer.kind == REST]
    if rests:
        others = replace(anatomy, timed_layers=tuple(layer for layer in anatomy.timed_layers if layer.kind != REST))
        beyond = max(whole - replace(table, calibration=None).predict(others, full), 1e-6)
        most = [{name: dim.value(full) for name, dim in rest.axes} for rest in rests]
        per_element = beyond / sum(math.prod(sizes.values()) for sizes in most)
        for rest, sizes in zip(rests, most, strict=True):
            # Two points along each axis define a product of lines.
            for size in itertools.product(*({max(1, size // 2), size} for size in sizes.values())):
                point = _point(rest, dict(zip(sizes, size, strict=True)))
                points.append({**point, "ms": per_element * math.prod(size)})
    table = replace(table, points=tuple(points), calibration=None)
    return replace(table, calibration=whole / table.predict(anatomy, full))


class Clock:
    """Times modules, alternating with one block of the dense model as the reference.

    Args:
        block: the reference block.
        like: a tensor with the device and dtype of the model.
        batch_size: images per forward pass.
        runtime: see `build_latency_table`.
    """

    def __init__(self, block: TimedModule, like: torch.Tensor, batch_size: int, runtime: str) -> None:
        self.like, self.batch_size, self.runtime = like, batch_size, runtime
        dtype, device = like.dtype, like.device
        self.block = _OwnInput(block.module, torch.randn(batch_size, *block.shape, dtype=dtype, device=device))

    def reference(self, seconds: float) -> float:
        """Return the milliseconds of the reference block."""
        times = paired_times({"block": self.block}, (1,), 1, runs=100, seconds=seconds, like=self.like)
        return summary(times["block"]).median

    def times(self, timed: TimedModule, seconds: float, reference_ms: float) -> dict[str, Any]:
        """Return median and quartiles of one copy in ``timed``, scaled to a reference block of ``reference_ms``."""
        x = torch.randn(self.batch_size, *timed.shape, dtype=self.like.dtype, device=self.like.device)
        both = {"layer": prepare(timed.module, x, self.runtime), "block": self.block}
        times = paired_times(both, timed.shape, self.batch_size, runs=30, seconds=seconds, like=self.like)
        scaled = [
            layer_ms / block_ms * reference_ms / timed.copies
            for layer_ms, block_ms in zip(times["layer"], times["block"], strict=True)
        ]
        latency = summary(scaled)
        return {"ms": latency.median, "p25": latency.p25, "p75": latency.p75, "runs": latency.runs}


class _OwnInput(nn.Module):
    """A module that always gets the same input and ignores the given one."""

    def __init__(self, module: nn.Module, x: torch.Tensor) -> None:
        super().__init__()
        self.module, self.x = module, x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(self.x)


def _setting(model: nn.Module, anatomy: Anatomy, batch_size: int, runtime: str, uneven_heads: bool) -> dict[str, Any]:
    parameter = next(model.parameters())
    hardware = machine()
    full = {group.name: group.size for group in anatomy.groups}
    layers = [(p.kind, p.like, [(name, dim.value(full)) for name, dim in p.axes]) for p in anatomy.timed_layers]
    return {
        "model": f"{type(model).__name__} {hashlib.sha256(repr(layers).encode()).hexdigest()[:12]}",
        "device": hardware["gpu"] if parameter.is_cuda else hardware["cpu"],
        "threads": None if parameter.is_cuda else torch.get_num_threads(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "runtime": runtime,
        "heads": UNEVEN if uneven_heads else ONE_SIZE,
        "torch": torch.__version__,
    }


def grid_points(anatomy: Anatomy, groups: Collection[str]) -> Iterator[tuple[TimedLayer, dict[str, int]]]:
    """All grid points of each distinct layer, along the axes whose sizes depend on ``groups``."""
    full = {group.name: group.size for group in anatomy.groups}
    seen: set[tuple[str, str]] = set()
    for layer in anatomy.timed_layers:
        if (layer.kind, layer.like) in seen or layer.kind == REST:
            continue
        seen.add((layer.kind, layer.like))
        axes = []
        for name, dim in layer.axes:
            most = dim.value(full)
            names = {group for group, _ in dim.groups}
            # Fewer heads have fewer dimensions.
            sites = {anatomy.group(group).site for group in names if anatomy.group(group).kind == "head_dim"}
            names |= {group.name for group in anatomy.groups if group.site in sites and group.kind == "head"}
            if not names.intersection(groups):
                axes.append([most])
                continue
            moving = most - dim.fixed
            # All heads keep equally many dimensions. Sizes are multiples of 8 if that leaves at least four of them.
            parts = math.lcm(*(weight for _, weight in dim.groups))
            if name == "qkv":
                parts = 3 * _heads(layer)
            elif name == "dims":
                parts = len(anatomy.group(dim.groups[0][0]).limits.parts)
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
