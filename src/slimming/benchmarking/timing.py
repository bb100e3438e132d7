"""Measuring what a model really costs: counted operations, peak memory, latency."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimming.benchmarking.runtimes import prepare
from slimming.core.modules import in_evaluation


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one forward pass.

    Attributes:
        median: milliseconds.
        p25: milliseconds of the first quartile.
        p75: milliseconds of the third quartile.
        runs: number of timed blocks.
    """

    median: float
    p25: float
    p75: float
    runs: int

    def to_dict(self) -> dict[str, float | int]:
        """The numbers as JSON takes them."""
        return asdict(self)


@torch.no_grad()
def paired_times(
    models: Mapping[str, nn.Module],
    input_shape: Sequence[int],
    batch_size: int,
    *,
    runs: int = 20,
    seconds: float = 2.0,
    like: Tensor | None = None,
    runtime: str = "eager",
) -> dict[str, list[float]]:
    """Milliseconds per forward pass of each model, measured in turns: entry i of all lists is round i.

    The input is of the type and on the device of ``like``, by default of the model's first parameter; ``runtime`` is
    one of `slimming.benchmarking.runtimes.RUNTIMES`.
    """
    inputs = {}
    for name, model in models.items():
        parameter = next(model.parameters()) if like is None else like
        inputs[name] = torch.randn(batch_size, *input_shape, device=parameter.device, dtype=parameter.dtype)
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(in_evaluation(model))
        return _in_turns(models, inputs, runs=runs, seconds=seconds, runtime=runtime)


def _in_turns(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], *, runs: int, seconds: float, runtime: str
) -> dict[str, list[float]]:
    models = {name: prepare(model, inputs[name], runtime) for name, model in models.items()}
    # Two passes to warm up; the second tells how many passes make a block long enough for the clock.
    warm = {name: [_seconds(model, inputs[name], 1) for _ in range(2)][-1] for name, model in models.items()}
    rounds = max(5, min(runs, int(seconds * len(models) / max(sum(warm.values()), 1e-9))))
    passes = {name: max(1, round(0.005 / one)) for name, one in warm.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(_seconds(model, inputs[name], passes[name]) * 1e3)
    return times


def _seconds(model: nn.Module, x: Tensor, passes: int) -> float:
    """Seconds per pass over ``passes`` passes in a row, waiting for a GPU to finish."""
    wait = _nothing if x.device.type == "cpu" else partial(torch.accelerator.synchronize, x.device)
    wait()
    began = time.perf_counter()
    for _ in range(passes):
        model(x)
    wait()
    return (time.perf_counter() - began) / passes


def _nothing() -> None:
    """A CPU is done when the call returns."""


def summary(values: Sequence[float]) -> Latency:
    """Median and quartiles of times in milliseconds."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return Latency(median=statistics.median(values), p25=quartiles[0], p75=quartiles[2], runs=len(values))


def speedup(dense: Sequence[float], slim: Sequence[float]) -> dict[str, float]:
    """How many times faster: median and quartiles of the ratio round by round."""
    ratios = [before / after for before, after in zip(dense, slim, strict=True)]
    found = summary(ratios)
    return {"median": found.median, "p25": found.p25, "p75": found.p75}


def machine() -> dict[str, Any]:
    """The machine at hand, as reports print it."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": f"{platform.system()} {platform.release()}",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
