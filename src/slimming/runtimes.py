"""What runs a model: PyTorch as it is, `torch.compile`, or ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimming.errors import ConfigError, UnsupportedModelError, nearest

RUNTIMES = ("eager", "compile", "onnxruntime")


def check_runtime(name: str) -> None:
    """Raise ConfigError if there is no runtime called ``name``, or its library is not installed."""
    if name not in RUNTIMES:
        raise ConfigError(f"There is no runtime {name!r}; runtimes are {', '.join(RUNTIMES)}.{nearest(name, RUNTIMES)}")
    if name == "onnxruntime":
        try:
            import onnxruntime  # pyright: ignore # noqa: F401
            import onnxscript  # pyright: ignore # noqa: F401
        except ImportError as error:
            raise ConfigError("ONNX Runtime is not installed: pip install 'slimming[onnx]'.") from error


def prepare(model: nn.Module, x: Tensor, runtime: str) -> nn.Module:
    """``model`` in evaluation mode as ``runtime`` runs it, for inputs like ``x``.

    Args:
        model: any module; it is not changed.
        x: an input of the batch size, type and device that it will get.
        runtime: one of `RUNTIMES`.

    Raises:
        ConfigError: there is no such runtime, or it is not installed, or it cannot run where ``x`` is.
        UnsupportedModelError: the model cannot be exported.
    """
    check_runtime(runtime)
    if runtime == "eager":
        return model
    if runtime == "compile":
        # Every model has its own shapes; a graph for any shape would be slower than those that users compile.
        # One class with many sizes would go back to eager after a few of them, and nobody would know.
        settings: Any = torch._dynamo.config
        settings.recompile_limit = max(settings.recompile_limit, 10_000)
        settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 100_000)
        compiled: Any = torch.compile(model, dynamic=False)
        return compiled
    return _OnnxRuntime(model, x)


class _OnnxRuntime(nn.Module):
    """A model exported to ONNX in memory, run with as many threads as PyTorch has."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        import onnxruntime as ort  # pyright: ignore

        provider = "CUDAExecutionProvider" if x.is_cuda else "CPUExecutionProvider"
        if provider not in ort.get_available_providers():
            raise ConfigError(f"This ONNX Runtime has no {provider}: install onnxruntime-gpu, or measure on the CPU.")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "model.onnx"
            _export(model, x, file)
            self.session = ort.InferenceSession(file, options, providers=[provider])
        self.name = self.session.get_inputs()[0].name

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run; outputs lie on the CPU."""
        return tuple(torch.from_numpy(out) for out in self.session.run(None, {self.name: x.detach().cpu().numpy()}))


def _export(model: nn.Module, x: Tensor, file: Path) -> None:
    # The exporter tells every step on stdout, and of deprecations inside PyTorch itself.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
            assert program is not None
            program.save(file)
        except Exception as error:  # the exporter raises whatever it meets
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            first = (str(cause).splitlines() or [""])[0][:200]
            raise UnsupportedModelError(
                f"This {type(model).__name__} cannot be exported to ONNX ({type(cause).__name__}: {first}). "
                "Measure with runtime eager."
            ) from error
