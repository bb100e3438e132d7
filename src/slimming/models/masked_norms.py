"""Mask modules that take statistics over units: the statistics are taken over the kept units, as in a cut model.

Such a module is a LayerNorm, another norm over all of its channels, or a convolution that standardises its weights over
its input channels. Where units are masked, it is run as it is after the cut: on the kept channels, with the kept
entries of its tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimming.core.groups import Group, Slices

Indices = Mapping[str, tuple[int, Tensor]]
"""Name of a tensor of a module -> a dimension and the indices along it."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class _Removed:
    """The indices that a group removes from one tensor of a module."""

    tensor: str
    dim: int
    side: str
    indices: frozenset[int]


class MaskedNorm:
    """Forward hook that gives the output of the module on the kept channels.

    Where the module has one output per channel, it is 0 for removed channels. Several groups may remove channels of one
    module, for example where streams are concatenated before a norm.
    """

    def __init__(self) -> None:
        self.removed: dict[str, list[_Removed]] = {}

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        parts = [part for each in self.removed.values() for part in each]
        x, kept = args[0], _kept(module, parts, output.device)
        reads = parts[0].side == "consumes"
        index = kept[parts[0].tensor][1]
        if not len(index):  # the branch around the module is removed
            return torch.zeros_like(output)
        dim = channel_dim(module, x.dim(), getattr(module, parts[0].tensor).shape[parts[0].dim], reads=reads)
        inside = run_on(module, kept, x.index_select(dim, index), reads=reads)
        return inside if reads else torch.zeros_like(output).index_copy(dim, index, inside.to(output.dtype))


def _kept(module: nn.Module, parts: Sequence[_Removed], device: torch.device) -> dict[str, tuple[int, Tensor]]:
    gone: dict[tuple[str, int], set[int]] = {}
    for part in parts:
        gone.setdefault((part.tensor, part.dim), set()).update(part.indices)
    kept: dict[str, tuple[int, Tensor]] = {}
    for (name, dim), indices in gone.items():
        stays = [index for index in range(getattr(module, name).shape[dim]) if index not in indices]
        kept[name] = (dim, torch.tensor(stays, dtype=torch.int64, device=device))
    return kept


def run_on(module: nn.Module, kept: Indices, x: Tensor, *, reads: bool = False) -> Tensor:
    """Run ``module`` on ``x``, with those entries of its tensors that ``kept`` selects and the sizes of what is kept.

    Args:
        module: a module whose forward takes one tensor; it is not changed, and gradients reach its parameters.
        kept: for each tensor, a dimension and the kept indices along it, in the order in which they are used.
        x: its input.
        reads: the channels are those that a convolution or Linear reads, and its outputs stay.
    """
    cls: Any = type(module)
    if parametrize.is_parametrized(module):
        cls = cls.__bases__[0]
    shell = object.__new__(cls)
    tensors = {name: getattr(module, name) for name in (*module._parameters, *module._buffers)}
    tensors |= {name: getattr(module, name) for name in kept}
    chosen = {name: tensors[name].index_select(dim, index) for name, (dim, index) in kept.items()}
    vars(shell).update({**vars(module), **tensors, **chosen, "_parameters": {}, "_buffers": {}})
    for name, (dim, index) in kept.items():
        _resize_(shell, tensors[name].shape[dim], len(index), reads=reads)
    return cls.forward(shell, x)


def _resize_(shell: nn.Module, old: int, new: int, *, reads: bool) -> None:
    """Set the attributes of ``shell`` that count its channels."""
    names = ("in_channels", "in_features") if reads else tuple(vars(shell))
    for name in names:
        value = vars(shell).get(name)
        if type(value) is int and value == old:
            vars(shell)[name] = new
        elif type(value) is tuple and value == (old,):
            vars(shell)[name] = (new,)


def channel_dim(module: nn.Module, rank: int, channels: int, *, reads: bool = False) -> int:
    """The dimension of the channels in an input of ``module``, found by running it: 1 or -1.

    Args:
        module: the module.
        rank: number of dimensions of the input.
        channels: number of channels.
        reads: see `run_on`.
    """
    if reads or rank < 3:
        return 1 if isinstance(module, CONVOLUTIONS) else -1
    return next((dim for dim in (1, -1) if runs_over(module, rank, dim, channels)), -1)


def runs_over(module: nn.Module, rank: int, dim: int, channels: int) -> bool:
    """Whether ``module`` takes a tensor with ``channels`` along ``dim`` and returns one of the same shape."""
    others = [size for size in (3, 5, 7, 11) if size != channels]
    shape = [1, *others[: rank - 1]]
    shape[dim] = channels
    like = next(module.parameters())
    with torch.no_grad():
        try:
            return cast(Any, type(module)).forward(module, like.new_zeros(shape)).shape == torch.Size(shape)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return False


def mask_norms(model: nn.Module, group: Group, units: Sequence[int]) -> list[Callable[[], None]]:
    """Mask the modules in ``group.norms``, so that their statistics are taken over ``units`` only.

    Returns:
        Functions that remove the masks.
    """
    undo: list[Callable[[], None]] = []
    removed = sorted(set(range(group.size)).difference(units))
    for owner in group.norms if removed else ():
        parts = [part for part in group.slices if part.tensor.rpartition(".")[0] == owner]
        if any(part.side == "consumes" for part in parts):
            parts = [part for part in parts if part.side == "consumes"]
        undo.append(_mask(model.get_submodule(owner), group.name, parts, removed))
    return undo


def _mask(module: nn.Module, group: str, parts: Sequence[Slices], removed: Sequence[int]) -> Callable[[], None]:
    masks: list[Any] = [hook for hook in module._forward_hooks.values() if isinstance(hook, MaskedNorm)]
    mask = masks[0] if masks else MaskedNorm()
    if not masks:
        # Before other hooks, which must get the masked output.
        module.register_forward_hook(mask, prepend=True)
    mask.removed[group] = [
        _Removed(
            part.tensor.rpartition(".")[2],
            part.dim,
            part.side,
            # What heads share is removed with the last unit that has it.
            frozenset(index for unit in removed for index in part.index[unit])
            - {index for unit in set(range(len(part.index))).difference(removed) for index in part.index[unit]},
        )
        for part in parts
    ]

    # Not a closure: the masks of a model are copied with it, and must refer to the copy of the module.
    return functools.partial(_unmask, module, group)


def _unmask(module: nn.Module, group: str) -> None:
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, MaskedNorm):
            hook.removed.pop(group, None)
            if not hook.removed:
                del module._forward_hooks[key]
