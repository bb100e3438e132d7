"""Norms over features of which some are gone: their mean and variance are those of what stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.core.groups import Group


class MaskedNorm:
    """Forward hook of a LayerNorm: its output as if only ``index`` were there, 0 elsewhere."""

    def __init__(self, index: Tensor) -> None:
        self.index = index

    def __call__(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        index, dim = self.index.to(output.device), feature_dim(module)
        weight, bias = (None if p is None else p[index] for p in (module.weight, module.bias))
        kept = args[0].index_select(dim, index).movedim(dim, -1)
        inside = F.layer_norm(kept, (len(index),), weight, bias, module.eps).movedim(-1, dim)
        return torch.zeros_like(output).index_copy(dim, index, inside.to(output.dtype))


def feature_dim(norm: nn.Module) -> int:
    """The dimension of its input that a LayerNorm is over: 1 in those that hosts make for images (B, C, H, W)."""
    images = "2d" in type(norm).__name__ or getattr(norm, "data_format", "") == "channels_first"
    return 1 if images else -1


def mask_norms(model: nn.Module, group: Group, units: Sequence[int]) -> list[Callable[[], None]]:
    """Let the LayerNorms of ``group`` see ``units`` alone; gives functions that undo it."""
    undo: list[Callable[[], None]] = []
    for one in group.slices:
        owner, _, name = one.tensor.rpartition(".")
        if owner in group.norms and name == "weight":
            hook = MaskedNorm(torch.tensor(sorted(place for unit in units for place in one.index[unit])))
            # In front of other hooks, which change what the norm gives.
            undo.append(model.get_submodule(owner).register_forward_hook(hook, prepend=True).remove)
    return undo
