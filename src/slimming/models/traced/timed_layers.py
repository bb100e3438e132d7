"""The steps of a traced model whose time is looked up in a latency table, and how to make each alone.

A layer is a call of an attention module whose heads can go, or of a single layer. What lies between them (additions,
windows, reshapes) is one layer more, which has no module: it takes what the whole model took beyond the sum of the
others, and grows with the elements that the layers give.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from slimming.core.formulas import Dim
from slimming.core.groups import REST, Group, LayerSizes, TimedLayer
from slimming.models.family import TimedModule
from slimming.models.traced.channels import BATCH_NORM, CONV
from slimming.models.traced.resize import entry_of, resize_module_
from slimming.models.traced.verification import outputs

COPIES, MEGABYTES = 8, 32
"""At most so many copies of a layer are timed together, and so much of weights: in a model they are not in a cache."""


@dataclass(frozen=True)
class Call:
    """One call of a module for one image.

    Attributes:
        name: the module.
        leaves: its arguments, flattened.
        form: how they were nested.
        grows: places of the tensors among them that grow with the batch.
        elements: how many its output has.
    """

    name: str
    leaves: tuple[Any, ...]
    form: Any
    grows: tuple[int, ...]
    elements: int

    @property
    def x(self) -> Tensor:
        """The first argument that grows with the batch."""
        return self.leaves[self.grows[0]]


@torch.no_grad()
def calls(model: nn.Module, example: Tensor, whole: Collection[str]) -> list[Call]:
    """The calls of layers, and of the modules called ``whole``, in order; none if the model takes no batch of two.

    Args:
        model: in evaluation mode.
        example: one image.
        whole: names of modules that are not looked into.
    """
    try:
        one, two = (_recorded(model, x, whole) for x in (example, torch.cat((example, example))))
    except Exception:  # whatever the host raises
        return []
    if [name for name, *_ in one] != [name for name, *_ in two]:
        return []
    found = []
    for (name, arguments, elements), (_, of_two, _) in zip(one, two, strict=True):
        leaves, form = tree_flatten(arguments)
        pairs = enumerate(zip(leaves, tree_flatten(of_two)[0], strict=True))
        grows = tuple(
            place for place, (a, b) in pairs if isinstance(a, Tensor) and a.dim() > 1 and len(b) == 2 * len(a)
        )
        if grows:
            found.append(Call(name, tuple(leaves), form, grows, elements))
    return found


def timed_layers(
    model: nn.Module, found: Sequence[Call], groups: Sequence[Group], layers: Mapping[str, LayerSizes]
) -> tuple[TimedLayer, ...]:
    """Every step, with the rest.

    Args:
        model: the model.
        found: its calls.
        groups: its groups.
        layers: which modules they change.
    """
    full = {group.name: group.size for group in groups}
    heads = {group.site: group for group in groups if group.kind == "head"}
    result: list[TimedLayer] = []
    elements = Dim()
    before: Dim | None = None
    for number, call in enumerate(found):
        module = model.get_submodule(call.name)
        shape = "x".join(map(str, call.x.shape))
        if call.name in heads:
            axes: dict[str, Dim] = {"heads": Dim(groups=((heads[call.name].name, 1),)), **_widths(call.name, groups)}
            like, before = f"{type(module).__name__} {_digest(module)} on {shape}", None
        else:
            axes, before = _axes(module, layers.get(call.name), before, full, call.x.shape)
            like = f"{type(module).__name__}({module.extra_repr()}) on {shape}"
        kind = "attention" if call.name in heads else "layer"
        result.append(TimedLayer(name=f"{call.name}#{number}", kind=kind, like=like, axes=tuple(axes.items())))
        wide = 1 if before is None else before.value(full)
        elements += _times(Dim(fixed=1) if before is None else before, call.elements // wide)
    if result:
        result.append(TimedLayer(name=REST, kind=REST, like=_digest(model), axes=(("elements", _summed(elements)),)))
    return tuple(result)


def _widths(name: str, groups: Sequence[Group]) -> dict[str, Dim]:
    """The embedding widths that a module reads and, if it is another one, makes."""
    axes: dict[str, Dim] = {}
    for side, axis in (("consumes", "width"), ("produces", "out")):
        for group in groups:
            touched = any(s.side == side and s.tensor.startswith(f"{name}.") for s in group.slices)
            dim = Dim(groups=((group.name, 1),))
            if group.kind == "width" and touched and dim not in axes.values():
                axes.setdefault(axis, dim)
    return axes


def _axes(
    module: nn.Module, layer: LayerSizes | None, before: Dim | None, full: Mapping[str, int], shape: Sequence[int]
) -> tuple[dict[str, Dim], Dim | None]:
    """What the time of a layer depends on, and the channels that it gives, if groups change them."""
    if layer is None:
        passes = before is not None and not [*module.parameters()] and before.value(full) in (shape[1], shape[-1])
        return ({"channels": before}, before) if passes else ({}, None)
    dims = layer.tensors.get("weight", next(iter(layer.tensors.values()), ()))
    axes: dict[str, Dim] = {}
    for name, dim in zip(("out", "in"), dims, strict=False):
        if dim.groups and all(_names(dim) != _names(other) for other in axes.values()):
            axes[name] = dim
    return axes, dims[0] if dims and dims[0].groups else None


def timed_module(
    model: nn.Module,
    call: Call,
    layer: TimedLayer,
    sizes: Mapping[str, int],
    layers: Mapping[str, LayerSizes],
    full: Mapping[str, int],
) -> TimedModule:
    """A module that does what ``layer`` does at ``sizes``.

    Args:
        model: in evaluation mode, where it is to be timed.
        call: the layer's call on this model.
        layer: of `timed_layers`.
        sizes: one per axis.
        layers: which modules the groups change.
        full: units of each group.
    """
    axes = dict(layer.axes)
    small = copy.deepcopy(model.get_submodule(call.name))
    for path, layer_sizes in layers.items():
        if f"{path}.".startswith(f"{call.name}."):
            module = small.get_submodule(path[len(call.name) + 1 :])
            resize_module_(module, entry_of(layer_sizes, lambda dim: _value(dim, axes, sizes, full)))
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                if tensor.is_floating_point():
                    tensor.data.fill_(0.02)  # what fresh memory holds may be slow to multiply
    shape = list(call.x.shape)
    if (layer.kind == "layer" and axes) or "width" in axes:
        place, size = _input(small, shape, {name: dim.value(full) for name, dim in axes.items()}, sizes)
        shape[place] = size
    own = sum(tensor.nbytes for tensor in small.parameters())
    whole = min(sum(tensor.nbytes for tensor in model.parameters()), MEGABYTES * 2**20)
    copies = [copy.deepcopy(small) for _ in range(min(COPIES, max(1, whole // own)) if own else 1)]
    called = _Called(copies, call).requires_grad_(False)
    return TimedModule(called, tuple(shape[1:] if shape[0] == 1 else shape), len(copies))


class _Called(nn.Module):
    """Copies of a module, each called with the same arguments."""

    def __init__(self, copies: Sequence[nn.Module], call: Call) -> None:
        super().__init__()
        self.copies, self.call = nn.ModuleList(copies), call

    def forward(self, x: Tensor) -> Any:
        leaves, first = list(self.call.leaves), self.call.x
        whole = x if len(first) == 1 else x.flatten(0, 1)
        for place in self.call.grows:
            one = leaves[place]
            if one is first:
                leaves[place] = whole
            else:
                leaves[place] = one.expand(len(x), *one.shape[1:]) if len(one) == 1 else torch.cat([one] * len(x))
        args, kwargs = tree_unflatten(leaves, self.call.form)
        return [module(*args, **kwargs) for module in self.copies][-1]


def _recorded(model: nn.Module, example: Tensor, whole: Collection[str]) -> list[tuple[str, Any, int]]:
    """Name, arguments and elements of the output of every call."""
    result: list[tuple[str, Any, int]] = []

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            result.append((name, (args, kwargs), tensors[0].numel() if tensors else 0))

        return record

    closed = [*whole, *(name for name, module in model.named_modules() if isinstance(module, BATCH_NORM))]
    inside = tuple(f"{name}." for name in closed)
    handles = []
    for name, module in model.named_modules():
        layer = not [*module.children()] and not isinstance(module, (nn.Identity, nn.Dropout))
        if name and (name in closed or (layer and not name.startswith(inside))):
            handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
    try:
        outputs(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return result


def _value(dim: Dim, axes: Mapping[str, Dim], sizes: Mapping[str, int], full: Mapping[str, int]) -> int:
    """A dimension at ``sizes``: in step with the axis of the same groups, or whole."""
    for name, axis in axes.items():
        if _names(dim) == _names(axis):
            return dim.fixed + dim.groups[0][1] * (sizes[name] - axis.fixed) // axis.groups[0][1]
    return dim.value(full)


def _input(
    module: nn.Module, shape: Sequence[int], full: Mapping[str, int], sizes: Mapping[str, int]
) -> tuple[int, int]:
    """Which dimension of a layer's input holds its channels, and how many they are at ``sizes``."""
    if isinstance(module, nn.Linear):
        return len(shape) - 1, module.in_features
    if isinstance(module, CONV):
        return 1, module.in_channels
    name = "width" if "width" in full else next(iter(full))
    return (1 if shape[1] == full[name] else len(shape) - 1), sizes[name]


def _names(dim: Dim) -> tuple[str, ...]:
    return tuple(name for name, _ in dim.groups)


def _times(dim: Dim, factor: int) -> Dim:
    return Dim(fixed=dim.fixed * factor, groups=tuple((name, weight * factor) for name, weight in dim.groups))


def _summed(dim: Dim) -> Dim:
    """The same with each group once."""
    weights: Counter[str] = Counter()
    for name, weight in dim.groups:
        weights[name] += weight
    return Dim(fixed=dim.fixed, groups=tuple(weights.items()))


def _digest(module: nn.Module) -> str:
    return hashlib.sha256(repr(module).encode()).hexdigest()[:8]
