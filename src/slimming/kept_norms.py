"""Norms over features of which some are gone: their mean and variance are those of what stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeptNorm:
    """Forward hook of a LayerNorm: its output as if only ``index`` were there, 0 elsewhere."""

    def __init__(self, index: Tensor) -> None:
        self.index = index

    def __call__(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        index = self.index.to(output.device)
        weight, bias = (None if p is None else p[index] for p in (module.weight, module.bias))
        inside = F.layer_norm(args[0][..., index], (len(index),), weight, bias, module.eps)
        return torch.zeros_like(output).index_copy(-1, index, inside.to(output.dtype))


def keep_in_norms(model: nn.Module, norms: Sequence[str], units: Sequence[int]) -> list[Callable[[], None]]:
    """Let the LayerNorms called ``norms`` see ``units`` alone; gives functions that undo it."""
    hook = KeptNorm(torch.tensor(list(units)))
    # In front of other hooks, which change what the norm gives.
    return [model.get_submodule(name).register_forward_hook(hook, prepend=True).remove for name in norms]
