"""Make modules opaque to torch-pruning: each becomes a single operation of its graph and is not traced further.

This is for attention and MLP modules that the tables of classes describe. Their reshapes into heads, position biases
and splits make the index mappings of torch-pruning wrong and slow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

_CHANNELS = "slimming_channels"
"""Attribute of an opaque module that has run: its numbers of input and output channels."""


@contextmanager
def opaque(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[type[nn.Module], ...]]:
    """Make the modules called ``names`` opaque inside the context; yields the classes that they have there."""
    original_classes = {name: type(model.get_submodule(name)) for name in names if name}
    opaque_classes = {cls: _opaque_class(cls) for cls in original_classes.values()}
    try:
        for name, cls in original_classes.items():
            model.get_submodule(name).__class__ = opaque_classes[cls]
        yield tuple(opaque_classes.values())
    finally:
        for name, cls in original_classes.items():
            module = model.get_submodule(name)
            module.__class__ = cls
            module.__dict__.pop(_CHANNELS, None)


def opaque_channels(module: nn.Module) -> tuple[int | None, int | None]:
    """The numbers of input and output channels of an opaque module; None before its forward has run."""
    channels: tuple[int | None, int | None] = module.__dict__.get(_CHANNELS, (None, None))
    return channels


def _opaque_class(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            result = cls.forward(self, *args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        leaves, spec = tree_flatten(result)
        positions = [position for position, leaf in enumerate(leaves) if _is_differentiable(leaf)]
        if not inputs or not positions:
            return result
        self.__dict__[_CHANNELS] = (_channels(self, inputs[0]), _channels(self, leaves[positions[0]]))
        outputs = as_one_operation([leaves[position] for position in positions], inputs)
        for position, output in zip(positions, outputs, strict=True):
            leaves[position] = output
        return tree_unflatten(leaves, spec)

    return type(cls.__name__, (cls,), {"forward": forward})


def _is_differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _channels(module: nn.Module, tensor: Tensor) -> int | None:
    """The size of the last or second dimension of ``tensor``, whichever is a size of a weight of ``module``."""
    weights = [weight for weight in module.parameters() if weight.dim() > 1]
    sizes = {size for weight in weights for size in weight.shape[:2]}
    return next((tensor.shape[dim] for dim in (-1, 1) if tensor.dim() > 1 and tensor.shape[dim] in sizes), None)


def as_one_operation(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``outputs``, attached to the autograd graph as the results of one operation on ``inputs``."""
    return _OpaqueOperation.apply(len(outputs), *(tensor.detach() for tensor in outputs), *inputs)


class OpaqueTokenConcat(TorchFunctionMode):
    """Make concatenations along the token dimension opaque: torch-pruning takes them for concatenated channels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.cat and result.dim() == 3 and result.grad_fn is not None:
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            if dim % 3 == 1:
                return as_one_operation([result], [tensor for tensor in args[0] if tensor.requires_grad])[0]
        return result


class _OpaqueOperation(torch.autograd.Function):
    """A node of the autograd graph from inputs to outputs that are already computed."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("this graph is traced, not differentiated")
