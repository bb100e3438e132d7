"""Select the kept part of every tensor and resize modules, in the same way for every kind of group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.copies import clear_caches_, copied
from slimming.core.formulas import Dim
from slimming.core.groups import Group, LayerSizes
from slimming.errors import CheckpointError
from slimming.models.family import ENTRY, Kept, assign_state_, select_indices
from slimming.models.traced.channels import BATCH_NORM, CONV
from slimming.models.traced.free_heads import free_heads_class, has_free_heads
from slimming.models.traced.heads import Attributes
from slimming.models.traced.normalisers import Normaliser, normaliser_attributes

TENSORS, FREE_HEADS = "tensors", "free_heads"
"""Further keys of a structure's entry, next to the attributes: tensor shapes, and whether the forward is rewritten."""


def removed_indices(groups: Iterable[Group], kept: Kept) -> dict[str, dict[int, set[int]]]:
    """Tensor -> dimension -> indices that are removed."""
    result: dict[str, dict[int, set[int]]] = {}
    for group in groups:
        removed = set(range(group.size)) - set(kept.get(group.name, range(group.size)))
        if removed:
            for part in group.slices:
                indices = result.setdefault(part.tensor, {}).setdefault(part.dim, set())
                indices.update(index for unit in removed for index in part.index[unit])
    return result


def select(groups: Iterable[Group], kept: Kept, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the slim model, selected from that of the dense one."""
    result = dict(state)
    for name, dims in removed_indices(groups, kept).items():
        tensor = result.get(name)
        if tensor is not None:  # a buffer may be outside the state dict
            indices = {dim: [i for i in range(tensor.shape[dim]) if i not in removed] for dim, removed in dims.items()}
            result[name] = select_indices(tensor, indices)
    return result


def tensor_dims(groups: Iterable[Group], shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[Dim, ...]]:
    """The dimensions of every tensor as functions of the kept units."""
    users: dict[tuple[str, int], list[tuple[str, int, int]]] = {}
    for group in groups:
        for part in group.slices:
            users.setdefault((part.tensor, part.dim), []).append((group.name, len(part.index[0]), group.size))
    result = {}
    for name, shape in shapes.items():
        dims = []
        for dim, length in enumerate(shape):
            weights = users.get((name, dim), [])
            fixed = length - sum(weight * size for _, weight, size in weights)
            dims.append(Dim(fixed=fixed, groups=tuple((group, weight) for group, weight, _ in weights)))
        result[name] = tuple(dims)
    return result


def layer_attributes(
    model: nn.Module, dims: Mapping[str, tuple[Dim, ...]], normalisers: Mapping[str, Normaliser]
) -> Attributes:
    """The size attributes of every layer whose weight depends on a group: Linear, convolution, norm and PReLU."""
    result: Attributes = {}
    for name, normaliser in normalisers.items():
        tensor, dim = next(iter(normaliser.tensors.items()))
        channels = dims[f"{name}.{tensor}"][dim]
        if channels.groups:
            result[name] = normaliser_attributes(normaliser, channels)
    for name, module in model.named_modules():
        weight = dims.get(f"{name}.weight")
        if weight is None or not any(dim.groups for dim in weight) or name in normalisers:
            continue
        if isinstance(module, nn.Linear):
            result[name] = {"out_features": weight[0], "in_features": weight[1]}
        elif isinstance(module, CONV) and module.groups == 1:
            result[name] = {"out_channels": weight[0], "in_channels": weight[1]}
        elif isinstance(module, CONV):
            result[name] = _grouped_attributes(module, weight[0])
        elif isinstance(module, BATCH_NORM):
            result[name] = {"num_features": weight[0]}
        elif isinstance(module, nn.PReLU):
            result[name] = {"num_parameters": weight[0]}
        elif isinstance(module, nn.LayerNorm):
            result[name] = {"normalized_shape[0]": weight[0]}
    return result


def _grouped_attributes(module: Any, rows: Dim) -> dict[str, Dim]:
    """The sizes of a grouped convolution: whole groups are removed, and the others keep their sizes."""
    out_per_group = module.out_channels // module.groups
    in_per_group = module.in_channels // module.groups

    def scaled(factor: int) -> Dim:
        groups = tuple((name, weight // out_per_group * factor) for name, weight in rows.groups)
        return Dim(fixed=rows.fixed // out_per_group * factor, groups=groups)

    return {"out_channels": rows, "groups": scaled(1), "in_channels": scaled(in_per_group)}


def layer_sizes(
    model: nn.Module,
    groups: Sequence[Group],
    unit_attributes: Attributes,
    free_heads: set[str],
    normalisers: Mapping[str, Normaliser],
) -> dict[str, LayerSizes]:
    """The sizes of every module that depends on ``groups``.

    Args:
        model: the model.
        groups: its groups.
        unit_attributes: attributes of modules with the number of heads or hidden units.
        free_heads: names of attention modules whose forward infers the head size from the embedding width.
        normalisers: its norms apart from BatchNorms and LayerNorms, by name.
    """
    present = {group.name: group.size for group in groups}
    shapes = {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    dims = tensor_dims(groups, shapes)
    result: dict[str, LayerSizes] = {}
    tensors: dict[str, dict[str, tuple[Dim, ...]]] = {}
    for tensor, sizes in dims.items():
        if any(dim.groups for dim in sizes):
            module, _, name = tensor.rpartition(".")
            tensors.setdefault(module, {})[name] = sizes
    attributes = layer_attributes(model, dims, normalisers)
    for module, values in unit_attributes.items():
        used = {
            name: _among(dim, present, getattr(model.get_submodule(module), name.partition("[")[0], None), name)
            for name, dim in values.items()
            if any(group in present for group, _ in dim.groups)
        }
        if used:
            attributes[module] = {**attributes.get(module, {}), **used}
    rewritten = [name for name in free_heads if any(f"{module}.".startswith(f"{name}.") for module in tensors)]
    for module in {**tensors, **attributes, **dict.fromkeys(rewritten)}:
        result[module] = LayerSizes(
            tensors=tensors.get(module, {}),
            attributes=attributes.get(module, {}),
            free_heads=module in free_heads,
        )
    return result


def _among(dim: Dim, present: Mapping[str, int], value: Any, name: str) -> Dim:
    """``dim`` as a function of the groups in ``present`` only; the others keep all of their units.

    Args:
        dim: the size that an attribute holds.
        present: group -> its size.
        value: the attribute.
        name: its name, with the position in a tuple.
    """
    groups = tuple((group, weight) for group, weight in dim.groups if group in present)
    if groups == dim.groups:
        return dim
    _, _, position = name.rstrip("]").partition("[")
    size = value[int(position)] if position else value
    return Dim(fixed=size - sum(weight * present[group] for group, weight in groups), groups=groups)


def layers_after(sizes: Mapping[str, LayerSizes], groups: Iterable[Group], kept: Kept) -> dict[str, Any]:
    """The entries of the structure for the modules that change when only ``kept`` is kept."""
    full = {group.name: group.size for group in groups}
    counts = {name: len(kept[name]) if name in kept else size for name, size in full.items()}
    entries = {name: entry_of(layer, lambda dim: dim.value(counts)) for name, layer in sizes.items()}
    dense = {name: entry_of(layer, lambda dim: dim.value(full)) for name, layer in sizes.items()}
    changed = {name for name, entry in entries.items() if entry != dense[name]}
    # A forward that infers the head size from the embedding width is rewritten if either of them changes.
    changed |= {n for n, layer in sizes.items() if layer.free_heads and any(c.startswith(f"{n}.") for c in changed)}
    return {name: entry for name, entry in entries.items() if name in changed}


def cut_copy(model: nn.Module, groups: Sequence[Group], kept: Kept, sizes: Mapping[str, LayerSizes]) -> nn.Module:
    """A copy of ``model`` that has been cut to ``kept``, with ``sizes`` from `layer_sizes`."""
    small = copied(model)
    for name, entry in layers_after(sizes, groups, kept).items():
        resize_module_(small.get_submodule(name), entry)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    assign_state_(small, select(groups, kept, state), strict=False)
    return small.requires_grad_(False)


def entry_of(layer: LayerSizes, value: Callable[[Dim], int]) -> dict[str, Any]:
    """The entry of the structure for one module, with ``value`` giving the size of a dimension."""
    entry: dict[str, Any] = {name: value(dim) for name, dim in layer.attributes.items()}
    if layer.tensors:
        entry[TENSORS] = {name: [value(dim) for dim in dims] for name, dims in layer.tensors.items()}
    if layer.free_heads:
        entry[FREE_HEADS] = True
    return entry


def resize_module_(module: nn.Module, entry: Mapping[str, Any]) -> None:
    """Resize one module to its entry of a structure; the contents of resized tensors are undefined.

    Raises:
        CheckpointError: the entry is damaged, or the forward cannot be rewritten with this version of the host.
    """
    for name, shape in entry.get(TENSORS, {}).items():
        old: Any = getattr(module, name)
        if list(old.shape) == list(shape):
            continue
        if isinstance(old, nn.Parameter):
            new = torch.empty(tuple(shape), dtype=old.dtype, device=old.device)
            module.register_parameter(name, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            # A buffer outside the state dict must be equal for all heads; otherwise the group fails its verification.
            module._buffers[name] = old[tuple(slice(size) for size in shape)].clone()
    for name, value in entry.items():
        if name not in (TENSORS, FREE_HEADS):
            _set_size(module, name, value)
    if entry.get(FREE_HEADS) and not has_free_heads(module):
        cls = free_heads_class(type(module))
        if cls is None:
            raise CheckpointError(
                f"The forward of {type(module).__name__} cannot be rewritten for fewer heads in the installed version "
                "of its library. Install the version named in provenance.json."
            )
        module.__class__ = cls
    module.__dict__[ENTRY] = dict(entry)
    clear_caches_(module)


def disable_nested_tensors_(model: nn.Module) -> None:
    """Disable the nested tensors of torch's encoders that have rewritten layers, which do not support them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(has_free_heads(layer) for layer in module.modules()):
            module.use_nested_tensor = False


def _set_size(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute, or one element of a tuple as in ``bias_shape[2]``."""
    attribute, _, position = name.rstrip("]").partition("[")
    old = getattr(module, attribute)
    items = list(old) if position else [old]
    index = int(position or 0)
    if type(items[index]) is not int or type(value) is not int or value < 1:
        raise CheckpointError(f"The structure sets {name!r} to {value!r}; it is damaged. Take an intact copy.")
    items[index] = value
    setattr(module, attribute, tuple(items) if position else value)
