"""Select the kept part of every tensor and resize modules, in the same way for every kind of group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.copies import clear_caches_, copied
from slimming.core.formulas import Dim, Ratio
from slimming.core.groups import Group, LayerSizes, Slices
from slimming.errors import CheckpointError
from slimming.models.family import ENTRY, Kept, assign_state_, select_indices, shared_parameters, tie_
from slimming.models.layers import Removed
from slimming.models.separate import SeparateLinear, join_, separate_
from slimming.models.traced.channels import BATCH_NORM, CONV, TRANSPOSED
from slimming.models.traced.free_heads import free_heads_class, has_free_heads
from slimming.models.traced.heads import Attributes
from slimming.models.traced.input_columns import COLUMNS, columns_entry
from slimming.models.traced.token_blocks import TABLE, TOKENS, adapt_, token_entries

TENSORS, FREE_HEADS, SEPARATE, REMOVED, SPENT = "tensors", "free_heads", "separate", "removed", "spent"
"""Further keys of a structure's entry, next to the attributes: tensor shapes, whether the forward is rewritten, the
sizes of heads in the parts of a projection (see `slimming.core.groups.LayerSizes`), what is returned in place of a
module that was removed, and which parameters only a removed branch used."""
HEADS = "heads"
"""Attribute of a `SeparateLinear`, which the entry `SEPARATE` sets too."""
Separate = dict[str, tuple[Dim | Ratio, ...]]
"""Name of a projection -> its `slimming.core.groups.LayerSizes.separate`."""


def removed_indices(groups: Iterable[Group], kept: Kept) -> dict[str, dict[int, set[int]]]:
    """Tensor -> dimension -> indices that are removed."""
    result: dict[str, dict[int, set[int]]] = {}
    for group in groups:
        left = set(kept.get(group.name, range(group.size)))
        removed = set(range(group.size)) - left
        if removed and group.role != "qkv":  # its units are those of QK and V
            for part in group.slices:
                indices = result.setdefault(part.tensor, {}).setdefault(part.dim, set())
                gone = {index for unit in removed for index in part.index[unit]}
                # What heads share stays while one of them has it.
                indices |= gone - {index for unit in left for index in part.index[unit]}
    return result


def select(
    groups: Sequence[Group], kept: Kept, state: Mapping[str, Tensor], sizes: Mapping[str, LayerSizes]
) -> dict[str, Tensor]:
    """The state dict of the slim model, selected from that of the dense one."""
    result = {**state, **scaled_rows(groups, kept, state, sizes)}
    for name, dims in removed_indices(groups, kept).items():
        tensor = result.get(name)
        if tensor is not None:  # a buffer may be outside the state dict
            indices = {dim: [i for i in range(tensor.shape[dim]) if i not in removed] for dim, removed in dims.items()}
            result[name] = select_indices(tensor, indices)
    return result


def scaled_rows(
    groups: Sequence[Group], kept: Kept, state: Mapping[str, Tensor], sizes: Mapping[str, LayerSizes]
) -> dict[str, Tensor]:
    """The tensors whose rows preserve the scale of the logits, see `LayerSizes.head_scale`.

    The forward divides the logits by the square root of the head size that it has. The factor of the dense model has to
    be preserved (ViT-Slim, section 3.2), so queries or keys are multiplied by the quotient.
    """
    by_name = {group.name: group for group in groups}
    result: dict[str, Tensor] = {}
    for name, side in (layer.head_scale for layer in sizes.values() if layer.head_scale is not None):
        group = by_name[name]
        units = kept.get(name, range(group.size))
        if not units:
            continue  # the whole attention is removed
        head = next((part for unit, part in enumerate(group.part_of_unit) if unit in set(units)), 0)
        dense, left = group.limits.parts[head], sum(group.part_of_unit[unit] == head for unit in units)
        for part in group.slices if left < dense else ():
            # A norm undoes factors of what it reads.
            scaled = not group.norms or part.tensor.rpartition(".")[0] in group.norms
            if part.side == side and scaled and part.tensor in state:
                tensor = result.setdefault(part.tensor, state[part.tensor].clone())
                rows = torch.tensor([index for unit in part.index for index in unit], device=tensor.device)
                factor = torch.ones(tensor.shape[part.dim], dtype=tensor.dtype, device=tensor.device)
                factor[rows] = (left / dense) ** 0.5
                tensor *= factor.view([-1 if dim == part.dim else 1 for dim in range(tensor.dim())])
    return result


def is_shared(part: Slices) -> bool:
    """Whether several units, of different heads, have the same entries of a tensor."""
    indices = [index for unit in part.index for index in unit]
    return len(set(indices)) < len(indices)


def per_head(group: Group, heads: Group | None, weight: int) -> Ratio:
    """The number of entries that all heads share: ``weight`` for each unit of ``group`` in one head."""
    parts = Dim(fixed=len(group.limits.parts)) if heads is None else Dim(groups=((heads.name, 1),))
    return Ratio(total=Dim(groups=((group.name, weight),)), parts=parts)


def tensor_dims(groups: Sequence[Group], shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[Dim | Ratio, ...]]:
    """The dimensions of every tensor as functions of the kept units.

    Slices of groups may overlap: the rows of a head are those of its dimensions. Such rows are counted by the smallest
    units, since units that are removed with larger ones are not among the kept ones.
    """
    parts: dict[tuple[str, int], list[tuple[Group, Slices]]] = {}
    for group in groups:
        for part in group.slices if group.role != "qkv" else ():
            parts.setdefault((part.tensor, part.dim), []).append((group, part))
    users: dict[tuple[str, int], list[tuple[str, int, int]]] = {}
    shared: dict[tuple[str, int], tuple[Group, int]] = {}
    heads = {group.site: group for group in groups if group.role == "head"}
    for at, users_of in parts.items():
        counted: set[int] = set()
        for group, part in sorted(users_of, key=lambda each: len(each[1].index[0])):
            weight = len(set(part.index[0]) - counted)
            if is_shared(part):
                shared[at] = (group, weight)
            elif weight:
                users.setdefault(at, []).append((group.name, weight, group.size))
                counted.update(index for unit in part.index for index in unit)
    result = {}
    for name, shape in shapes.items():
        dims: list[Dim | Ratio] = []
        for dim, length in enumerate(shape):
            if (name, dim) in shared:
                group, weight = shared[name, dim]
                dims.append(per_head(group, heads.get(group.site), weight))
                continue
            weights = users.get((name, dim), [])
            fixed = length - sum(weight * size for _, weight, size in weights)
            dims.append(Dim(fixed=fixed, groups=tuple((group, weight) for group, weight, _ in weights)))
        result[name] = tuple(dims)
    return result


def layer_attributes(model: nn.Module, dims: Mapping[str, tuple[Dim | Ratio, ...]]) -> Attributes:
    """The size attributes of every layer whose weight depends on a group: Linear, convolution, norm and PReLU."""
    result: Attributes = {}
    for name, module in model.named_modules():
        weight = dims.get(f"{name}.weight")
        if weight is None or not any(dim.groups for dim in weight):
            continue
        if isinstance(module, nn.Linear):
            result[name] = {"out_features": weight[0], "in_features": weight[1]}
        elif isinstance(module, TRANSPOSED):
            result[name] = {"out_channels": weight[1], "in_channels": weight[0]}
        elif isinstance(module, CONV) and module.groups == 1:
            result[name] = {"out_channels": weight[0], "in_channels": weight[1]}
        elif isinstance(module, CONV):
            result[name] = _grouped_attributes(module, weight[0])
        elif isinstance(module, BATCH_NORM):
            result[name] = {"num_features": weight[0]}
        elif isinstance(module, nn.Embedding):
            result[name] = {"embedding_dim": weight[1]}
        elif isinstance(module, nn.PReLU):
            result[name] = {"num_parameters": weight[0]}
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
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
    unit_attributes: Sequence[Attributes],
    free_heads: Collection[str],
    head_scales: Mapping[str, tuple[str, str]] | None = None,
    separate: Sequence[Separate] = (),
) -> dict[str, LayerSizes]:
    """The sizes of every module that depends on ``groups``.

    Args:
        model: the model.
        groups: its groups.
        unit_attributes: attributes of modules with the number of heads or hidden units; later ones come before earlier
            ones, unless they depend on groups that are not in ``groups``.
        free_heads: names of attention modules whose forward infers the head size from the embedding width.
        head_scales: name of an attention module -> its `LayerSizes.head_scale`.
        separate: name of a projection -> its `LayerSizes.separate`; as for ``unit_attributes``.
    """
    present = {group.name for group in groups}
    shapes = {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    dims = tensor_dims(groups, shapes)
    result: dict[str, LayerSizes] = {}
    tensors: dict[str, dict[str, tuple[Dim | Ratio, ...]]] = {}
    for tensor, sizes in dims.items():
        if any(dim.groups for dim in sizes):
            module, _, name = tensor.rpartition(".")
            tensors.setdefault(module, {})[name] = sizes
    attributes = layer_attributes(model, dims)
    for module, values in (each for all_of in unit_attributes for each in all_of.items()):
        used = {name: dim for name, dim in values.items() if {group for group, _ in dim.groups} <= present}
        if used:
            attributes[module] = {**attributes.get(module, {}), **used}
    scales = {name: scale for name, scale in (head_scales or {}).items() if scale[0] in present}
    rewritten = [name for name in free_heads if any(f"{module}.".startswith(f"{name}.") for module in tensors)]
    parts: Separate = {}
    for name, sizes in (each for all_of in separate for each in all_of.items()):
        if {group for size in sizes for group, _ in size.groups} <= present:
            parts[name] = sizes
    columns = {group.site: group for group in groups if group.inputs}
    for module in {**tensors, **attributes, **dict.fromkeys(rewritten), **scales, **columns}:
        result[module] = LayerSizes(
            tensors=tensors.get(module, {}),
            attributes=attributes.get(module, {}),
            free_heads=module in free_heads,
            head_scale=scales.get(module),
            separate=parts.get(module, ()),
            columns=columns.get(module),
        )
    return result


def layers_after(sizes: Mapping[str, LayerSizes], groups: Iterable[Group], kept: Kept) -> dict[str, Any]:
    """The entries of the structure for the modules that change when only ``kept`` is kept."""
    full = {group.name: group.size for group in groups}
    counts = {name: len(kept[name]) if name in kept else size for name, size in full.items()}
    gone = [name for name, layer in sizes.items() if any(removal.kept.value(counts) == 0 for removal in layer.removals)]
    inside = tuple(f"{name}." for name in gone)
    sizes = {name: layer for name, layer in sizes.items() if not name.startswith(inside)}
    entries = {name: entry_of(layer, lambda dim: dim.value(counts)) for name, layer in sizes.items()}
    for name, layer in sizes.items():
        if layer.columns is not None and layer.columns.name in kept and REMOVED not in entries[name]:
            entries[name] |= columns_entry(layer.columns, kept[layer.columns.name])
    dense = {name: entry_of(layer, lambda dim: dim.value(full)) for name, layer in sizes.items()}
    for name, entry in entries.items():
        # A size of units that went with a branch does not matter any more.
        entry.update({key: dense[name][key] for key, value in entry.items() if type(value) is int and value == 0})
    changed = {name for name, entry in entries.items() if entry != dense[name]}
    # A forward that infers the head size from the embedding width is rewritten if either of them changes.
    changed |= {n for n, layer in sizes.items() if layer.free_heads and any(c.startswith(f"{n}.") for c in changed)}
    result = {name: entry for name, entry in entries.items() if name in changed}
    for name, entry in token_entries(list(groups), kept).items():
        if REMOVED not in result.get(name, {}) or TOKENS in entry:  # a removed attention has no table
            result[name] = {**result.get(name, {}), **entry}
    return without_removed(result)


def without_removed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """``entries`` without those of modules inside a module that is removed."""
    removed = tuple(f"{name}." for name, entry in entries.items() if REMOVED in entry)
    return {name: entry for name, entry in entries.items() if not name.startswith(removed)}


def cut_copy(model: nn.Module, groups: Sequence[Group], kept: Kept, sizes: Mapping[str, LayerSizes]) -> nn.Module:
    """A copy of ``model`` that has been cut to ``kept``, with ``sizes`` from `layer_sizes`.

    It shares with ``model`` the parameters that are not cut.
    """
    small = copied(model, {id(parameter): parameter for parameter in model.parameters()})
    shared, entries = shared_parameters(small), layers_after(sizes, groups, kept)
    for name, entry in entries.items():
        resize_(small, name, entry)
    tie_(small, shared)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    state = {name: tensor for name, tensor in tensors if not is_removed(name, entries)}
    assign_state_(small, select(groups, kept, state, sizes), strict=False)
    return small.requires_grad_(False)


def entry_of(layer: LayerSizes, value: Callable[[Dim | Ratio], int | float]) -> dict[str, Any]:
    """The entry of the structure for one module, with ``value`` giving the size of a dimension."""
    for removal in layer.removals:
        if value(removal.kept) == 0:
            form, results = removal.returns
            return {REMOVED: [form, [list(result) for result in results]]}
    entry: dict[str, Any] = {name: value(dim) for name, dim in layer.attributes.items()}
    if layer.tensors:
        entry[TENSORS] = {name: [value(dim) for dim in dims] for name, dims in layer.tensors.items()}
    if layer.free_heads:
        entry[FREE_HEADS] = True
    spent = sorted(name for name, kept in layer.spent.items() if value(kept) == 0)
    if spent:
        entry[SPENT] = spent
        entry[TENSORS] = {name: shape for name, shape in entry.get(TENSORS, {}).items() if name not in spent}
    if layer.separate:
        entry[SEPARATE] = [value(size) for size in layer.separate]
    return entry


def merged(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a structure after a further cut; what it does not change stays as the earlier cuts left it."""
    result = {**earlier, **later}
    for name in earlier.keys() & later.keys():
        before, after = earlier[name], later[name]
        if REMOVED in after:
            result[name] = {**{key: value for key, value in before.items() if key in (TOKENS, TABLE)}, **after}
            continue
        result[name] = {**before, **after}
        spent = sorted({*before.get(SPENT, ()), *after.get(SPENT, ())})
        shapes = {**before.get(TENSORS, {}), **after.get(TENSORS, {})}
        if SEPARATE in after:
            result[name].pop(HEADS, None)
        elif SEPARATE in before and HEADS in after:
            result[name][SEPARATE] = [result[name].pop(HEADS), *before[SEPARATE][1:]]
        result[name] |= {SPENT: spent} if spent else {}
        result[name] |= {TENSORS: {key: shape for key, shape in shapes.items() if key not in spent}} if shapes else {}
    return without_removed(result)


def is_removed(tensor: str, entries: Mapping[str, Any]) -> bool:
    """Whether the entries of a structure say that a tensor does not exist any more."""
    owner, _, name = tensor.rpartition(".")
    removed = (f"{module}." for module, entry in entries.items() if REMOVED in entry)
    return name in entries.get(owner, {}).get(SPENT, ()) or any(tensor.startswith(module) for module in removed)


def resize_(model: nn.Module, name: str, entry: Mapping[str, Any]) -> None:
    """Resize, or remove, the module ``name`` of ``model``, see `resize_module_`."""
    module = model.get_submodule(name)
    if REMOVED not in entry:
        resize_module_(module, entry)
        return
    if not isinstance(module, Removed):
        parent, _, last = name.rpartition(".")
        module = Removed(module, *entry[REMOVED])
        model.get_submodule(parent)._modules[last] = module
    # A removed block still selects the tokens for those after it.
    adapt_(module, entry, next(model.parameters(), None))
    module.__dict__[ENTRY] = dict(entry)


def resize_module_(module: nn.Module, entry: Mapping[str, Any]) -> None:
    """Resize one module to its entry of a structure; the contents of resized tensors are undefined.

    Entries that were read from a file are checked by `slimming.models.traced.entries.check_entry` first.

    Raises:
        CheckpointError: the forward cannot be rewritten with this version of the host.
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
    for name in entry.get(SPENT, ()):
        spent = getattr(module, name)
        if isinstance(spent, nn.Parameter):
            # It multiplies zeros now. One element, which is not in the state dict, keeps the host's forward as it is.
            delattr(module, name)
            module.register_buffer(name, spent.new_zeros((1,) * spent.dim()).detach(), persistent=False)
    if SEPARATE in entry:
        heads, size, *parts = entry[SEPARATE]
        if set(parts) != {size}:
            separate_(module, heads, size, parts)
        elif isinstance(module, SeparateLinear):
            join_(module)
    for name, value in entry.items():
        if name in (TENSORS, FREE_HEADS, SEPARATE, SPENT, TOKENS, TABLE, COLUMNS):
            continue
        if name != HEADS or SEPARATE not in entry:
            _set_size(module, name, value)
    if entry.get(FREE_HEADS) and not has_free_heads(module):
        cls = free_heads_class(type(module))
        if cls is None:
            raise CheckpointError(
                f"The forward of {type(module).__name__} cannot be rewritten for fewer heads in the installed version "
                "of its library. Install the version named in provenance.json."
            )
        module.__class__ = cls
    adapt_(module, entry, next(module.parameters(), None))
    module.__dict__[ENTRY] = dict(entry)
    clear_caches_(module)


def disable_nested_tensors_(model: nn.Module) -> None:
    """Disable the nested tensors of torch's encoders that have rewritten layers, which do not support them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(has_free_heads(layer) for layer in module.modules()):
            module.use_nested_tensor = False


def _set_size(module: nn.Module, name: str, value: Any) -> None:
    """Set a size, or one element of a tuple of sizes as in ``bias_shape[2]``, or the scale of logits."""
    attribute, _, position = name.rstrip("]").partition("[")
    old = getattr(module, attribute)
    items = list(old) if position else [old]
    index = int(position or 0)
    items[index] = bool(value) if type(items[index]) is bool else value  # a switch of the host
    setattr(module, attribute, tuple(items) if position else items[0])
