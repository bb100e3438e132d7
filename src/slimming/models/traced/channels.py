"""Channels that go together, from the dependency graph of torch-pruning, as groups.

A unit is a channel with everything that makes it (rows of convolutions and Linears, entries of a BatchNorm)
and everything that reads it (columns of convolutions and Linears). Setting the columns to 0 is then the same as
removal, whatever lies between: activations, pooling, squeeze-and-excite, a depthwise convolution.

Channels that LayerNorms or attention read are features of a residual stream: the embedding width, one group per stage
in hierarchical models. The norms take their statistics over what stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from slimming.core.groups import Group, Scale, Slices
from slimming.errors import UnsupportedModelError
from slimming.models.traced.dependency_graph import Member, coupled, thawed

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
LOST = "torch-pruning does not follow what the model does with them"

Place = tuple[str, int]
"""A tensor's name and one of its dimensions."""


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Where channels go into a module that another reader has read, and where they come out.

    Attributes:
        into: what goes with a channel of the input: a tensor, its dimension, and the side as in `Slices`.
        makes: tensors and their dimensions that go with a channel of the output.
        norms: names of the norms over what is as wide as the input.
    """

    into: tuple[tuple[str, int, str], ...] = ()
    makes: tuple[Place, ...] = ()
    norms: tuple[str, ...] = ()


@dataclass
class _Found:
    """One coupled set of channels: where each root channel lies in each tensor."""

    name: str
    places: dict[tuple[Place, str], dict[int, set[int]]] = field(default_factory=dict)
    linear: bool = True
    reason: str | None = None
    grouped: set[str] = field(default_factory=set)
    norms: set[str] = field(default_factory=set)
    through: bool = False

    @property
    def wide(self) -> bool:
        """Whether these are features of a residual stream."""
        return bool(self.norms) or self.through

    def add(self, tensor: str, dim: int, side: str, pairs: Iterable[tuple[int, int]]) -> None:
        owned = self.places.setdefault(((tensor, dim), side), {})
        for root, place in pairs:
            owned.setdefault(root, set()).add(place)


def channel_groups(
    model: nn.Module, example: Any, claimed: Mapping[str, str], ends: Mapping[str, Ends]
) -> tuple[list[Group], list[str]]:
    """Read the coupled channels of ``model``.

    Args:
        model: in evaluation mode, on the CPU, with parameters that require gradients.
        example: what its forward takes.
        claimed: names of modules that another reader has read -> why channels that pass through are left out.
        ends: those of them that are known from outside.

    Returns:
        The groups, and what was left out with the reason.
    """
    model = thawed(model)
    try:
        sets = coupled(model, example, claimed)
    except UnsupportedModelError as error:
        return [], [f"channels: {error}"]
    names = {id(module): name for name, module in model.named_modules()}
    names |= {id(parameter): name for name, parameter in model.named_parameters()}
    found = _joined([_found(members, names, claimed, ends, model) for members in sets])
    groups: list[Group] = []
    reasons: dict[str, int] = {}
    taken: set[str] = set()
    for one in found:
        made = None if one.reason else group_from(one, model)
        if isinstance(made, Group) and made.name not in taken:
            groups.append(made)
            taken.add(made.name)
        else:
            reason = one.reason or str(made)
            reasons[reason] = reasons.get(reason, 0) + 1
    numbers = {reason: f"{count} sets" if count > 1 else "1 set" for reason, count in sorted(reasons.items())}
    uncovered = [f"{number} of channels: {reason}" for reason, number in numbers.items()]
    return groups, uncovered


def _found(
    members: Sequence[Member],
    names: Mapping[int, str],
    claimed: Mapping[str, str],
    ends: Mapping[str, Ends],
    model: nn.Module,
) -> _Found:
    found = _Found(names.get(id(members[0].module), "?"))
    for item in members:
        module, out = item.module, item.makes
        name = names.get(id(module))
        if name is None:
            continue  # an operation without weights
        reason = _claim(name, claimed)
        if reason is not None and name not in ends:
            found.reason = found.reason or reason
            continue
        if None in item.roots:
            found.reason = found.reason or LOST
            continue
        pairs = [(int(root), int(place)) for root, place in zip(item.roots, item.places, strict=True)]
        if name in ends:
            found.through = True
            for tensor, dim in ends[name].makes if out else ():
                found.add(tensor, dim, "produces", pairs)
            for tensor, dim, side in () if out else ends[name].into:
                found.add(tensor, dim, side, pairs)
            found.norms.update(() if out else ends[name].norms)
        elif isinstance(module, nn.Parameter):
            found.add(name, int(item.dim), "produces", pairs)
        elif isinstance(module, nn.Linear):
            _add_weighted(found, name, module, out, pairs)
        elif isinstance(module, CONV):
            found.linear = False
            if module.groups > 1:
                _add_grouped(found, name, module, out, pairs)
            else:
                _add_weighted(found, name, module, out, pairs)
        elif isinstance(module, BATCH_NORM):
            for tensor in _vectors(module):
                found.add(f"{name}.{tensor}", 0, "produces", pairs)
        elif isinstance(module, nn.LayerNorm) and module.weight is not None:
            found.norms.add(name)
            for tensor in _vectors(module):
                found.add(f"{name}.{tensor}", 0, "produces", pairs)
        elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
            found.add(f"{name}.weight", 0, "produces", pairs)
        elif isinstance(module, nn.PReLU):
            continue
        else:
            found.reason = found.reason or f"a {type(module).__name__} mixes them"
    return found


def _claim(name: str, claimed: Mapping[str, str]) -> str | None:
    """Why channels do not pass through the module ``name``, if another reader has it."""
    around = (".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 2))
    return next((claimed[one] for one in around if one in claimed), None)


def _joined(sets: Iterable[_Found]) -> list[_Found]:
    """Join the sets in front of and behind a grouped convolution, whose groups go with both."""
    result: list[_Found] = []
    for one in sets:
        for other in [found for found in result if found.grouped & one.grouped]:
            result.remove(other)
            one = _join(other, one)
        result.append(one)
    return result


def _join(first: _Found, second: _Found) -> _Found:
    offset = 1 + max((root for owned in first.places.values() for root in owned), default=0)
    for (place, side), owned in second.places.items():
        into = first.places.setdefault((place, side), {})
        for root, places in owned.items():
            into.setdefault(root + offset, set()).update(places)
    first.linear &= second.linear
    first.reason = first.reason or second.reason
    first.grouped |= second.grouped
    first.norms |= second.norms
    first.through |= second.through
    return first


def _vectors(module: nn.Module) -> list[str]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [name for name, tensor in tensors if tensor.dim() == 1]


def _add_weighted(found: _Found, name: str, module: Any, out: bool, pairs: list[tuple[int, int]]) -> None:
    if not out:
        found.add(f"{name}.weight", 1, "consumes", pairs)
        return
    found.add(f"{name}.weight", 0, "produces", pairs)
    if module.bias is not None:
        found.add(f"{name}.bias", 0, "produces", pairs)


def _add_grouped(found: _Found, name: str, module: Any, out: bool, pairs: list[tuple[int, int]]) -> None:
    """A grouped convolution loses whole groups: rows of outputs, and the inputs that only they read."""
    width = (module.out_channels if out else module.in_channels) // module.groups
    rows = module.out_channels // module.groups
    blocks = {(root, place // width) for root, place in pairs}
    every = [(root, block * rows + row) for root, block in blocks for row in range(rows)]
    found.grouped.add(name)
    found.add(f"{name}.weight", 0, "produces", every)
    if module.bias is not None:
        found.add(f"{name}.bias", 0, "produces", every)


def _repeat_(found: _Found, model: nn.Module) -> None:
    """Let neighbours that are joined before a norm and a layer, as in Swin's downsampling, go with their channel.

    torch-pruning follows such joins in part or not at all. The guess that blocks of all channels lie behind each other
    is for the proof to confirm.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    width = 1 + max((root for owned in found.places.values() for root in owned), default=0)
    for ((name, dim), _), owned in found.places.items():
        length = tensors[name].shape[dim] if name in tensors else width
        if length > width and length % width == 0 and sum(map(len, owned.values())) < length:
            owned.clear()
            owned.update((root, set(range(root, length, width))) for root in range(width))


def group_from(found: _Found, model: nn.Module) -> Group | str:
    """The group of one coupled set, or why there is none."""
    if found.wide:
        _repeat_(found, model)
    roots = sorted({root for owned in found.places.values() for root in owned})
    owner = _merged(roots, found.places.values())
    units = sorted(set(owner.values()))
    if len(units) < 2:
        return "they go only all together"
    number = {unit: place for place, unit in enumerate(units)}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    shapes = {name: tensor.shape for name, tensor in every}
    slices: list[Slices] = []
    for ((tensor, dim), side), owned in found.places.items():
        index: list[set[int]] = [set() for _ in units]
        for root, places in owned.items():
            index[number[owner[root]]] |= places
        if len({len(places) for places in index}) != 1:
            return "their channels are of unequal size"
        if max(max(places) for places in index) >= shapes[tensor][dim]:
            return LOST
        slices.append(Slices(tensor=tensor, dim=dim, index=tuple(tuple(sorted(places)) for places in index), side=side))
    if not any(one.side == "consumes" for one in slices):
        return "they leave the model as its output"
    if not any(one.side == "produces" and one.tensor.endswith("weight") for one in slices):
        return "nothing in the model makes them"
    kind, what = "channel", "channels"
    if found.wide:
        kind, what = "width", "width"
    elif found.linear or _in_mlp(found.name, model):
        kind, what = "mlp", "hidden"
    scales = tuple(Scale(tensor=one.tensor, dim=one.dim, index=one.index) for one in slices if one.side == "consumes")
    return Group(
        name=f"{found.name}.{what}",
        kind=kind,
        size=len(units),
        site=found.name,
        role=kind,
        slices=tuple(slices),
        scales=scales,
        norms=tuple(sorted(found.norms)),
    )


def _in_mlp(name: str, model: nn.Module) -> bool:
    """Whether a convolution is the first layer of what its host calls an MLP."""
    around = [type(model.get_submodule(name.rsplit(".", depth)[0])).__name__.lower() for depth in (1, 2)]
    return any(word in one for one in around for word in ("mlp", "ffn", "feedforward"))


def _merged(roots: Sequence[int], places: Iterable[Mapping[int, set[int]]]) -> dict[int, int]:
    """Root channel -> the unit it belongs to: channels that share a place of some tensor go together."""
    parent = {root: root for root in roots}

    def find(root: int) -> int:
        while parent[root] != root:
            parent[root] = root = parent[parent[root]]
        return root

    for owned in places:
        first: dict[int, int] = {}
        for root, spots in owned.items():
            for spot in spots:
                one, other = find(first.setdefault(spot, root)), find(root)
                parent[max(one, other)] = min(one, other)
    return {root: find(root) for root in roots}
