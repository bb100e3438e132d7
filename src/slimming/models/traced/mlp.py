"""Hidden units of MLPs that share a layer with something else, from a table: torch-pruning does not follow a split.

A gated MLP has both halves in one layer; a parallel block, queries, keys and values beside the hidden units. A unit is
one column of the last layer, with one row per block of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from slimming.core.groups import Group, Scale, Slices
from slimming.models.traced.heads import Attributes, block_index, counting, innermost, reader, rows


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """Where one class of MLP keeps its hidden units; for paths see `slimming.models.traced.heads.Heads`.

    Attributes:
        inputs: path of a layer or tensor -> number of equal blocks that its rows fall into.
        output: path of the layer whose columns read the hidden units.
        sizes: paths of attributes that are a multiple of the number of hidden units.
        why_not: why the hidden units stay, or None.
    """

    inputs: Mapping[str, int]
    output: str = "fc2"
    sizes: tuple[str, ...] = ()
    why_not: str | None = None

    @property
    def inside(self) -> str:
        """Path of the innermost module that holds the layers."""
        return innermost((*self.inputs, self.output))


HiddenRow = Hidden | Callable[[nn.Module], Hidden]
"""A row of a table: where the hidden units are, or what says so for one module."""


def hidden_group(name: str, module: nn.Module, spec: Hidden) -> tuple[Group, Attributes] | str:
    """The hidden units of ``module`` as a group with the attributes that count them, or why they stay."""
    found = reader(module, spec.output)
    if spec.why_not is not None or found is None:
        return spec.why_not or f"it has no {spec.output}"
    size = found.length
    columns = found.shifted(block_index(size, 1, size))
    slices = [Slices(tensor=f"{name}.{found.tensor}", dim=1, index=columns, side="out")]
    for path, blocks in spec.inputs.items():
        for span in rows(module, path):
            if span.length != blocks * size:
                return f"{path} has {span.length} rows for {size} hidden units"
            index = span.shifted(block_index(span.length, blocks, size))
            slices.append(Slices(tensor=f"{name}.{span.tensor}", dim=0, index=index, side="in"))
    group = Group(
        name=f"{name}.hidden",
        kind="mlp",
        size=size,
        site=name,
        role="mlp",
        slices=tuple(slices),
        scales=tuple(Scale(tensor=s.tensor, dim=s.dim, index=s.index) for s in slices if s.side == "out"),
    )
    return group, counting(group, name, module, spec.sizes)
