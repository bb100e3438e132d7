"""Models in other runtimes as modules: compiled by `torch.compile`, or exported to ONNX and run by ONNX Runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimming.benchmarking.programs import onnx_feed, open_onnx, write_onnx
from slimming.core.example_inputs import ExampleCall
from slimming.core.modules import in_evaluation


def compiled(model: nn.Module, call: ExampleCall) -> nn.Module:
    """``model`` compiled for inputs of the shapes of ``call``, in evaluation mode without gradients.

    Shapes are static, since a graph for dynamic shapes would be slower than what users compile. Modules of one class
    with different sizes each need their own graph, and beyond a few graphs PyTorch silently falls back to eager mode;
    the limits are therefore raised for this call.
    """
    compiled: Any = torch.compile(model, dynamic=False)
    limits: Any = torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=100_000)
    with limits, in_evaluation(model), torch.no_grad():
        call.run(compiled)
    return compiled


class OnnxRuntime(nn.Module):
    """A model exported to ONNX, run with the same number of threads as PyTorch."""

    def __init__(self, model: nn.Module, call: ExampleCall) -> None:
        super().__init__()
        provider = "CUDAExecutionProvider" if call.main.is_cuda else "CPUExecutionProvider"
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "model.onnx"
            write_onnx(model, call, file)
            self.session = open_onnx(file, provider)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Run the model; the outputs are on the CPU."""
        feed = onnx_feed(self.session, ExampleCall(args, kwargs))
        return tuple(torch.from_numpy(out) for out in self.session.run(None, feed))
