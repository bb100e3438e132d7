"""What runs a model: the same numbers whoever does, and clear errors."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import slimming
from slimming.benchmarking.config import BenchConfig
from slimming.benchmarking.runtimes import prepare
from slimming.benchmarking.timing import paired_times
from slimming.core.budget import Budget
from slimming.core.layout import FREE
from slimming.errors import ConfigError, MissingExtraError, UnsupportedModelError
from slimming.masks.attachment import prunable
from variants import VARIANTS


@pytest.mark.parametrize("layout", [slimming.Layout(), FREE], ids=("alike", "free"))
def test_onnx_runtime_says_what_pytorch_says(layout: slimming.Layout) -> None:
    model = VARIANTS[0].make().float().eval()
    masks = slimming.attach(model)
    for mask in masks.values():
        nn.init.uniform_(mask)
    small = slimming.cut(model, slimming.plan(masks, Budget(macs=0.6), layout=layout, score="mask")).eval()
    x = torch.randn(2, *prunable(small).anatomy.input_shape)
    (found,) = prepare(small, x, "onnxruntime")(x)
    with torch.no_grad():
        assert torch.allclose(found, small(x), atol=1e-5)
    assert prepare(small, x, "eager") is small
    both = paired_times({"a": small}, x.shape[1:], 2, runs=5, seconds=0.01, runtime="onnxruntime")
    assert all(ms > 0 for ms in both["a"])


class _Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if float(x.sum()) > 0 else x


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 4)
    with pytest.raises(UnsupportedModelError, match=r"_Undecided cannot be exported .* runtime eager"):
        prepare(_Undecided(), x, "onnxruntime")
    with pytest.raises(ConfigError, match=r"runtimes are eager, compile, onnxruntime\. Did you mean 'onnxruntime'"):
        BenchConfig(runtime="onnx-runtime")
    gone: Any = None
    monkeypatch.setitem(sys.modules, "onnxruntime", gone)
    with pytest.raises(MissingExtraError, match=r"pip install 'slimming\[onnx\]'"):
        BenchConfig(runtime="onnxruntime")


def test_every_size_of_a_class_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch compiles eight of them, and runs the others in eager mode without a word on how fast that is."""
    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    with torch._dynamo.config.patch(recompile_limit=8):
        models = {size: prepare(_Sized(size), torch.randn(1, size), "compile") for size in range(1, 13)}
        assert torch._dynamo.config.recompile_limit == 8
    assert graphs.frame_count == len(models)
    with torch.no_grad():
        for size, model in models.items():
            model.eval()(torch.randn(1, size))
    assert graphs.frame_count == len(models)


class _Sized(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)
