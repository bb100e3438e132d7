"""Hidden units of MLPs whose two halves come out of one layer, from a table: torch-pruning does not follow a split.

A unit is one column of the last layer, with one row per block of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from slimming.families.traced.heads import block_index, innermost, reader, rows
from slimming.groups import Group, Scale, Slices


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """Where one class of MLP keeps its hidden units.

    Attributes:
        inputs: path of a layer or tensor -> number of equal blocks that its rows fall into.
        output: path of the layer whose columns read the hidden units.
        why_not: why the hidden units stay, or None.
    """

    inputs: Mapping[str, int]
    output: str = "fc2"
    why_not: str | None = None

    @property
    def inside(self) -> str:
        """Path of the innermost module that holds the layers."""
        return innermost((*self.inputs, self.output))


HiddenRow = Hidden | Callable[[nn.Module], Hidden]
"""A row of a table: where the hidden units are, or what says so for one module."""


def hidden_group(name: str, module: nn.Module, spec: Hidden) -> Group | str:
    """The hidden units of ``module`` as a group, or why they stay."""
    found = reader(module, spec.output)
    if spec.why_not is not None or found is None:
        return spec.why_not or f"it has no {spec.output}"
    tensor, size = found
    slices = [Slices(tensor=f"{name}.{tensor}", dim=1, index=block_index(size, 1, size), side="out")]
    for path, blocks in spec.inputs.items():
        for one, length in rows(module, path):
            if length != blocks * size:
                return f"{path} has {length} rows for {size} hidden units"
            slices.append(Slices(tensor=f"{name}.{one}", dim=0, index=block_index(length, blocks, size), side="in"))
    return Group(
        name=f"{name}.hidden",
        kind="mlp",
        size=size,
        site=name,
        role="mlp",
        slices=tuple(slices),
        scales=tuple(Scale(tensor=s.tensor, dim=s.dim, index=s.index) for s in slices if s.side == "out"),
    )
