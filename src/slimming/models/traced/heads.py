"""Whole heads of attention modules, from a table of where each class keeps them.

A row of the table is data: which layers make queries, keys and values, which one reads the heads, what else has an
entry per head, and which attributes count them. A host whose forward works out the head size from the embedding
width gets that one expression replaced, see `slimming.models.traced.free_heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from slimming.core.formulas import Dim
from slimming.core.groups import Group, Scale, Slices

Attributes = dict[str, dict[str, Dim]]
"""Module -> attribute -> its value."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Rows or columns of a tensor that lie together.

    Attributes:
        tensor: name of the tensor.
        start: the first of them.
        length: how many they are.
    """

    tensor: str
    start: int
    length: int

    def shifted(self, index: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        """Places in the span as places in the tensor."""
        return tuple(tuple(self.start + place for place in unit) for unit in index)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Where one class of attention keeps its heads.

    A path that a module does not have is passed over, so that one row serves the variants of a class. The path of a
    layer or tensor may end in a range, if it holds more than the heads: ``"in_proj[3072:]"`` (see `Span`); an
    attribute's path in a place of a tuple: ``"rel_pos.bias_shape[2]"``.

    Attributes:
        inputs: path of a layer or tensor -> number of equal blocks that its rows fall into (3 for a joint
            projection of q, k and v), each with all heads in order.
        apart: paths of inputs that read something else than what goes into the module.
        tied: paths of layers inside whose inputs and outputs the forward takes to be as wide as what goes into the
            module (a reduction of the tokens).
        output: path of the layer whose columns read the heads, or of a block that begins with it.
        output_blocks: number of equal blocks that these columns fall into, each with all heads in order.
        heads_last: whether the heads are the fastest index of these columns.
        mixers: paths of layers from heads to heads (talking heads).
        per_head: path of a tensor -> its dimension over heads.
        each: paths of layers that run once per head, with the same weights.
        count: path of the attribute that counts the heads, or their number if no attribute does.
        sizes: paths of attributes that are a multiple of the number of heads.
        free_heads: whether the forward works out the head size from the embedding width.
        why_not: why the heads stay whole, or None.
    """

    inputs: Mapping[str, int] = field(default_factory=dict)
    apart: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    output: str = "proj"
    output_blocks: int = 1
    heads_last: bool = False
    mixers: tuple[str, ...] = ()
    per_head: Mapping[str, int] = field(default_factory=dict)
    each: tuple[str, ...] = ()
    count: str | int = "num_heads"
    sizes: tuple[str, ...] = ()
    free_heads: bool = False
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
        for span in rows(module, path):
            if span.length % (blocks * heads):
                return f"{path} has {span.length} rows for {heads} heads"
            index = span.shifted(block_index(span.length, blocks, heads))
            slices.append(Slices(tensor=f"{name}.{span.tensor}", dim=0, index=index, side="produces"))
    each = tuple((head,) for head in range(heads))
    for path in spec.mixers:
        for span in rows(module, path):
            slices.append(Slices(tensor=f"{name}.{span.tensor}", dim=0, index=each, side="produces"))
        slices.append(Slices(tensor=f"{name}.{path}.weight", dim=1, index=each, side="consumes"))
    for path, dim in spec.per_head.items():
        for tensor in _tensors(module, path):
            if tensor is not None:
                slices.append(Slices(tensor=f"{name}.{path}", dim=dim, index=each, side="produces"))
    found = reader(module, spec.output)
    if found is None:
        return "no layer of the module reads its heads"
    if found.length % (spec.output_blocks * heads):
        return f"{spec.output} reads {found.length} columns for {heads} heads"
    if spec.heads_last:
        index = tuple(tuple(range(head, found.length, heads)) for head in range(heads))
    else:
        index = block_index(found.length, spec.output_blocks, heads)
    slices.append(Slices(tensor=f"{name}.{found.tensor}", dim=1, index=found.shifted(index), side="consumes"))
    group = Group(
        name=f"{name}.heads",
        kind="head",
        size=heads,
        site=name,
        role="head",
        slices=tuple(slices),
        scales=tuple(Scale(tensor=s.tensor, dim=s.dim, index=s.index) for s in slices if s.side == "consumes"),
    )
    counts = (spec.count,) if isinstance(spec.count, str) else ()
    return group, counting(group, name, module, (*counts, *spec.sizes))


def counting(group: Group, name: str, module: nn.Module, paths: Sequence[str]) -> Attributes:
    """The attributes at ``paths`` of ``module``, which ``name`` names, as multiples of the units of ``group``."""
    attributes: Attributes = {}
    for path in paths:
        owner, _, attribute = path.rpartition(".")
        place = f"{name}.{owner}" if owner else name
        size = _size(module, path)
        if size is not None:
            attributes.setdefault(place, {})[attribute] = Dim(groups=((group.name, size // group.size),))
    return attributes


def _size(module: nn.Module, path: str) -> int | None:
    """The size at ``path``: an attribute of the module or of one inside it, or one place of a tuple."""
    owner, _, attribute = path.rpartition(".")
    name, _, place = attribute.rstrip("]").partition("[")
    value: Any = getattr(dict(module.named_modules()).get(owner), name, None)
    return value if value is None else int(value[int(place)] if place else value)


def reader(module: nn.Module, path: str) -> Span | None:
    """The first weight with columns at ``path``, and those of them that the range in ``path`` names."""
    path, within = _ranged(path)
    for name, tensor in module.get_submodule(path).named_parameters() if _has(module, path) else ():
        if name.rpartition(".")[2] == "weight" and tensor.dim() > 1:
            return _span(f"{path}.{name}", tensor.shape[1], within)
    return None


def columns(module: nn.Module, path: str) -> list[tuple[str, int]]:
    """The tensors that read at ``path``, which is a layer, a block that begins with one, or a tensor; with widths."""
    found = reader(module, path)
    if found is not None:
        return [(found.tensor, found.length)]
    path, _ = _ranged(path)
    return [(path, tensor.shape[1]) for tensor in _tensors(module, path) if tensor is not None and tensor.dim() > 1]


def block_index(length: int, blocks: int, units: int) -> tuple[tuple[int, ...], ...]:
    """Where each of ``units`` lies among ``length`` places in equal blocks, each with all units in order."""
    size, block = length // (blocks * units), length // blocks
    return tuple(
        tuple(part * block + unit * size + place for part in range(blocks) for place in range(size))
        for unit in range(units)
    )


def rows(module: nn.Module, path: str) -> list[Span]:
    """The rows of each tensor of the layer at ``path``, or of the tensor itself; none if absent."""
    path, within = _ranged(path)
    owner, _, last = path.rpartition(".")
    parent = module.get_submodule(owner) if owner == "" or _has(module, owner) else None
    if parent is None:
        return []
    layer = dict(parent.named_children()).get(last)
    if layer is None:
        return [_span(path, tensor.shape[0], within) for tensor in _tensors(module, path) if tensor is not None]
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return [_span(f"{path}.{name}", tensor.shape[0], within) for name, tensor in tensors if tensor.dim() > 0]


def _ranged(path: str) -> tuple[str, slice]:
    """A path and the range that it ends in: ``"in_proj[:3072]"`` is the first 3072 rows of ``in_proj``."""
    path, _, within = path.rstrip("]").partition("[")
    start, _, stop = within.partition(":")
    return path, slice(int(start) if start else None, int(stop) if stop else None)


def _span(tensor: str, length: int, within: slice) -> Span:
    start, stop, _ = within.indices(length)
    return Span(tensor=tensor, start=start, length=stop - start)


def _has(module: nn.Module, path: str) -> bool:
    return path in dict(module.named_modules())


def _tensors(module: nn.Module, path: str) -> list[Tensor | None]:
    owner, _, last = path.rpartition(".")
    parent = dict(module.named_modules()).get(owner)
    if parent is None:
        return []
    own = [*parent.named_parameters(recurse=False), *parent.named_buffers(recurse=False)]
    return [tensor for name, tensor in own if name == last]
