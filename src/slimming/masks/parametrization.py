"""Masks on weights: a `torch.nn.utils.parametrize` parametrisation that scales a tensor by the masks of groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Scaled(nn.Module):
    """Parametrisation of one tensor that multiplies it by the masks of one or more groups.

    For the backward pass only the scaled tensor is stored in addition to the weight and the masks, regardless of the
    number of masks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ModuleList()

    def add(self, factor: Factor) -> None:
        """Add the mask of another group."""
        self.factors.append(factor)

    def forward(self, tensor: Tensor) -> Tensor:
        """Scale ``tensor`` (any shape) along the dimension of each factor."""
        factors = [factor(tensor) for factor in self.factors]
        if len(factors) == 1:
            return tensor * factors[0]
        scaled: Any = _Product.apply(tensor, *factors)
        return scaled


class Factor(nn.Module):
    """The mask of one group as a factor of a tensor.

    Args:
        mask: one factor per unit, float32.
        dim: dimension of the tensor that is scaled.
        index: indices of each unit along ``dim``.
        length: size of the tensor along ``dim``.
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
        """Return the factor in the dtype of ``tensor``, with its size along `dim` and size 1 along all others."""
        factor = self.mask
        if self.places is not None:
            factor = torch.cat([factor.new_ones(1), factor]).index_select(0, self.places)
        shape = [1] * tensor.dim()
        shape[self.dim] = -1
        return factor.to(tensor.dtype).view(shape)


class _Product(torch.autograd.Function):
    """Product of a tensor and several factors that broadcast to it; partial products are recomputed in backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(tensor, *factors)
        return math.prod(factors, start=tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs: list[Tensor] = list(ctx.saved_tensors)
        input_grads: list[Tensor | None] = []
        for index, needed in enumerate(ctx.needs_input_grad):
            others = (tensor for other, tensor in enumerate(inputs) if other != index)
            grad = math.prod(others, start=grads[0]).sum_to_size(inputs[index].shape) if needed else None
            input_grads.append(grad)
        return tuple(input_grads)


def scaled(model: nn.Module, tensor: str) -> Scaled:
    """Return the `Scaled` parametrisation of the tensor called ``tensor``; registers one if it has none."""
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
    """Return the tensor called ``tensor`` without its masks."""
    module_name, _, name = tensor.rpartition(".")
    module = model.get_submodule(module_name)
    if parametrize.is_parametrized(module, name):
        parametrization: Any = module.get_submodule("parametrizations").get_submodule(name)
        return parametrization.original
    return module.get_parameter(name)


def flat(index: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the unit and the index of every entry of ``index``, both of shape (entries,)."""
    pairs = [(unit, place) for unit, places in enumerate(index) for place in places]
    both = torch.tensor(pairs, dtype=torch.int64, device=device)
    return both[:, 0], both[:, 1]


def own_class_(module: nn.Module) -> None:
    """Replace the class of a parametrised module by a copy of it.

    PyTorch creates a class for each parametrised module, which a deep copy of the module shares. Removing the
    parametrisation changes the class and would break the copy.
    """
    old: Any = type(module)
    body = {name: entry for name, entry in vars(old).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = cast(Any, type(old.__name__, old.__bases__, body))
