"""Describe MLPs that share a layer with other units by rows of a table, and turn the row of a module into a group.

In a gated MLP one layer produces both factors; in a parallel block one layer produces queries, keys, values and hidden
units. torch-pruning does not follow the split of their outputs. A unit is one column of the last layer, and one row per
block of the first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from slimming.core.formulas import Dim
from slimming.core.groups import Group, Scale, Slices
from slimming.models.traced.heads import Attributes, block_index, innermost, row_spans, unit_attributes, weight_span


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """A row of a table: the layers and attributes of an MLP class that depend on its hidden units.

    For paths see `slimming.models.traced.heads.Heads`.

    Attributes:
        inputs: path of a layer or tensor -> number of equal blocks of its rows.
        output: path of the layer whose columns read the hidden units.
        norms: paths of LayerNorms over the hidden units, which take their statistics over what stays.
        sizes: paths of attributes that are a multiple of the number of hidden units.
        sums: paths of attributes that count the hidden units of several rows of one module.
        name: last part of the group's name.
        why_not: why hidden units cannot be removed; None if they can.
    """

    inputs: Mapping[str, int]
    output: str = "fc2"
    norms: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    name: str = "hidden"
    why_not: str | None = None

    @property
    def inside(self) -> str:
        """Path of the innermost module that holds the layers."""
        return innermost((*self.inputs, self.output))


HiddenRow = Hidden | Callable[[nn.Module], Hidden | tuple[Hidden, ...]]
"""A row of a table, or a function that gives the rows for a module."""


def hidden_group(name: str, module: nn.Module, row: Hidden) -> tuple[Group, Attributes] | str:
    """The group of the hidden units of ``module`` with the attributes that depend on it, or why they are not cut."""
    output = weight_span(module, row.output)
    if row.why_not is not None or output is None:
        return row.why_not or f"it has no {row.output}"
    size = output.length
    columns = output.shifted(block_index(size, 1, size))
    slices = [Slices(tensor=f"{name}.{output.tensor}", dim=1, index=columns, side="consumes")]
    for path, blocks in row.inputs.items():
        for span in row_spans(module, path):
            if span.length != blocks * size:
                return f"{path} has {span.length} rows for {size} hidden units"
            index = span.shifted(block_index(span.length, blocks, size))
            slices.append(Slices(tensor=f"{name}.{span.tensor}", dim=0, index=index, side="produces"))
    norms = [path for path in row.norms if isinstance(module.get_submodule(path), nn.LayerNorm)]
    for path in norms:
        for span in row_spans(module, path):
            index = block_index(size, 1, size)
            slices.append(Slices(tensor=f"{name}.{span.tensor}", dim=0, index=index, side="produces"))
    group = Group(
        name=f"{name}.{row.name}",
        kind="mlp",
        size=size,
        site=name,
        role="mlp",
        slices=tuple(slices),
        scales=tuple(Scale(tensor=s.tensor, dim=s.dim, index=s.index) for s in slices if s.side == "consumes"),
        norms=tuple(f"{name}.{path}" for path in norms),
    )
    attributes = unit_attributes(group, name, module, row.sizes)
    for path, own in unit_attributes(group, name, module, row.sums).items():
        for attribute in own:
            attributes.setdefault(path, {})[attribute] = Dim(groups=((group.name, 1),))
    return group, attributes


def among(model: nn.Module, attributes: Attributes, groups: Iterable[Group]) -> Attributes:
    """``attributes`` as functions of ``groups`` only; other groups keep all of their units."""
    sizes = {group.name: group.size for group in groups}
    result: Attributes = {}
    for path, own in attributes.items():
        for name, dim in own.items():
            present = tuple((group, weight) for group, weight in dim.groups if group in sizes)
            if present:
                attribute, _, position = name.rstrip("]").partition("[")
                value: Any = getattr(model.get_submodule(path), attribute)
                whole = int(value[int(position)] if position else value)
                fixed = whole - sum(weight * sizes[group] for group, weight in present)
                result.setdefault(path, {})[name] = Dim(fixed=fixed, groups=present)
    return result
