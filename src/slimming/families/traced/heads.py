"""Whole heads of attention modules, from a table of where each class keeps them.

A row of the table is data: which layers make queries, keys and values, which one reads the heads, what else has an
entry per head, and which attributes count them. A host whose forward works out the head size from the embedding
width gets that one expression replaced, see `slimming.families.traced.unbound`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from slimming.formulas import Dim
from slimming.groups import Group, Scale, Slices

Attributes = dict[str, dict[str, Dim]]
"""Module -> attribute -> its value."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Where one class of attention keeps its heads.

    A path that a module does not have is passed over, so that one row serves the variants of a class. An
    attribute's path may end in a place of a tuple: ``"rel_pos.bias_shape[2]"``.

    Attributes:
        inputs: path of a layer or tensor -> number of equal blocks that its rows fall into (3 for a joint
            projection of q, k and v), each with all heads in order.
        output: path of the layer whose columns read the heads, or of a block that begins with it.
        output_blocks: number of equal blocks that these columns fall into, each with all heads in order.
        heads_last: whether the heads are the fastest index of these columns.
        mixers: paths of layers from heads to heads (talking heads).
        per_head: path of a tensor -> its dimension over heads.
        each: paths of layers that run once per head, with the same weights.
        count: path of the attribute that counts the heads, or their number if no attribute does.
        sizes: paths of attributes that are a multiple of the number of heads.
        unbound: whether the forward works out the head size from the embedding width.
        why_not: why the heads stay whole, or None.
    """

    inputs: Mapping[str, int] = field(default_factory=dict)
    output: str = "proj"
    output_blocks: int = 1
    heads_last: bool = False
    mixers: tuple[str, ...] = ()
    per_head: Mapping[str, int] = field(default_factory=dict)
    each: tuple[str, ...] = ()
    count: str | int = "num_heads"
    sizes: tuple[str, ...] = ()
    unbound: bool = False
    why_not: str | None = None

    @property
    def inside(self) -> str:
        """Path of the innermost module that holds the layers."""
        return innermost((*self.inputs, self.output))


Row = Heads | Callable[[nn.Module], Heads]
"""A row of a table: where the heads are, or what says so for one module."""


def innermost(paths: Sequence[str]) -> str:
    """Path of the innermost module that holds all of ``paths``."""
    steps = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    return ".".join(step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps))


def head_group(name: str, module: nn.Module, spec: Heads) -> tuple[Group, Attributes] | str:
    """The heads of ``module`` as a group with the attributes that count them, or why they stay."""
    if spec.why_not is not None:
        return spec.why_not
    heads = spec.count if isinstance(spec.count, int) else _size(module, spec.count)
    if heads is None:
        return f"it has no {spec.count}"
    if heads < 2:
        return "it has one head"
    slices: list[Slices] = []
    for path, blocks in spec.inputs.items():
        for tensor, length in rows(module, path):
            if length % (blocks * heads):
                return f"{path} has {length} rows for {heads} heads"
            index = block_index(length, blocks, heads)
            slices.append(Slices(tensor=f"{name}.{tensor}", dim=0, index=index, side="in"))
    each = tuple((head,) for head in range(heads))
    for path in spec.mixers:
        for tensor, _ in rows(module, path):
            slices.append(Slices(tensor=f"{name}.{tensor}", dim=0, index=each, side="in"))
        slices.append(Slices(tensor=f"{name}.{path}.weight", dim=1, index=each, side="out"))
    for path, dim in spec.per_head.items():
        for tensor in _tensors(module, path):
            if tensor is not None:
                slices.append(Slices(tensor=f"{name}.{path}", dim=dim, index=each, side="in"))
    found = reader(module, spec.output)
    if found is None:
        return "no layer of the module reads its heads"
    tensor, columns = found
    if columns % (spec.output_blocks * heads):
        return f"{spec.output} reads {columns} columns for {heads} heads"
    if spec.heads_last:
        index = tuple(tuple(range(head, columns, heads)) for head in range(heads))
    else:
        index = block_index(columns, spec.output_blocks, heads)
    slices.append(Slices(tensor=f"{name}.{tensor}", dim=1, index=index, side="out"))
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
    for path in (*([spec.count] if isinstance(spec.count, str) else []), *spec.sizes):
        owner, _, attribute = path.rpartition(".")
        place = f"{name}.{owner}" if owner else name
        size = _size(module, path)
        if size is not None:
            attributes.setdefault(place, {})[attribute] = Dim(groups=((group.name, size // heads),))
    return group, attributes


def _size(module: nn.Module, path: str) -> int | None:
    """The size at ``path``: an attribute of the module or of one inside it, or one place of a tuple."""
    owner, _, attribute = path.rpartition(".")
    name, _, place = attribute.rstrip("]").partition("[")
    value: Any = getattr(dict(module.named_modules()).get(owner), name, None)
    return value if value is None else int(value[int(place)] if place else value)


def reader(module: nn.Module, path: str) -> tuple[str, int] | None:
    """The first weight with columns at ``path``, and how many."""
    for name, tensor in module.get_submodule(path).named_parameters() if _has(module, path) else ():
        if name.rpartition(".")[2] == "weight" and tensor.dim() > 1:
            return f"{path}.{name}", tensor.shape[1]
    return None


def block_index(length: int, blocks: int, units: int) -> tuple[tuple[int, ...], ...]:
    """Where each of ``units`` lies among ``length`` places in equal blocks, each with all units in order."""
    size, block = length // (blocks * units), length // blocks
    return tuple(
        tuple(part * block + unit * size + place for part in range(blocks) for place in range(size))
        for unit in range(units)
    )


def rows(module: nn.Module, path: str) -> list[tuple[str, int]]:
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
