"""The settings of a benchmark and the names of the runtimes. Imports no PyTorch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass

from slimming.errors import ConfigError, MissingExtraError, nearest

RUNTIMES = ("eager", "compile", "onnxruntime")
"""Ways to run a model: PyTorch, `torch.compile`, ONNX Runtime; see `slimming.benchmarking.runtimes`."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How time is measured.

    Attributes:
        batch_sizes: images per forward pass.
        runs: timed rounds at the most; dense and slim models take turns within each.
        seconds: about how long to measure each model at each batch size.
        runtime: what runs the models: ``"eager"``, ``"compile"`` (`torch.compile`) or ``"onnxruntime"``.

    Raises:
        ConfigError: a number below 1, or there is no such runtime.
        MissingExtraError: what runs it is not installed.
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
    """Raise ConfigError if there is no runtime called ``name``, MissingExtraError if its library is not installed."""
    if name not in RUNTIMES:
        raise ConfigError(f"There is no runtime {name!r}; runtimes are {', '.join(RUNTIMES)}.{nearest(name, RUNTIMES)}")
    if name == "onnxruntime":
        check_onnx()


def check_onnx() -> None:
    """Raise MissingExtraError if what writes and runs ONNX is not installed."""
    try:
        import onnxruntime  # pyright: ignore # noqa: F401
        import onnxscript  # pyright: ignore # noqa: F401
    except ImportError as error:
        raise MissingExtraError("ONNX Runtime is not installed: pip install 'slimming[onnx]'.") from error
