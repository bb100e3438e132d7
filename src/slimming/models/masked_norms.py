"""Mask LayerNorms: compute mean and variance over the kept features only, as the norms of a cut model do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.core.groups import Group


class MaskedNorm:
    """Forward hook of a LayerNorm that normalises over the features ``index`` and returns 0 for all others."""

    def __init__(self, index: Tensor) -> None:
        self.index = index

    def __call__(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        index, dim = self.index.to(output.device), feature_dim(module)
        weight, bias = (None if p is None else p[index] for p in (module.weight, module.bias))
        kept = args[0].index_select(dim, index).movedim(dim, -1)
        inside = F.layer_norm(kept, (len(index),), weight, bias, module.eps).movedim(-1, dim)
        return torch.zeros_like(output).index_copy(dim, index, inside.to(output.dtype))


def feature_dim(norm: nn.Module) -> int:
    """The dimension over which a LayerNorm normalises: 1 in the hosts' classes for images (B, C, H, W), else -1."""
    images = "2d" in type(norm).__name__ or getattr(norm, "data_format", "") == "channels_first"
    return 1 if images else -1


def mask_norms(model: nn.Module, group: Group, units: Sequence[int]) -> list[Callable[[], None]]:
    """Mask the LayerNorms of ``group``, so that they normalise over ``units`` only.

    Returns:
        Functions that remove the masks.
    """
    undo: list[Callable[[], None]] = []
    for part in group.slices:
        owner, _, name = part.tensor.rpartition(".")
        if owner in group.norms and name == "weight":
            hook = MaskedNorm(torch.tensor(sorted(index for unit in units for index in part.index[unit])))
            # Before other hooks, which must get the masked output.
            undo.append(model.get_submodule(owner).register_forward_hook(hook, prepend=True).remove)
    return undo
