"""Masks on weights: a tensor times the factors of the groups that scale it, as a parametrisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Scaled(nn.Module):
    """The parametrisation of one tensor by the masks of the groups that scale it: factors along some dimension each.

    Training keeps the scaled tensor for the layer that reads it, and nothing else beside what is there anyway, however
    many masks there are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ModuleList()

    def add(self, factor: Factor) -> None:
        """Let one more group scale the tensor."""
        self.factors.append(factor)

    def forward(self, tensor: Tensor) -> Tensor:
        """Scale ``tensor`` (any shape) along the dimension of each factor."""
        factors = [factor(tensor) for factor in self.factors]
        if len(factors) == 1:
            return tensor * factors[0]
        scaled: Any = _Product.apply(tensor, *factors)
        return scaled


class Factor(nn.Module):
    """One group's mask as a factor of a tensor.

    Args:
        mask: one factor per unit, float32.
        dim: dimension of the tensor that is scaled.
        index: places of each unit along it.
        length: size of the tensor along it.
    """

    places: Tensor | None

    def __init__(self, mask: nn.Parameter, dim: int, index: Sequence[Sequence[int]], length: int) -> None:
        super().__init__()
        self.mask = mask
        self.dim = dim
        places = torch.zeros(length, dtype=torch.int64)
        owners, spots = flat(index, places.device)
        places[spots] = owners + 1
        whole = places.equal(torch.arange(1, mask.numel() + 1)) if length == mask.numel() else False
        self.register_buffer("places", None if whole else places.to(mask.device), persistent=False)

    def forward(self, tensor: Tensor) -> Tensor:
        """The factor in the type of ``tensor``, of its length along `dim` and of length 1 along all others."""
        factor = self.mask
        if self.places is not None:
            factor = torch.cat([factor.new_ones(1), factor]).index_select(0, self.places)
        shape = [1] * tensor.dim()
        shape[self.dim] = -1
        return factor.to(tensor.dtype).view(shape)


class _Product(torch.autograd.Function):
    """A tensor times several factors that broadcast to it; products of some are made again for the gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(tensor, *factors)
        return math.prod(factors, start=tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        every: list[Tensor] = list(ctx.saved_tensors)
        found: list[Tensor | None] = []
        for place, wanted in enumerate(ctx.needs_input_grad):
            others = (each for at, each in enumerate(every) if at != place)
            found.append(math.prod(others, start=grads[0]).sum_to_size(every[place].shape) if wanted else None)
        return tuple(found)


def scaled(model: nn.Module, tensor: str) -> Scaled:
    """The parametrisation of the tensor called ``tensor``, which gets one if it has none."""
    module_name, _, name = tensor.rpartition(".")
    module = model.get_submodule(module_name)
    if parametrize.is_parametrized(module, name):
        parametrizations: Any = module.get_submodule("parametrizations").get_submodule(name)
        if isinstance(parametrizations[-1], Scaled):
            return parametrizations[-1]
    made = Scaled()
    parametrize.register_parametrization(module, name, made)
    return made


def original(model: nn.Module, tensor: str) -> Tensor:
    """The tensor called ``tensor`` without its masks."""
    module_name, _, name = tensor.rpartition(".")
    module = model.get_submodule(module_name)
    if parametrize.is_parametrized(module, name):
        parametrization: Any = module.get_submodule("parametrizations").get_submodule(name)
        return parametrization.original
    return module.get_parameter(name)


def flat(index: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The unit and the place of every entry of ``index``, both of shape (entries,)."""
    pairs = [(unit, place) for unit, places in enumerate(index) for place in places]
    both = torch.tensor(pairs, dtype=torch.int64, device=device)
    return both[:, 0], both[:, 1]


def own_class_(module: nn.Module) -> None:
    """Give a parametrised module a class of its own.

    torch makes one class per parametrised module, which a deep copy shares; removing the parametrisation changes
    that class, and would break the other one.
    """
    old: Any = type(module)
    body = {name: entry for name, entry in vars(old).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = cast(Any, type(old.__name__, old.__bases__, body))
