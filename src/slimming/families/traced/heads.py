"""Whole heads of attention modules, from a table of where each class keeps them.

A row of the table is data: which layers make queries, keys and values, which one reads the heads, what else has an
entry per head, and which attributes count them. A host whose forward works out the head size from the embedding
width gets that one expression replaced, see `slimming.families.traced.unbound`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from slimming.groups import Dim, Group, Scale, Slices

Attributes = dict[str, dict[str, Dim]]
"""Module -> attribute -> its value."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Where one class of attention keeps its heads.

    Attributes:
        inputs: path of a layer or tensor -> number of equal blocks that its rows fall into (3 for a joint
            projection of q, k and v), each with all heads in order.
        output: path of the layer whose columns read the heads in order.
        mixers: paths of layers from heads to heads (talking heads).
        per_head: path of a tensor -> its dimension over heads.
        count: path of the attribute that counts the heads.
        sizes: paths of attributes that are a multiple of the number of heads.
        unbound: whether the forward works out the head size from the embedding width.
        why_not: says why the heads of a module stay whole, or None.
    """

    inputs: Mapping[str, int]
    output: str = "proj"
    mixers: tuple[str, ...] = ()
    per_head: Mapping[str, int] = field(default_factory=dict)
    count: str = "num_heads"
    counts: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    unbound: bool = False
    why_not: Callable[[nn.Module], str | None] = lambda module: None

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of everything that the heads own: channels that pass through it are not cut on their own."""
        return (*self.inputs, *self.mixers, *self.per_head, self.output)


def head_group(name: str, module: nn.Module, spec: Heads) -> tuple[Group, Attributes] | str:
    """The heads of ``module`` as a group with the attributes that count them, or why they stay."""
    why_not = spec.why_not(module)
    if why_not is not None:
        return why_not
    heads = int(_attribute(module, spec.count))
    if heads < 2:
        return "it has one head"
    slices: list[Slices] = []
    for path, blocks in spec.inputs.items():
        for tensor, length in _rows(module, path):
            if length % (blocks * heads):
                return f"{path} has {length} rows for {heads} heads"
            index = _index(length, blocks, heads)
            slices.append(Slices(tensor=f"{name}.{tensor}", dim=0, index=index, side="in"))
    each = tuple((head,) for head in range(heads))
    for path in spec.mixers:
        for tensor, _ in _rows(module, path):
            slices.append(Slices(tensor=f"{name}.{tensor}", dim=0, index=each, side="in"))
        slices.append(Slices(tensor=f"{name}.{path}.weight", dim=1, index=each, side="out"))
    for path, dim in spec.per_head.items():
        for tensor in _tensors(module, path):
            if tensor is not None:
                slices.append(Slices(tensor=f"{name}.{path}", dim=dim, index=each, side="in"))
    columns = module.get_submodule(spec.output).get_parameter("weight").shape[1]
    if columns % heads:
        return f"{spec.output} reads {columns} columns for {heads} heads"
    index = _index(columns, 1, heads)
    slices.append(Slices(tensor=f"{name}.{spec.output}.weight", dim=1, index=index, side="out"))
    group = Group(
        name=f"{name}.heads",
        kind="head",
        size=heads,
        site=name,
        role="head",
        slices=tuple(slices),
        scales=tuple(Scale(tensor=s.tensor, dim=s.dim, index=s.index) for s in slices if s.side == "out"),
    )
    attributes: Attributes = {}
    for path in (spec.count, *spec.counts, *spec.sizes):
        owner, _, attribute = path.rpartition(".")
        value = getattr(module.get_submodule(owner), attribute, None)
        if value is not None:
            place = f"{name}.{owner}" if owner else name
            attributes.setdefault(place, {})[attribute] = Dim(groups=((group.name, int(value) // heads),))
    return group, attributes


def _attribute(module: nn.Module, path: str) -> int:
    owner, _, attribute = path.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)


def _index(length: int, blocks: int, heads: int) -> tuple[tuple[int, ...], ...]:
    size, block = length // (blocks * heads), length // blocks
    return tuple(
        tuple(part * block + head * size + place for part in range(blocks) for place in range(size))
        for head in range(heads)
    )


def _rows(module: nn.Module, path: str) -> list[tuple[str, int]]:
    """Name and number of rows of each tensor of the layer at ``path``, or of the tensor itself; none if absent."""
    owner, _, last = path.rpartition(".")
    parent = module.get_submodule(owner) if owner == "" or _has(module, owner) else None
    if parent is None:
        return []
    layer = dict(parent.named_children()).get(last)
    if layer is None:
        return [(path, tensor.shape[0]) for tensor in _tensors(module, path) if tensor is not None]
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return [(f"{path}.{name}", tensor.shape[0]) for name, tensor in tensors if tensor.dim() > 0]


def _has(module: nn.Module, path: str) -> bool:
    return path in dict(module.named_modules())


def _tensors(module: nn.Module, path: str) -> list[Tensor | None]:
    owner, _, last = path.rpartition(".")
    parent = dict(module.named_modules()).get(owner)
    if parent is None:
        return []
    own = [*parent.named_parameters(recurse=False), *parent.named_buffers(recurse=False)]
    return [tensor for name, tensor in own if name == last]
