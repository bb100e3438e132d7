"""Channels that are divided into equal parts, one for each path of a module."""

from __future__ import annotations

import pytest
import torch
from timm.layers.selective_kernel import SelectiveKernel
from torch import Tensor, nn

import slimming
from slimming.models.traced.channel_parts import by_place


class Paths(nn.Module):
    """A selective kernel between two convolutions."""

    image_size = 8

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.kernel = SelectiveKernel(16, 12, split_input=split)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.kernel(self.stem(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("split", "units"), [(True, 8), (False, 16)], ids=["a part for each path", "all for each path"]
)
def test_selective_kernels_are_cut(split: bool, units: int) -> None:
    torch.manual_seed(0)
    model = Paths(split)
    sizes = {group.name: group.size for group in slimming.describe(model)}
    assert sizes == {
        "stem.0.channels": units,
        "kernel.attn.fc_reduce.channels": 8,
        "kernel.attn.fc_select.channels": 12,
    }
    found = slimming.check(model)
    # A model of the user's own is loaded with a dense one, which `check` does not have.
    assert all(step.held for step in found.steps[:2]), str(found)
    assert found.covered_macs == 1


def test_parts_are_equal_and_whole() -> None:
    def indices(*counts: int) -> dict[tuple[tuple[str, int], str], dict[int, set[int]]]:
        every = ({each: {each} for each in range(count)} for count in counts)
        return {((f"weight {number}", 0), "produces"): by_root for number, by_root in enumerate(every)}

    found = by_place(indices(4, 8), [4, 8])
    assert found is not None
    assert [by_root[1] for by_root in found.values()] == [{1}, {1, 5}]
    assert by_place(indices(4, 6), [4, 6]) is None
    assert by_place(indices(4, 4), [4, 8]) is None
    assert by_place(indices(4, 4), [4, 4]) is None
