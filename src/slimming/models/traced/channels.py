"""Read coupled channels as groups, from the dependency graph of torch-pruning.

A unit is a channel with everything that produces it (rows of convolutions and Linears, entries of a BatchNorm) and
everything that consumes it (columns of convolutions and Linears). Setting the columns to 0 is equivalent to removal,
regardless of the operations in between: activations, pooling, squeeze-and-excitation, depthwise convolutions.

Channels that a norm over all channels or attention reads are features of a residual stream if several layers add to
them: the embedding width, which is one group per stage in hierarchical models. After a cut, norms take their statistics
over what stays, and so do layers that standardise their weights over their input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from slimming.core.groups import Group, Scale, Slices
from slimming.errors import UnsupportedModelError
from slimming.models.traced.channel_parts import by_place
from slimming.models.traced.dependency_graph import Coupled, Member, coupled_channels, with_batch_norms
from slimming.models.traced.normalisers import Normaliser, NormLayers, further_rows
from slimming.models.traced.verification import Pass

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NOT_FOLLOWED = "torch-pruning does not follow what the model does with them"
DIFFERENT = "their units differ in size"

BEYOND = (
    "following them from {first} through {place} takes too many steps. Register a row for the attention class around "
    "it, as docs/add-a-model.md shows, so that it is not traced inside"
)

TensorDim = tuple[str, int]
"""A tensor's name and one of its dimensions."""


@dataclass(frozen=True, kw_only=True)
class OpaqueSlices:
    """The tensors inside an opaque module that belong to its input and output channels.

    Attributes:
        inputs: tensor, dimension and side (as in `Slices`) that belong to the input channels.
        outputs: tensor and dimension that belong to the output channels.
        norms: names of the norms inside the module that are over the input channels.
    """

    inputs: tuple[tuple[str, int, str], ...] = ()
    outputs: tuple[TensorDim, ...] = ()
    norms: tuple[str, ...] = ()


@dataclass
class ChannelSet:
    """A set of coupled channels: the indices of each root channel in each tensor.

    Attributes:
        name: of the module whose channels are the root channels.
        indices: (tensor and dimension, side) -> root channel -> indices along the dimension.
        only_linear: whether there is no convolution among the layers.
        reason: why the channels cannot be cut, if so.
        grouped: names of the grouped convolutions.
        norms: names of the norms over all channels.
        standardised: names of the layers that standardise their weights over these channels.
        makers: names of the layers that make the channels, without grouped convolutions.
        has_opaque: whether the channels are inputs or outputs of an opaque module.
    """

    name: str
    indices: dict[tuple[TensorDim, str], dict[int, set[int]]] = field(default_factory=dict)
    only_linear: bool = True
    reason: str | None = None
    grouped: set[str] = field(default_factory=set)
    norms: set[str] = field(default_factory=set)
    standardised: set[str] = field(default_factory=set)
    makers: set[str] = field(default_factory=set)
    has_opaque: bool = False

    @property
    def is_width(self) -> bool:
        """Whether the channels are features of a residual stream, to which layers of several modules add.

        Channels that a norm reads, and that the layers of one module make, such as an MLP with a gate, are hidden.
        """
        parents = {name.rpartition(".")[0] for name in self.makers}
        return self.has_opaque or (bool(self.norms) and len(self.makers) > 1 and (len(parents) > 1 or "" in parents))

    def add(self, tensor: str, dim: int, side: str, pairs: Iterable[tuple[int, int]]) -> None:
        """Add the ``pairs`` of root channel and index for one dimension of a tensor."""
        by_root = self.indices.setdefault(((tensor, dim), side), {})
        for root, index in pairs:
            by_root.setdefault(root, set()).add(index)


def channel_groups(
    model: nn.Module,
    passes: Sequence[Pass],
    claimed: Mapping[str, str],
    opaque: Mapping[str, OpaqueSlices],
    norm_layers: NormLayers,
    report: Callable[[str], None] = lambda layer: None,
) -> tuple[list[Group], list[str]]:
    """Read the coupled channels of ``model``.

    Args:
        model: on the CPU, with parameters that require gradients.
        passes: the forward passes to trace.
        claimed: names of modules that are not traced inside -> why the channels that pass through them are not cut.
        opaque: those of them whose input and output channels are known.
        norm_layers: the layers that take statistics over channels.
        report: called with the name of each layer whose channels are followed.

    Returns:
        The groups, and the sets that are not cut, counted by reason.
    """
    model = with_batch_norms(model)
    try:
        coupled = coupled_channels(model, passes, claimed, norm_layers.normalisers, report=report)
    except UnsupportedModelError as error:
        return [], [f"channels: {error}"]
    names = {id(module): name for name, module in model.named_modules()}
    names |= {id(parameter): name for name, parameter in model.named_parameters()}
    sets = _with_grouped_joined([_channel_set(each, names, claimed, opaque, norm_layers, model) for each in coupled])
    groups: dict[str, Group] = {}
    reasons: dict[str, int] = {}
    for channels in sets:
        result = channels.reason or group_from(channels, model)
        if isinstance(result, Group) and result.name not in groups:
            groups[result.name] = result
        else:
            reason = str(result)
            reasons[reason] = reasons.get(reason, 0) + 1
    numbers = {reason: f"{count} sets" if count > 1 else "1 set" for reason, count in sorted(reasons.items())}
    uncovered = [f"{number} of channels: {reason}" for reason, number in numbers.items()]
    return list(groups.values()), uncovered


def _channel_set(
    coupled: Coupled,
    names: Mapping[int, str],
    claimed: Mapping[str, str],
    opaque: Mapping[str, OpaqueSlices],
    norm_layers: NormLayers,
    model: nn.Module,
) -> ChannelSet:
    channels = ChannelSet(names.get(id(coupled.members[0].module), "?"))
    if coupled.beyond is not None:
        inside = type(model.get_submodule(coupled.beyond)).__name__
        channels.reason = BEYOND.format(first=channels.name, place=f"{coupled.beyond or 'the model'} ({inside})")
        return channels
    for member in coupled.members:
        name = names.get(id(member.module))
        if name is None:
            continue  # an operation without weights
        reason = _claim(name, claimed)
        if reason is not None and name not in opaque:
            channels.reason = channels.reason or reason
        elif None in member.roots:
            channels.reason = channels.reason or NOT_FOLLOWED
        else:
            pairs = [(int(root), int(index)) for root, index in zip(member.roots, member.indices, strict=True)]
            if name in opaque:
                _add_opaque(channels, opaque[name], member.is_output, pairs)
            else:
                _add_layer(channels, name, member, pairs, norm_layers)
    return channels


def _add_opaque(channels: ChannelSet, slices: OpaqueSlices, is_output: bool, pairs: list[tuple[int, int]]) -> None:
    channels.has_opaque = True
    if is_output:
        for tensor, dim in slices.outputs:
            channels.add(tensor, dim, "produces", pairs)
        return
    for tensor, dim, side in slices.inputs:
        channels.add(tensor, dim, side, pairs)
    channels.norms.update(slices.norms)


def _add_layer(
    channels: ChannelSet, name: str, member: Member, pairs: list[tuple[int, int]], norm_layers: NormLayers
) -> None:
    module = member.module
    if isinstance(module, nn.Parameter):
        channels.add(name, int(member.dim), "produces", pairs)
    elif name in norm_layers.normalisers:
        _add_normaliser(channels, name, norm_layers.normalisers[name], pairs)
    elif isinstance(module, CONV) and module.groups > 1:
        channels.only_linear = False
        _add_grouped(channels, name, module, member.is_output, pairs)
    elif isinstance(module, TRANSPOSED) and module.groups == 1:
        channels.only_linear = False
        _add_weighted(channels, name, module, member.is_output, pairs, dims=(1, 0))
    elif isinstance(module, (nn.Linear, *CONV)):
        channels.only_linear &= isinstance(module, nn.Linear)
        _add_weighted(channels, name, module, member.is_output, pairs)
        if member.is_output:
            channels.makers.add(name)
        elif name in norm_layers.standardised:
            channels.standardised.add(name)
    elif isinstance(module, BATCH_NORM) or (isinstance(module, nn.LayerNorm) and module.weight is not None):
        if isinstance(module, nn.LayerNorm):
            channels.norms.add(name)
        for tensor in _vectors(module):
            channels.add(f"{name}.{tensor}", 0, "produces", pairs)
    elif isinstance(module, nn.Embedding):
        channels.add(f"{name}.weight", 1, "produces", pairs)
    elif isinstance(module, nn.PReLU):
        if module.num_parameters > 1:
            channels.add(f"{name}.weight", 0, "produces", pairs)
    else:
        channels.reason = channels.reason or f"a {type(module).__name__} mixes them"


def _add_normaliser(channels: ChannelSet, name: str, normaliser: Normaliser, pairs: list[tuple[int, int]]) -> None:
    """Add a normaliser. Channels that share statistics with few others are removed together with them."""
    if normaliser.over_all:
        channels.norms.add(name)
    together = [(root, each) for root, index in pairs for each in normaliser.removed_with(index)]
    for tensor, dim in normaliser.tensors.items():
        channels.add(f"{name}.{tensor}", dim, "produces", together)


def _claim(name: str, claimed: Mapping[str, str]) -> str | None:
    """The reason in ``claimed`` for the module ``name`` or a module that contains it, if any."""
    parts = name.split(".")
    paths = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return next((claimed[path] for path in paths if path in claimed), None)


def _with_grouped_joined(sets: Iterable[ChannelSet]) -> list[ChannelSet]:
    """Join the sets of inputs and outputs of a grouped convolution, whose groups are removed from both."""
    result: list[ChannelSet] = []
    for channels in sets:
        joined = channels
        for earlier in [earlier for earlier in result if earlier.grouped & channels.grouped]:
            result.remove(earlier)
            joined = _join(earlier, joined)
        result.append(joined)
    return result


def _join(first: ChannelSet, second: ChannelSet) -> ChannelSet:
    offset = 1 + max((root for by_root in first.indices.values() for root in by_root), default=0)
    for key, by_root in second.indices.items():
        target = first.indices.setdefault(key, {})
        for root, indices in by_root.items():
            target.setdefault(root + offset, set()).update(indices)
    first.only_linear &= second.only_linear
    first.reason = first.reason or second.reason
    first.grouped |= second.grouped
    first.norms |= second.norms
    first.standardised |= second.standardised
    first.makers |= second.makers
    first.has_opaque |= second.has_opaque
    return first


def _vectors(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers of one dimension."""
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [name for name, tensor in tensors if tensor.dim() == 1]


def _add_weighted(
    channels: ChannelSet,
    name: str,
    module: Any,
    is_output: bool,
    pairs: list[tuple[int, int]],
    dims: tuple[int, int] = (0, 1),
) -> None:
    """Add a layer; ``dims`` are the dimensions of the outputs and of the inputs in its weight."""
    if not is_output:
        channels.add(f"{name}.weight", dims[1], "consumes", pairs)
        return
    channels.add(f"{name}.weight", dims[0], "produces", pairs)
    if module.bias is not None:
        channels.add(f"{name}.bias", 0, "produces", pairs)
    for tensor, _ in further_rows(module, len(module.weight)):
        channels.add(f"{name}.{tensor}", 0, "produces", pairs)


def _add_grouped(channels: ChannelSet, name: str, module: Any, is_output: bool, pairs: list[tuple[int, int]]) -> None:
    """Add a grouped convolution. Whole groups are removed: their output rows and the input channels they read."""
    per_group = (module.out_channels if is_output else module.in_channels) // module.groups
    rows = module.out_channels // module.groups
    groups = {(root, index // per_group) for root, index in pairs}
    row_pairs = [(root, group * rows + row) for root, group in groups for row in range(rows)]
    channels.grouped.add(name)
    channels.add(f"{name}.weight", 0, "produces", row_pairs)
    if module.bias is not None:
        channels.add(f"{name}.bias", 0, "produces", row_pairs)
    for tensor, _ in further_rows(module, len(module.weight)):
        channels.add(f"{name}.{tensor}", 0, "produces", row_pairs)


def _repeat_(channels: ChannelSet, model: nn.Module) -> None:
    """Extend tensors that are a multiple of the width to all copies of each channel.

    This is for neighbours that are concatenated before a norm and a layer, as in the downsampling of Swin.
    torch-pruning follows such concatenations in part or not at all. Here the blocks of all channels are assumed to be
    consecutive; the verification of the group shows whether they are.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    width = 1 + max((root for by_root in channels.indices.values() for root in by_root), default=0)
    for ((name, dim), _), by_root in channels.indices.items():
        length = tensors[name].shape[dim] if name in tensors else width
        if length > width and length % width == 0 and sum(map(len, by_root.values())) < length:
            by_root.clear()
            by_root.update((root, set(range(root, length, width))) for root in range(width))


def group_from(channels: ChannelSet, model: nn.Module) -> Group | str:
    """The group of a set of coupled channels, or the reason why there is none."""
    if channels.is_width:
        _repeat_(channels, model)
    slices = _slices(channels, model)
    if slices == DIFFERENT and (parts := _by_place(channels, model)) is not None:
        channels.indices = parts
        slices = _slices(channels, model)
    if isinstance(slices, str):
        return slices
    if not any(part.side == "consumes" for part in slices):
        return "they are outputs of the model"
    if not any(part.side == "produces" and part.tensor.endswith("weight") for part in slices):
        return "no layer of the model produces them"
    kind, suffix = "channel", "channels"
    if channels.is_width:
        kind, suffix = "width", "width"
    elif channels.only_linear or _in_mlp(channels.name, model):
        kind, suffix = "mlp", "hidden"
    consumed = (part for part in slices if part.side == "consumes")
    return Group(
        name=f"{channels.name}.{suffix}",
        kind=kind,
        size=len(slices[0].index),
        site=channels.name,
        role=kind,
        slices=tuple(slices),
        scales=tuple(Scale(tensor=part.tensor, dim=part.dim, index=part.index) for part in consumed),
        norms=tuple(sorted(channels.norms | channels.standardised)),
    )


def _by_place(channels: ChannelSet, model: nn.Module) -> dict[tuple[TensorDim, str], dict[int, set[int]]] | None:
    """The channels by their places in equal parts, see `slimming.models.traced.channel_parts`."""
    if any(model.get_submodule(name).weight.shape[1] > 1 for name in channels.grouped):
        return None  # whole groups of these convolutions are removed, which are no parts
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])
    return by_place(channels.indices, [tensors[tensor].shape[dim] for (tensor, dim), _ in channels.indices])


def _slices(channels: ChannelSet, model: nn.Module) -> list[Slices] | str:
    """The slices of every unit, or the reason why the channels do not form units."""
    roots = sorted({root for by_root in channels.indices.values() for root in by_root})
    unit_of_root = _units(roots, channels.indices.values())
    units = sorted(set(unit_of_root.values()))
    if len(units) < 2:
        return "they can only be removed all together"
    number = {unit: position for position, unit in enumerate(units)}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    shapes = {name: tensor.shape for name, tensor in tensors}
    result: list[Slices] = []
    for ((tensor, dim), side), by_root in channels.indices.items():
        index: list[set[int]] = [set() for _ in units]
        for root, indices in by_root.items():
            index[number[unit_of_root[root]]] |= indices
        if len({len(indices) for indices in index}) != 1:
            return DIFFERENT
        if max(max(indices) for indices in index) >= shapes[tensor][dim]:
            return NOT_FOLLOWED
        result.append(Slices(tensor=tensor, dim=dim, index=tuple(tuple(sorted(each)) for each in index), side=side))
    return result


def _in_mlp(name: str, model: nn.Module) -> bool:
    """Whether a convolution is the first layer of a module whose class name says that it is an MLP."""
    parents = [type(model.get_submodule(name.rsplit(".", depth)[0])).__name__.lower() for depth in (1, 2)]
    return any(word in parent for parent in parents for word in ("mlp", "ffn", "feedforward"))


def _units(roots: Sequence[int], indices: Iterable[Mapping[int, set[int]]]) -> dict[int, int]:
    """Root channel -> its unit, which is the smallest root of those that share an index of some tensor (union-find)."""
    parent = {root: root for root in roots}

    def find(root: int) -> int:
        while parent[root] != root:
            parent[root] = root = parent[parent[root]]
        return root

    for by_root in indices:
        first_root: dict[int, int] = {}
        for root, own in by_root.items():
            for index in own:
                first, second = find(first_root.setdefault(index, root)), find(root)
                parent[max(first, second)] = min(first, second)
    return {root: find(root) for root in roots}
