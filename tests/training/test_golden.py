"""Golden trajectories: the loss of every step of tiny runs is committed, so that no change goes unnoticed.

Two runs on one machine are equal bit for bit. Between kinds of CPU the last digits of a matrix product differ, and
decoding and resizing are left out for the same reason; so the committed numbers are compared to 1e-4 of their size.

    python -m tests.training.test_golden      # writes them anew, after a change that is meant
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from slimming.training.distillation import DistilTask
from slimming.training.loop import fit
from slimming.training.samples import Data
from slimming.training.tasks import ClassificationTask, PenaltyTask, Task

from .tiny import CLASSES, make_model, tiny_config

GOLDEN = Path(__file__).with_name("golden.json")
RUNS = ("dense", "distilled", "penalised")


def trajectory(name: str) -> list[float]:
    images = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.arange(24) % 3), batch_size=8)
    model = make_model(proj_drop_rate=0.1)
    head = model.get_parameter("head.weight")
    tasks: dict[str, Task] = {
        "dense": ClassificationTask(0.1),
        "distilled": DistilTask(make_model(1), features=("blocks.0",)),
        "penalised": PenaltyTask(ClassificationTask(), lambda: {"l1": head.abs().sum()}),
    }
    config = tiny_config(epochs=4.0, warmup_epochs=1.0, accumulate=2, mixup=0.2 if name == "dense" else 0.0)
    history = fit(model, tasks[name], Data(loader, loader, CLASSES), config, title=None)
    return [line["loss"] for line in history.log]


@pytest.mark.parametrize("name", RUNS, ids=str)
def test_golden(name: str) -> None:
    losses = trajectory(name)
    assert losses == trajectory(name)
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps({name: trajectory(name) for name in RUNS}, indent=1) + "\n")
