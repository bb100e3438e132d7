"""Run one module of a model by itself, with the arguments of its first call in the model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from slimming.core.example_inputs import ExampleCall
from slimming.models.traced.verification import Pass

PART = "part"
"""Name of the module in `SingleModule`."""


class SingleModule(nn.Module):
    """A module as a model of its own, which returns the first of its outputs.

    Others, such as weights that are averaged over the heads, may not be used; a proof on the whole model shows it.

    Args:
        part: the module.
    """

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.part(*args, **kwargs)
        while isinstance(out, (tuple, list)):
            out = out[0]
        return out


def first_calls(model: nn.Module, names: Collection[str], forward: Pass) -> dict[str, Pass]:
    """The first call of each module in ``names`` in the forward pass ``forward``, in order; not of those not called."""
    calls: dict[str, Pass] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.setdefault(name, Pass(ExampleCall(args, kwargs)))

        return note

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        with torch.no_grad():
            forward.outputs(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls
