"""What a check with random weights measures is the cut, not rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import slimming
from slimming.core.example_inputs import ExampleCall
from slimming.models.traced.random_statistics import fit_statistics_, with_enough_values
from slimming.models.traced.verification import Pass, randomise_


class Waves(nn.Module):
    """Each layer is given values of about 20, and the next one reads their sine."""

    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(30 * x)).sin()
        return self.head(x.mean((2, 3)))


def test_statistics_fit_what_they_normalise() -> None:
    found = slimming.check(Waves())
    assert found.ok, str(found)
    assert found.kinds == {"channel": 7}


@torch.no_grad()
def test_statistics_keep_their_ratios() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).double().eval()
    randomise_(model)
    drawn = model[1].running_var.clone()
    image = 50 * torch.randn(1, 3, 4, 4, dtype=torch.float64)
    for _ in range(2):  # the second time changes nothing
        fit_statistics_(model, [Pass(ExampleCall.of(image))])
        assert torch.allclose(model[1].running_var / model[1].running_var.mean(), drawn / drawn.mean())
        assert float(model[1].running_var.mean()) == pytest.approx(float(model[0](image).var(correction=0)))
    assert 0.2 < float(model(image).std()) < 5


@pytest.mark.parametrize(("size", "images"), [(1, 4), (2, 2)], ids=["one value an image", "four values an image"])
def test_batch_statistics_are_of_four_values(size: int, images: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8)).eval()
    call = with_enough_values(model, ExampleCall.of(torch.randn(1, 3, 4 * size, 4 * size)))
    assert call.size == images
