"""Passes with the same digest compute the same, so that one of them is proved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slimming.core.example_inputs import ExampleCall
from slimming.models.traced.courses import course_of
from slimming.models.traced.verification import Pass


class Net(nn.Module):
    """What training changes is chosen by ``differs``."""

    def __init__(self, differs: str) -> None:
        super().__init__()
        self.differs = differs
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        x = x.abs()
        different = self.training
        if self.differs == "operation":
            x = x.relu() if different else x.abs()
        if self.differs == "argument":
            x = x.clamp(-1.0 if different else -2.0)
        layer = self.second if self.differs == "parameter" and different else self.first
        x = layer(x)
        return x * x.new_tensor(2.0 if self.differs == "number" and different else 1.0)


@pytest.mark.parametrize("differs", ["nothing", "operation", "argument", "parameter", "number"], ids=str)
def test_passes_that_compute_something_else_differ(differs: str) -> None:
    torch.manual_seed(0)
    model = Net(differs).double()
    call = ExampleCall((torch.randn(2, 4, dtype=torch.float64),))
    evaluated, trained = (course_of(model, Pass(call, training=training)).digest for training in (False, True))
    assert (evaluated == trained) == (differs == "nothing")
