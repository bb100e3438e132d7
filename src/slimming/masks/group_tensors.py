"""Tensors of a group: the norms of its weights, and the scales of its BatchNorms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimming.core.groups import SIDES, Group
from slimming.masks.parametrization import flat, original


def weight_norms(model: nn.Module, group: Group, device: torch.device) -> Tensor:
    """Return, per unit, the product over its sides of the norm of its slices; ones for tokens. Shape (size,)."""
    squares: dict[str, Tensor] = {}
    for slices in group.slices:
        if is_buffer(model, slices.tensor):
            continue
        tensor = original(model, slices.tensor).float()
        each = tensor.square().movedim(slices.dim, 0).flatten(1).sum(1) if tensor.dim() > 1 else tensor.square()
        owners, places = flat(slices.index, device)
        total = torch.zeros(group.size, device=device).index_add_(0, owners, each[places])
        squares[slices.side] = squares.get(slices.side, torch.zeros_like(total)) + total
    result = torch.ones(group.size, device=device)
    for side in SIDES:
        result = result * squares[side].sqrt() if side in squares else result
    return result


def batch_norms(model: nn.Module, group: Group) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the scales of the BatchNorms of a group, each with the indices of its units, shape (size, indices).

    There are none for a whole branch, whose one factor is not that of its channels.
    """
    scales = []
    for slices in group.slices if group.role != "branch" else ():
        module_name, _, name = slices.tensor.rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and name == "weight":
            scales.append((module.weight, torch.tensor(slices.index, device=module.weight.device)))
    return scales


def is_buffer(model: nn.Module, tensor: str) -> bool:
    """Return whether ``tensor`` is a buffer, such as a running statistic, and not a parameter."""
    module_name, _, name = tensor.rpartition(".")
    return name in dict(model.get_submodule(module_name).named_buffers(recurse=False))
