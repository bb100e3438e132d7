"""Describe attention heads by rows of a table, and turn the row of a module into a group.

A row is data about one attention class: which layers make queries, keys and values, which layer reads the heads, which
tensors have an entry per head, and which attributes hold the number of heads. If the forward of the class infers the
head size from the embedding width, that expression is rewritten, see `slimming.models.traced.free_heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from slimming.core.formulas import Dim, Ratio
from slimming.core.groups import Group, Scale, Slices
from slimming.models.separate import SeparateLinear

Attributes = dict[str, dict[str, Dim | Ratio]]
"""Name of a module -> name of an attribute -> its value as a function of the kept units."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive rows or columns of a tensor.

    Attributes:
        tensor: name of the tensor.
        start: the first row or column.
        length: the number of rows or columns.
    """

    tensor: str
    start: int
    length: int

    def shifted(self, index: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        """Convert indices in the span to indices in the tensor."""
        return tuple(tuple(self.start + position for position in unit) for unit in index)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """A row of a table: the layers, tensors and attributes of an attention class that depend on its heads.

    All paths are relative to the attention module. A path that a module does not have is ignored, so that one row
    serves all variants of a class. If a layer or tensor has other rows too, its path ends in the range of the rows of
    the heads, ``"in_proj[3072:]"``. The path of an attribute may end in an index into a tuple,
    ``"rel_pos.bias_shape[2]"``.

    Attributes:
        inputs: path of a layer or tensor -> number of equal blocks of its rows, each with all heads in order (3 for a
            joint projection to queries, keys and values).
        other_inputs: those paths of ``inputs`` whose layers do not read the input of the module.
        tied: paths of layers whose input and output must have the width of the module's input, such as a layer that
            reduces the number of tokens.
        output: path of the layer whose columns read the heads, or of a block whose first layer does.
        other_outputs: paths of further layers that read the same columns, such as the adapter of the output layer.
        output_blocks: number of equal blocks of these columns, each with all heads in order.
        heads_last: whether the head is the fastest index of these columns.
        mixers: paths of layers from heads to heads (talking heads).
        per_head: path of a tensor -> its dimension over heads.
        count: path of the attribute with the number of heads, or the number if no attribute holds it.
        sizes: paths of attributes that are a multiple of the number of heads.
        free_heads: whether the forward infers the head size from the embedding width, and has to be rewritten.
        why_not: why heads cannot be removed; None if they can.
    """

    inputs: Mapping[str, int] = field(default_factory=dict)
    other_inputs: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    output: str = "proj"
    other_outputs: tuple[str, ...] = ()
    output_blocks: int = 1
    heads_last: bool = False
    mixers: tuple[str, ...] = ()
    per_head: Mapping[str, int] = field(default_factory=dict)
    count: str | int = "num_heads"
    sizes: tuple[str, ...] = ()
    free_heads: bool = False
    why_not: str | None = None

    @property
    def inside(self) -> str:
        """Path of the innermost module that holds the layers."""
        return innermost((*self.inputs, self.output, *self.other_outputs))


Row = Heads | Callable[[nn.Module], Heads]
"""A row of a table, or a function that gives the row for a module."""


def innermost(paths: Sequence[str]) -> str:
    """Path of the innermost module that holds all of ``paths``."""
    steps = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    return ".".join(step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps))


def head_group(name: str, module: nn.Module, row: Heads) -> tuple[Group, Attributes] | str:
    """The group of the heads of ``module`` with the attributes that depend on it, or why they cannot be removed.

    Args:
        name: name of the module in the model.
        module: the attention module.
        row: its row.
    """
    slices = head_slices(name, module, row)
    if isinstance(slices, str):
        return slices
    heads = len(slices[0].index)
    if heads < 2:
        return "it has one head"
    group = Group(
        name=f"{name}.heads",
        kind="head",
        size=heads,
        site=name,
        role="head",
        slices=slices,
        scales=tuple(Scale(tensor=s.tensor, dim=s.dim, index=s.index) for s in slices if s.side == "consumes"),
    )
    counts = [row.count] if isinstance(row.count, str) else []
    layers = dict(module.named_modules())
    counts += [f"{path}.heads" for path in row.inputs if isinstance(layers.get(path), SeparateLinear)]
    return group, unit_attributes(group, name, module, (*counts, *row.sizes))


def head_slices(name: str, module: nn.Module, row: Heads) -> tuple[Slices, ...] | str:
    """The slices of every head of ``module``, or why its heads cannot be told apart; see `head_group`."""
    if row.why_not is not None:
        return row.why_not
    heads = row.count if isinstance(row.count, int) else size_at(module, row.count)
    if heads is None:
        return f"it has no {row.count}"
    produced = _produced_by_head(name, module, row, heads)
    if isinstance(produced, str):
        return produced
    output = weight_span(module, row.output)
    if output is None:
        return "no layer of the module reads its heads"
    if output.length % (row.output_blocks * heads):
        return f"{row.output} reads {output.length} columns for {heads} heads"
    if row.heads_last:
        index = tuple(tuple(range(head, output.length, heads)) for head in range(heads))
    else:
        index = block_index(output.length, row.output_blocks, heads)
    read = [output, *(span for path in row.other_outputs if (span := weight_span(module, path)) is not None)]
    consumed = [
        Slices(tensor=f"{name}.{span.tensor}", dim=1, index=span.shifted(index), side="consumes") for span in read
    ]
    return (*produced, *consumed)


def _produced_by_head(name: str, module: nn.Module, row: Heads, heads: int) -> list[Slices] | str:
    """The slices of every head except those of the output layer, or why the rows do not divide into heads."""
    slices: list[Slices] = []
    for path, blocks in row.inputs.items():
        for span in row_spans(module, path):
            layer = dict(module.named_modules()).get(path)
            if isinstance(layer, SeparateLinear):
                index = _parts_index(layer.head_sizes, heads)
            elif span.length % (blocks * heads):
                return f"{path} has {span.length} rows for {heads} heads"
            else:
                index = span.shifted(block_index(span.length, blocks, heads))
            slices.append(Slices(tensor=f"{name}.{span.tensor}", dim=0, index=index, side="produces"))
    each = tuple((head,) for head in range(heads))
    for path in row.mixers:
        for span in row_spans(module, path):
            slices.append(Slices(tensor=f"{name}.{span.tensor}", dim=0, index=each, side="produces"))
        slices.append(Slices(tensor=f"{name}.{path}.weight", dim=1, index=each, side="consumes"))
    for path, dim in row.per_head.items():
        if _tensors(module, path):
            slices.append(Slices(tensor=f"{name}.{path}", dim=dim, index=each, side="produces"))
    return slices


def _parts_index(sizes: Sequence[int], heads: int) -> tuple[tuple[int, ...], ...]:
    """The rows of each head in a projection whose parts, one after the other, have heads of ``sizes``."""
    starts = [heads * sum(sizes[:part]) for part in range(len(sizes))]
    return tuple(
        tuple(start + head * size + offset for start, size in zip(starts, sizes, strict=True) for offset in range(size))
        for head in range(heads)
    )


def unit_attributes(group: Group, name: str, module: nn.Module, paths: Sequence[str]) -> Attributes:
    """The attributes at ``paths`` of ``module``, called ``name``, as multiples of the number of units of ``group``."""
    attributes: Attributes = {}
    for path in paths:
        parent, _, attribute = path.rpartition(".")
        owner = f"{name}.{parent}" if parent else name
        size = size_at(module, path)
        if size is not None:
            attributes.setdefault(owner, {})[attribute] = Dim(groups=((group.name, size // group.size),))
    return attributes


def size_at(module: nn.Module, path: str) -> int | None:
    """The size at ``path``: an attribute of the module or of a submodule, or an element of a tuple; None if absent."""
    owner, _, attribute = path.rpartition(".")
    name, _, position = attribute.rstrip("]").partition("[")
    value: Any = getattr(dict(module.named_modules()).get(owner), name, None)
    return value if value is None else int(value[int(position)] if position else value)


def weight_span(module: nn.Module, path: str) -> Span | None:
    """The columns of the first weight at ``path``, limited to the range in ``path``; None if there is no weight."""
    path, within = _split_range(path)
    for name, tensor in module.get_submodule(path).named_parameters() if _has(module, path) else ():
        if name.rpartition(".")[2] == "weight" and tensor.dim() > 1:
            return _span(f"{path}.{name}", tensor.shape[1], within)
    return None


def columns(module: nn.Module, path: str) -> list[tuple[str, int]]:
    """Names of the tensors that read the input of ``path``, with their numbers of columns.

    Args:
        module: the attention module.
        path: path of a layer, of a block whose first layer reads the input, or of a tensor; a range of its rows is
            ignored.
    """
    path, _ = _split_range(path)
    span = weight_span(module, path)
    if span is not None:
        return [(span.tensor, span.length)]
    return [(path, tensor.shape[1]) for tensor in _tensors(module, path) if tensor.dim() > 1]


def block_index(length: int, blocks: int, units: int) -> tuple[tuple[int, ...], ...]:
    """The indices of each unit in ``length`` rows or columns of equal blocks, each with all units in order."""
    size, block_size = length // (blocks * units), length // blocks
    return tuple(
        tuple(block * block_size + unit * size + offset for block in range(blocks) for offset in range(size))
        for unit in range(units)
    )


def row_spans(module: nn.Module, path: str) -> list[Span]:
    """The rows of every tensor of the layer at ``path``, or of the tensor at ``path``; empty if there is none."""
    path, within = _split_range(path)
    parent_path, _, last = path.rpartition(".")
    if not _has(module, parent_path):
        return []
    layer = dict(module.get_submodule(parent_path).named_children()).get(last)
    if layer is None:
        return [_span(path, tensor.shape[0], within) for tensor in _tensors(module, path)]
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return [_span(f"{path}.{name}", tensor.shape[0], within) for name, tensor in tensors if tensor.dim() > 0]


def _split_range(path: str) -> tuple[str, slice]:
    """Split a path from the range at its end: ``"in_proj[:3072]"`` means the first 3072 rows of ``in_proj``."""
    path, _, within = path.rstrip("]").partition("[")
    start, _, stop = within.partition(":")
    return path, slice(int(start) if start else None, int(stop) if stop else None)


def _span(tensor: str, length: int, within: slice) -> Span:
    start, stop, _ = within.indices(length)
    return Span(tensor=tensor, start=start, length=stop - start)


def _has(module: nn.Module, path: str) -> bool:
    return path in dict(module.named_modules())


def _tensors(module: nn.Module, path: str) -> list[Tensor]:
    """The parameter or buffer at ``path``, if there is one."""
    owner, _, last = path.rpartition(".")
    parent = dict(module.named_modules()).get(owner)
    if parent is None:
        return []
    tensors = [*parent.named_parameters(recurse=False), *parent.named_buffers(recurse=False)]
    return [tensor for name, tensor in tensors if name == last]
