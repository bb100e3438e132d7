"""Modules that torch-pruning sees as one: what a table reads is not for it to follow inside.

Reshapes into heads, position biases and splits lead its index maps astray, and make them slow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

_SEEN = "slimming_seen"
"""Attribute with the number of channels that went into a closed module and came out."""


@contextmanager
def closed(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[type[nn.Module], ...]]:
    """Close the modules called ``names`` while the context lasts; yields the classes that they have meanwhile."""
    open_classes = {name: type(model.get_submodule(name)) for name in names if name}
    classes = {cls: _closed_class(cls) for cls in open_classes.values()}
    try:
        for name, cls in open_classes.items():
            model.get_submodule(name).__class__ = classes[cls]
        yield tuple(classes.values())
    finally:
        for name, cls in open_classes.items():
            module = model.get_submodule(name)
            module.__class__ = cls
            module.__dict__.pop(_SEEN, None)


def channels_seen(module: nn.Module) -> tuple[int | None, int | None]:
    """How many channels went into a closed module and came out, as far as it has run."""
    seen: tuple[int | None, int | None] = module.__dict__.get(_SEEN, (None, None))
    return seen


def _closed_class(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            found = cls.forward(self, *args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        leaves, form = tree_flatten(found)
        places = [place for place, leaf in enumerate(leaves) if _differentiable(leaf)]
        if not inputs or not places:
            return found
        self.__dict__[_SEEN] = (_channels(self, inputs[0]), _channels(self, leaves[places[0]]))
        for place, leaf in zip(places, linked([leaves[place] for place in places], inputs), strict=True):
            leaves[place] = leaf
        return tree_unflatten(leaves, form)

    return type(cls.__name__, (cls,), {"forward": forward})


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _channels(module: nn.Module, tensor: Tensor) -> int | None:
    """The size of the dimension of ``tensor`` that a layer of the module reads or makes."""
    weights = [weight for weight in module.parameters() if weight.dim() > 1]
    sizes = {size for weight in weights for size in weight.shape[:2]}
    return next((tensor.shape[dim] for dim in (-1, 1) if tensor.dim() > 1 and tensor.shape[dim] in sizes), None)


def linked(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``outputs`` as one step of the graph from ``inputs``."""
    return _Link.apply(len(outputs), *(tensor.detach() for tensor in outputs), *inputs)


class TokensJoined(TorchFunctionMode):
    """Tokens put behind each other are one step: torch-pruning takes what is joined for channels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.cat and found.dim() == 3 and found.grad_fn is not None:
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            if dim % 3 == 1:
                return linked([found], [tensor for tensor in args[0] if tensor.requires_grad])[0]
        return found


class _Link(torch.autograd.Function):
    """One step of the graph from inputs to outputs that are known already."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("this graph is for reading")
