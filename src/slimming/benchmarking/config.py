"""The settings of a benchmark and the names of the runtimes. Imports no PyTorch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass

from slimming.errors import ConfigError, MissingExtraError, nearest

RUNTIMES = ("eager", "compile", "onnxruntime")
"""Ways to run a model: PyTorch, `torch.compile`, ONNX Runtime; see `slimming.benchmarking.runtimes`."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How latency is measured.

    Attributes:
        batch_sizes: images per forward pass.
        runs: largest number of timed rounds; within a round, all models are measured one after the other.
        seconds: approximate time to measure each model at each batch size.
        runtime: ``"eager"``, ``"compile"`` (`torch.compile`) or ``"onnxruntime"``.

    Raises:
        ConfigError: a number is out of range, or there is no such runtime.
        MissingExtraError: the runtime is not installed.
    """

    batch_sizes: tuple[int, ...] = (1, 32)
    runs: int = 30
    seconds: float = 2.0
    runtime: str = "eager"

    def __post_init__(self) -> None:
        check_runtime(self.runtime)
        if self.runs < 1 or self.seconds <= 0 or min(self.batch_sizes, default=0) < 1:
            raise ConfigError(
                "bench.runs must be at least 1, bench.batch_sizes one number or more of at least 1, and bench.seconds "
                "above 0."
            )


def check_runtime(name: str) -> None:
    """Check that there is a runtime called ``name`` and that its library is installed.

    Raises:
        ConfigError: there is no such runtime.
        MissingExtraError: its library is not installed.
    """
    if name not in RUNTIMES:
        raise ConfigError(f"There is no runtime {name!r}; runtimes are {', '.join(RUNTIMES)}.{nearest(name, RUNTIMES)}")
    if name == "onnxruntime":
        check_onnx()


def check_onnx() -> None:
    """Check that the libraries that write and run ONNX are installed.

    Raises:
        MissingExtraError: one is not.
    """
    try:
        import onnxruntime  # pyright: ignore # noqa: F401
        import onnxscript  # pyright: ignore # noqa: F401
    except ImportError as error:
        raise MissingExtraError("ONNX Runtime is not installed: pip install 'slimming[onnx]'.") from error
