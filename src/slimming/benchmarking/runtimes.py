"""What runs a model: PyTorch as it is, `torch.compile`, or ONNX Runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimming.benchmarking.programs import check_onnx, open_onnx, write_onnx
from slimming.core.modules import in_evaluation
from slimming.errors import ConfigError, nearest

RUNTIMES = ("eager", "compile", "onnxruntime")


def check_runtime(name: str) -> None:
    """Raise ConfigError if there is no runtime called ``name``, MissingExtraError if its library is not installed."""
    if name not in RUNTIMES:
        raise ConfigError(f"There is no runtime {name!r}; runtimes are {', '.join(RUNTIMES)}.{nearest(name, RUNTIMES)}")
    if name == "onnxruntime":
        check_onnx()


def prepare(model: nn.Module, x: Tensor, runtime: str) -> nn.Module:
    """``model`` in evaluation mode as ``runtime`` runs it, for inputs like ``x``.

    Args:
        model: any module; it is not changed.
        x: an input of the batch size, type and device that it will get.
        runtime: one of `RUNTIMES`.

    Raises:
        ConfigError: there is no such runtime, or it cannot run where ``x`` is.
        MissingExtraError: it is not installed.
        UnsupportedModelError: the model cannot be exported.
    """
    check_runtime(runtime)
    if runtime == "eager":
        return model
    if runtime == "compile":
        return _compiled(model, x)
    return _OnnxRuntime(model, x)


def _compiled(model: nn.Module, x: Tensor) -> nn.Module:
    """``model`` compiled for inputs of the shape of ``x``, in evaluation mode without gradients.

    One graph for any shape would be slower than those that users compile. Each size of a class is a graph of its own,
    and beyond a few of them PyTorch would go back to eager unseen; so the limits are out of the way for this one call.
    """
    compiled: Any = torch.compile(model, dynamic=False)
    limits: Any = torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=100_000)
    with limits, in_evaluation(model), torch.no_grad():
        compiled(x)
    return compiled


class _OnnxRuntime(nn.Module):
    """A model exported to ONNX in memory, run with as many threads as PyTorch has."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        provider = "CUDAExecutionProvider" if x.is_cuda else "CPUExecutionProvider"
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "model.onnx"
            write_onnx(model, x, file)
            self.session = open_onnx(file, provider)
        self.name = self.session.get_inputs()[0].name

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run; outputs lie on the CPU."""
        return tuple(torch.from_numpy(out) for out in self.session.run(None, {self.name: x.detach().cpu().numpy()}))
