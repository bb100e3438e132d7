"""The settings of a benchmark. Imports no PyTorch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass

from slimming.benchmarking.runtimes import check_runtime
from slimming.core.argument_types import check_fields
from slimming.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How latency is measured.

    Attributes:
        batch_sizes: images per forward pass.
        runs: largest number of timed rounds; within a round, all models are measured one after the other.
        seconds: approximate time to measure each model at each batch size.
        runtime: one of `slimming.benchmarking.runtimes.RUNTIMES`: ``"eager"``, ``"compile"`` or ``"onnxruntime"``.

    Raises:
        ConfigError: a number is out of range, or there is no such runtime.
        MissingExtraError: the runtime is not installed.
    """

    batch_sizes: tuple[int, ...] = (1, 32)
    runs: int = 30
    seconds: float = 2.0
    runtime: str = "eager"

    def __post_init__(self) -> None:
        check_fields(self)
        check_runtime(self.runtime)
        if self.runs < 1 or self.seconds <= 0 or min(self.batch_sizes, default=0) < 1:
            raise ConfigError(
                "bench.runs must be at least 1, bench.batch_sizes one number or more of at least 1, and bench.seconds "
                "above 0."
            )
