"""Measure the latency of models, one after the other in each round, and describe the machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimming.benchmarking.runtimes import prepare
from slimming.core.example_inputs import ExampleCall, image_call
from slimming.core.modules import in_evaluation


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one forward pass.

    Attributes:
        median: median in milliseconds.
        p25: first quartile in milliseconds.
        p75: third quartile in milliseconds.
        runs: number of measurements.
    """

    median: float
    p25: float
    p75: float
    runs: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the numbers as JSON values."""
        return asdict(self)


@torch.no_grad()
def paired_times(
    models: Mapping[str, nn.Module],
    example: Sequence[int] | ExampleCall,
    batch_size: int,
    *,
    runs: int = 20,
    seconds: float = 2.0,
    like: Tensor | None = None,
    runtime: str = "eager",
) -> dict[str, list[float]]:
    """Return the milliseconds per forward pass of each model by round, in which all models are measured in turn.

    Args:
        models: models by name.
        example: channels, height and width of an image, or an example call of the models.
        batch_size: images per forward pass.
        runs: largest number of rounds; at least 5 are measured.
        seconds: approximate time to measure each model.
        like: tensor with the dtype and device of the input; by default the first parameter of the model.
        runtime: one of `slimming.benchmarking.runtimes.RUNTIMES`.
    """
    call = (example if isinstance(example, ExampleCall) else image_call(example)).with_batch(batch_size)
    inputs = {}
    for name, model in models.items():
        parameter = next(model.parameters()) if like is None else like
        inputs[name] = call.to(parameter.dtype, parameter.device)
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(in_evaluation(model))
        return _measure(models, inputs, runs=runs, seconds=seconds, runtime=runtime)


def _measure(
    models: Mapping[str, nn.Module], inputs: Mapping[str, ExampleCall], *, runs: int, seconds: float, runtime: str
) -> dict[str, list[float]]:
    models = {name: prepare(model, inputs[name], runtime) for name, model in models.items()}
    # Two passes to warm up. From the second follows how many passes take 5 ms, which the clock measures well.
    warm = {name: [_seconds(model, inputs[name], 1) for _ in range(2)][-1] for name, model in models.items()}
    rounds = max(5, min(runs, int(seconds * len(models) / max(sum(warm.values()), 1e-9))))
    passes = {name: max(1, round(0.005 / pass_seconds)) for name, pass_seconds in warm.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(_seconds(model, inputs[name], passes[name]) * 1e3)
    return times


def _seconds(model: nn.Module, call: ExampleCall, passes: int) -> float:
    """Mean seconds per pass over ``passes`` passes, including the synchronisation of a GPU."""
    device = call.main.device
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(passes):
        call.run(model)
    _synchronize(device)
    return (time.perf_counter() - began) / passes


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def summary(values: Sequence[float]) -> Latency:
    """Return the median and quartiles of times in milliseconds."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return Latency(median=statistics.median(values), p25=quartiles[0], p75=quartiles[2], runs=len(values))


def speedup(dense: Sequence[float], slim: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of the ratio of dense to slim time, taken round by round."""
    ratios = [before / after for before, after in zip(dense, slim, strict=True)]
    ratio = summary(ratios)
    return {"median": ratio.median, "p25": ratio.p25, "p75": ratio.p75}


def machine() -> dict[str, Any]:
    """Return a description of this machine for reports."""
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
