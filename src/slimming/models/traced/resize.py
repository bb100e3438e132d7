"""Selecting what stays of each tensor, and giving modules other sizes: the same for every kind of group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.formulas import Dim
from slimming.core.groups import Group, LayerSizes
from slimming.errors import CheckpointError
from slimming.models.family import Kept, take
from slimming.models.traced.channels import BATCH_NORM, CONV
from slimming.models.traced.free_heads import free_heads_class, has_free_heads
from slimming.models.traced.heads import Attributes

TENSORS, FREE_HEADS = "tensors", "free_heads"
"""Keys of a layer's entry in the structure beside its attributes: tensor shapes, and the changed forward."""


def dropped_places(groups: Iterable[Group], kept: Kept) -> dict[str, dict[int, set[int]]]:
    """Tensor -> dimension -> places that go."""
    result: dict[str, dict[int, set[int]]] = {}
    for group in groups:
        gone = set(range(group.size)) - set(kept.get(group.name, range(group.size)))
        if gone:
            for one in group.slices:
                places = result.setdefault(one.tensor, {}).setdefault(one.dim, set())
                places.update(place for unit in gone for place in one.index[unit])
    return result


def select(groups: Iterable[Group], kept: Kept, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the slim model."""
    result = dict(state)
    for name, dims in dropped_places(groups, kept).items():
        tensor = result.get(name)
        if tensor is not None:  # a buffer may be outside the state dict
            stays = {dim: [p for p in range(tensor.shape[dim]) if p not in gone] for dim, gone in dims.items()}
            result[name] = take(tensor, stays)
    return result


def tensor_dims(groups: Iterable[Group], shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[Dim, ...]]:
    """The sizes of every tensor as functions of what the groups keep."""
    owned: dict[tuple[str, int], list[tuple[str, int, int]]] = {}
    for group in groups:
        for one in group.slices:
            owned.setdefault((one.tensor, one.dim), []).append((group.name, len(one.index[0]), group.size))
    result = {}
    for name, shape in shapes.items():
        dims = []
        for dim, length in enumerate(shape):
            parts = owned.get((name, dim), [])
            rest = length - sum(weight * size for _, weight, size in parts)
            dims.append(Dim(fixed=rest, groups=tuple((group, weight) for group, weight, _ in parts)))
        result[name] = tuple(dims)
    return result


def layer_attributes(model: nn.Module, dims: Mapping[str, tuple[Dim, ...]]) -> Attributes:
    """The size attributes of every Linear, convolution and BatchNorm that has a changing tensor."""
    result: Attributes = {}
    for name, module in model.named_modules():
        weight = dims.get(f"{name}.weight")
        if weight is None or not any(dim.groups for dim in weight):
            continue
        if isinstance(module, nn.Linear):
            result[name] = {"out_features": weight[0], "in_features": weight[1]}
        elif isinstance(module, CONV) and module.groups == 1:
            result[name] = {"out_channels": weight[0], "in_channels": weight[1]}
        elif isinstance(module, CONV):
            result[name] = _grouped(module, weight[0])
        elif isinstance(module, BATCH_NORM):
            result[name] = {"num_features": weight[0]}
        elif isinstance(module, nn.PReLU):
            result[name] = {"num_parameters": weight[0]}
        elif isinstance(module, nn.LayerNorm):
            result[name] = {"normalized_shape[0]": weight[0]}
    return result


def _grouped(module: Any, rows: Dim) -> dict[str, Dim]:
    """A grouped convolution keeps the sizes of its groups and loses some of them."""
    out_each = module.out_channels // module.groups
    in_each = module.in_channels // module.groups

    def scaled(factor: int) -> Dim:
        groups = tuple((name, weight // out_each * factor) for name, weight in rows.groups)
        return Dim(fixed=rows.fixed // out_each * factor, groups=groups)

    return {"out_channels": rows, "groups": scaled(1), "in_channels": scaled(in_each)}


def layer_sizes(
    model: nn.Module, groups: Sequence[Group], heads: Attributes, free_heads: set[str]
) -> dict[str, LayerSizes]:
    """The sizes of every module that ``groups`` change.

    Args:
        model: the model.
        groups: its groups.
        heads: attributes of attention modules that count their heads.
        free_heads: attention modules whose forward ties the heads to the embedding width.
    """
    present = {group.name for group in groups}
    shapes = {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    dims = tensor_dims(groups, shapes)
    result: dict[str, LayerSizes] = {}
    tensors: dict[str, dict[str, tuple[Dim, ...]]] = {}
    for tensor, sizes in dims.items():
        if any(dim.groups for dim in sizes):
            module, _, name = tensor.rpartition(".")
            tensors.setdefault(module, {})[name] = sizes
    attributes = layer_attributes(model, dims)
    for module, values in heads.items():
        used = {name: dim for name, dim in values.items() if {group for group, _ in dim.groups} <= present}
        if used:
            attributes[module] = {**attributes.get(module, {}), **used}
    tied = [name for name in free_heads if any(f"{module}.".startswith(f"{name}.") for module in tensors)]
    for module in {**tensors, **attributes, **dict.fromkeys(tied)}:
        result[module] = LayerSizes(
            tensors=tensors.get(module, {}),
            attributes=attributes.get(module, {}),
            free_heads=module in free_heads,
        )
    return result


def layers_after(sizes: Mapping[str, LayerSizes], groups: Iterable[Group], kept: Kept) -> dict[str, Any]:
    """The structure's entries for the modules that lose something when ``kept`` stays."""
    full = {group.name: group.size for group in groups}
    counts = {name: len(kept[name]) if name in kept else size for name, size in full.items()}
    entries = {name: entry_of(layer, lambda dim: dim.value(counts)) for name, layer in sizes.items()}
    dense = {name: entry_of(layer, lambda dim: dim.value(full)) for name, layer in sizes.items()}
    changed = {name for name, entry in entries.items() if entry != dense[name]}
    # A forward that ties its heads to the embedding width is changed with either.
    changed |= {n for n, one in sizes.items() if one.free_heads and any(c.startswith(f"{n}.") for c in changed)}
    return {name: entry for name, entry in entries.items() if name in changed}


def entry_of(layer: LayerSizes, value: Callable[[Dim], int]) -> dict[str, Any]:
    """The structure's entry of one module whose dimensions have the sizes that ``value`` gives."""
    entry: dict[str, Any] = {name: value(dim) for name, dim in layer.attributes.items()}
    if layer.tensors:
        entry[TENSORS] = {name: [value(dim) for dim in dims] for name, dims in layer.tensors.items()}
    if layer.free_heads:
        entry[FREE_HEADS] = True
    return entry


def resize_module_(module: nn.Module, entry: Mapping[str, Any]) -> None:
    """Give one module the sizes of its entry; the contents of resized tensors are undefined."""
    for name, shape in entry.get(TENSORS, {}).items():
        old: Any = getattr(module, name)
        if list(old.shape) == list(shape):
            continue
        if isinstance(old, nn.Parameter):
            new = torch.empty(tuple(shape), dtype=old.dtype, device=old.device)
            module.register_parameter(name, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            # A buffer outside the state dict is the same for every head, or the proof of its group fails.
            module._buffers[name] = old[tuple(slice(size) for size in shape)].clone()
    for name, value in entry.items():
        if name not in (TENSORS, FREE_HEADS):
            _set_size(module, name, value)
    if entry.get(FREE_HEADS) and not has_free_heads(module):
        made = free_heads_class(type(module))
        if made is None:
            raise CheckpointError(f"The forward of {type(module).__name__} is not as expected in this version.")
        module.__class__ = made
    clear_caches_(module)


def clear_caches_(module: nn.Module) -> None:
    """Forget what the host worked out from the module's tensors as they were."""
    for name, value in vars(module).items():
        if name.endswith("_cache") and isinstance(value, dict):
            value.clear()


def settle_(model: nn.Module) -> None:
    """Keep torch's fused encoder, which packs padded sequences once for all layers, away from changed layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(has_free_heads(layer) for layer in module.modules()):
            module.use_nested_tensor = False


def _set_size(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute, or one place of a tuple as in ``bias_shape[2]``."""
    attribute, _, place = name.rstrip("]").partition("[")
    old = getattr(module, attribute)
    items = list(old) if place else [old]
    at = int(place or 0)
    if type(items[at]) is not int or type(value) is not int or value < 1:
        raise CheckpointError(f"The structure sets {name!r} to {value!r}; it is damaged. Take an intact copy.")
    items[at] = value
    setattr(module, attribute, tuple(items) if place else value)
