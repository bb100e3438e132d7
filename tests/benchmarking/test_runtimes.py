"""What runs a model: the same numbers whoever does, and clear errors."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
