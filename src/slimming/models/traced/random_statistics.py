"""Statistics of BatchNorms that suit random weights, so that rounding stays small in a model with random weights.

Statistics that were drawn without looking at what they normalise let activations grow from layer to layer. Where a gate
or a softmax follows, the last digit of a weight then decides about the output, and no comparison proves anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.example_inputs import ExampleCall
from slimming.models.traced.verification import Pass

VALUES = 4
"""Fewest values that batch statistics are taken over. Two values always become -1 and 1, with no gradient."""


@torch.no_grad()
def fit_statistics_(model: nn.Module, passes: Sequence[Pass]) -> None:
    """Scale the running statistics of each norm to the tensors that it is given in ``passes``, in their order.

    The statistics of a layer keep their ratios, and what comes out of the layer has about the size of its weights.
    """

    def fit(norm: Any, x: Tensor) -> None:
        size = float(x.var(correction=0)) / float(norm.running_var.mean())
        if size > 0:
            norm.running_var.mul_(size)
            if isinstance(norm._buffers.get("running_mean"), Tensor):
                norm.running_mean.mul_(size**0.5)

    with _inputs_of_norms(model, fit):
        for forward in passes:
            forward.outputs(model)


@torch.no_grad()
def with_enough_values(model: nn.Module, call: ExampleCall) -> ExampleCall:
    """``call`` for at least two examples, and as many that batch statistics are taken over at least `VALUES` values."""
    values: list[int] = []
    with _inputs_of_norms(model, lambda _, x: values.append(x.numel() // x.shape[1] // call.size)):
        Pass(call).outputs(model)
    least = max(1, min(values, default=VALUES))
    return call.with_batch(max(call.size, 2, -(-VALUES // least)))


@contextmanager
def _inputs_of_norms(model: nn.Module, use: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Call ``use`` with each module that has running statistics and with the tensor that it is given."""

    def run(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].dim() > 1:
            use(module, args[0])

    handles = [
        module.register_forward_pre_hook(run)
        for module in model.modules()
        if isinstance(module._buffers.get("running_var"), Tensor)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
