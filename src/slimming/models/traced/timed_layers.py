"""Divide a traced model into timed layers, and make a module to time for each of them.

A timed layer is one call of a layer, or of an attention module whose heads or dimensions can be removed. Everything
between them (additions, windows, reshapes) is one more timed layer without a module. Its time is what the whole model
takes beyond the sum of the others, and it is proportional to the number of elements of the layers' outputs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from slimming.core.copies import copied
from slimming.core.example_inputs import ExampleCall
from slimming.core.formulas import Dim, Ratio
from slimming.core.groups import REST, Group, LayerSizes, TimedLayer
from slimming.core.modules import MODEL_ERRORS
from slimming.models.family import TimedModule
from slimming.models.traced.channels import BATCH_NORM, CONV
from slimming.models.traced.input_columns import columns_entry, first_units
from slimming.models.traced.resize import entry_of, resize_module_
from slimming.models.traced.verification import outputs

COPIES, MEGABYTES = 8, 32
"""Most copies of a layer that are timed together, and most megabytes of weights in them.

Several copies are timed because in a model the weights of a layer are not in the processor's cache.
"""


@dataclass(frozen=True)
class Call:
    """One call of a module for one image.

    Attributes:
        name: name of the module.
        leaves: its flattened arguments.
        spec: the nesting of the arguments.
        batched: positions in ``leaves`` of the tensors whose first dimension is proportional to the batch size.
        elements: number of elements of the output.
    """

    name: str
    leaves: tuple[Any, ...]
    spec: Any
    batched: tuple[int, ...]
    elements: int

    @property
    def x(self) -> Tensor:
        """The first batched argument."""
        return self.leaves[self.batched[0]]


@torch.no_grad()
def calls(model: nn.Module, example: ExampleCall, attention: Collection[str]) -> list[Call]:
    """The calls of layers and attention modules in order; empty if the model does not take a batch of two images.

    Args:
        model: in evaluation mode.
        example: a call with one image.
        attention: names of the attention modules that are timed as a whole.
    """
    try:
        single, double = (_recorded_calls(model, example.with_batch(size), attention) for size in (1, 2))
    except MODEL_ERRORS:
        return []
    if [name for name, *_ in single] != [name for name, *_ in double]:
        return []
    result = []
    for (name, arguments, elements), (_, double_arguments, _) in zip(single, double, strict=True):
        leaves, spec = tree_flatten(arguments)
        double_leaves, double_spec = tree_flatten(double_arguments)
        if spec != double_spec:  # a list with one entry per image
            return []
        pairs = enumerate(zip(leaves, double_leaves, strict=True))
        batched = tuple(
            position for position, (a, b) in pairs if isinstance(a, Tensor) and a.dim() > 1 and len(b) == 2 * len(a)
        )
        if batched:
            result.append(Call(name, tuple(leaves), spec, batched, elements))
    return result


def timed_layers(
    model: nn.Module, recorded: Sequence[Call], groups: Sequence[Group], layers: Mapping[str, LayerSizes]
) -> tuple[TimedLayer, ...]:
    """The timed layers of ``model``, with the one for everything between them last.

    Args:
        model: the model.
        recorded: what `calls` gives.
        groups: the groups of the model.
        layers: module -> its sizes as functions of the groups.
    """
    full = {group.name: group.size for group in groups}
    inside = {group.site: ("heads", group) for group in groups if group.kind == "head"}
    # Where dimensions go, heads of fewer dimensions take the place of fewer heads.
    inside |= {group.site: ("dims", group) for group in groups if group.role == "v"}
    result: list[TimedLayer] = []
    elements = Dim()
    channels: Dim | None = None
    for number, call in enumerate(recorded):
        module = model.get_submodule(call.name)
        shape = "x".join(map(str, call.x.shape))
        if call.name in inside:
            axis, units = inside[call.name]
            axes: dict[str, Dim] = {axis: Dim(groups=((units.name, 1),)), **_widths(call.name, groups)}
            like, channels = f"{type(module).__name__} {_digest(module)} on {shape}", None
        else:
            axes, channels = _axes(module, layers.get(call.name), channels, full, call.x.shape)
            like = f"{type(module).__name__}({module.extra_repr()}) on {shape}"
        kind = "attention" if call.name in inside else "layer"
        result.append(TimedLayer(name=f"{call.name}#{number}", kind=kind, like=like, axes=tuple(axes.items())))
        dim = Dim(fixed=1) if channels is None else channels
        elements += _times(dim, call.elements // dim.value(full))
    if result:
        result.append(TimedLayer(name=REST, kind=REST, like=_digest(model), axes=(("elements", _summed(elements)),)))
    return tuple(result)


def call_number(layer: TimedLayer) -> int:
    """Index of the call of ``layer`` in what `calls` gives."""
    return int(layer.name.rpartition("#")[2])


def _widths(name: str, groups: Sequence[Group]) -> dict[str, Dim]:
    """The embedding width that a module consumes, and the one that it produces if that is another group."""
    axes: dict[str, Dim] = {}
    for side, axis in (("consumes", "width"), ("produces", "out")):
        for group in groups:
            used = any(s.side == side and s.tensor.startswith(f"{name}.") for s in group.slices)
            dim = Dim(groups=((group.name, 1),))
            if group.kind == "width" and used and dim not in axes.values():
                axes.setdefault(axis, dim)
    return axes


def _axes(
    module: nn.Module, layer: LayerSizes | None, channels: Dim | None, full: Mapping[str, int], shape: Sequence[int]
) -> tuple[dict[str, Dim], Dim | None]:
    """The sizes that the time of a layer depends on, and its output channels if they depend on groups.

    Args:
        module: the layer.
        layer: its sizes, if they depend on groups.
        channels: output channels of the layer before it, if they depend on groups.
        full: group -> its number of units.
        shape: shape of the layer's input.
    """
    if layer is None:
        if channels is not None and not [*module.parameters()] and channels.value(full) in (shape[1], shape[-1]):
            return {"channels": channels}, channels  # an operation without weights on the channels
        return {}, None
    dims = layer.tensors.get("weight", next(iter(layer.tensors.values()), ()))
    axes: dict[str, Dim] = {}
    for name, dim in zip(("out", "in"), dims, strict=False):
        if dim.groups and all(_group_names(dim) != _group_names(axis) for axis in axes.values()):
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
    """A module that computes what ``layer`` does at ``sizes``.

    Args:
        model: in evaluation mode, on the device that is timed.
        call: the call of the layer in this model.
        layer: one of `timed_layers`, except the last.
        sizes: axis -> size.
        layers: module -> its sizes as functions of the groups.
        full: group -> its number of units.
    """
    axes = dict(layer.axes)
    counts = _counts(call.name, axes, sizes, full)
    small = copied(model.get_submodule(call.name))
    for path, layer_sizes in layers.items():
        if f"{path}.".startswith(f"{call.name}."):
            module = small.get_submodule(path[len(call.name) + 1 :])
            entry = entry_of(layer_sizes, lambda dim: _value(dim, axes, sizes, counts))
            if layer_sizes.columns is not None:
                entry |= columns_entry(layer_sizes.columns, first_units(layer_sizes.columns, counts))
            resize_module_(module, entry)
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                if tensor.is_floating_point():
                    tensor.data.fill_(0.02)  # uninitialised memory may hold denormal numbers, which are slow
    shape = list(call.x.shape)
    if (layer.kind == "layer" and axes) or "width" in axes:
        dim, size = _input_channels(small, shape, {name: dim.value(full) for name, dim in axes.items()}, sizes)
        shape[dim] = size
    layer_bytes = sum(tensor.nbytes for tensor in small.parameters())
    limit = min(sum(tensor.nbytes for tensor in model.parameters()), MEGABYTES * 2**20)
    count = min(COPIES, max(1, limit // layer_bytes)) if layer_bytes else 1
    copies = [copied(small) for _ in range(count)]
    called = _Calls(copies, call).requires_grad_(False)
    return TimedModule(called, tuple(shape[1:] if shape[0] == 1 else shape), len(copies))


class _Calls(nn.Module):
    """Call several copies of a module with the same arguments."""

    def __init__(self, copies: Sequence[nn.Module], call: Call) -> None:
        super().__init__()
        self.copies, self.call = nn.ModuleList(copies), call

    def forward(self, x: Tensor) -> Any:
        leaves, first = list(self.call.leaves), self.call.x
        batch = x if len(first) == 1 else x.flatten(0, 1)  # an image may be several windows
        for position in self.call.batched:
            leaf = leaves[position]
            if leaf is first:
                leaves[position] = batch
            else:
                leaves[position] = (
                    leaf.expand(len(x), *leaf.shape[1:]) if len(leaf) == 1 else torch.cat([leaf] * len(x))
                )
        args, kwargs = tree_unflatten(leaves, self.call.spec)
        return [module(*args, **kwargs) for module in self.copies][-1]


def _recorded_calls(model: nn.Module, example: ExampleCall, attention: Collection[str]) -> list[tuple[str, Any, int]]:
    """Name, arguments and number of output elements of every call."""
    result: list[tuple[str, Any, int]] = []

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            result.append((name, (args, kwargs), tensors[0].numel() if tensors else 0))

        return record

    leaves = [*attention, *(name for name, module in model.named_modules() if isinstance(module, BATCH_NORM))]
    inside = tuple(f"{name}." for name in leaves)
    handles = []
    for name, module in model.named_modules():
        is_layer = not [*module.children()] and not isinstance(module, (nn.Identity, nn.Dropout))
        if name and (name in leaves or (is_layer and not name.startswith(inside))):
            handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
    try:
        outputs(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return result


def _counts(site: str, axes: Mapping[str, Dim], sizes: Mapping[str, int], full: Mapping[str, int]) -> dict[str, int]:
    """The number of units of every group, with heads of one size that have ``sizes["dims"]`` V dimensions in all."""
    counts = dict(full)
    if "dims" in axes:
        values, queries = axes["dims"].groups[0][0], f"{site}.qk"
        heads = full.get(f"{site}.heads", 1)
        each = max(1, round(sizes["dims"] / heads))
        counts[values] = each * heads
        if queries in full:
            counts[queries] = max(1, round(each * full[queries] / full[values])) * heads
    return counts


def _value(
    dim: Dim | Ratio, axes: Mapping[str, Dim], sizes: Mapping[str, int], counts: Mapping[str, int]
) -> int | float:
    """A dimension at ``sizes``: proportional to the axis of the same groups, or else that of ``counts`` units."""
    for name, axis in axes.items():
        if isinstance(dim, Dim) and name != "dims" and _group_names(dim) == _group_names(axis):
            return dim.fixed + dim.groups[0][1] * (sizes[name] - axis.fixed) // axis.groups[0][1]
    return dim.value(counts)


def _input_channels(
    module: nn.Module, shape: Sequence[int], full: Mapping[str, int], sizes: Mapping[str, int]
) -> tuple[int, int]:
    """The dimension of the channels in a layer's input of ``shape``, and their number at ``sizes``."""
    if isinstance(module, nn.Linear):
        return len(shape) - 1, module.in_features
    if isinstance(module, CONV):
        return 1, module.in_channels
    name = "width" if "width" in full else next(iter(full))
    return (1 if shape[1] == full[name] else len(shape) - 1), sizes[name]


def _group_names(dim: Dim) -> tuple[str, ...]:
    return tuple(name for name, _ in dim.groups)


def _times(dim: Dim, factor: int) -> Dim:
    return Dim(fixed=dim.fixed * factor, groups=tuple((name, weight * factor) for name, weight in dim.groups))


def _summed(dim: Dim) -> Dim:
    """``dim`` with the weights of equal groups added up."""
    weights: Counter[str] = Counter()
    for name, weight in dim.groups:
        weights[name] += weight
    return Dim(fixed=dim.fixed, groups=tuple(weights.items()))


def _digest(module: nn.Module) -> str:
    return hashlib.sha256(repr(module).encode()).hexdigest()[:8]
