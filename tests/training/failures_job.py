"""One of two processes, in which work fails on one of them alone; each writes how each case ended.

python tests/training/failures_job.py OUT CASE ...
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import slimming
from slimming.demo import settings
from slimming.training.distributed import distributed_state, rank_and_world_size
from slimming.training.samples import Data

Pairs = list[tuple[Tensor, Tensor]]


def make() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=2)


def batches(count: int = 2) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 0, 1])) for _ in range(count)]


DATA = Data(batches(), batches(1), ("no", "yes"))
IMAGES = [images for images, _ in batches()]
TRAIN = slimming.TrainConfig(steps=2, batch_size=4, lr=1e-3)


@contextmanager
def failing(name: str, error: BaseException, rank: int = 1) -> Iterator[None]:
    """Let the function ``name`` raise ``error`` on one process."""
    if rank_and_world_size()[0] == rank:
        with patch(name, side_effect=error):
            yield
    else:
        yield


def search(**changes: Any) -> Any:
    return slimming.search(make(), DATA, slimming.SearchConfig(train=TRAIN, images=8, **changes))


class Unreadable:
    """Batches of which the second cannot be read on process 1."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield batches()[0]
        if rank_and_world_size()[0] == 1:
            raise slimming.errors.DataError("The disk of process 1 is gone.")
        yield batches()[1]


def scoring(out: Path) -> None:
    with failing("slimming.scoring.fisher.derive_seed", MemoryError("in scoring")):
        search()


def rotation(out: Path) -> None:
    with failing("slimming.scoring.rotation._add_qk", MemoryError("in rotation")):
        search()


def sensitivity(out: Path) -> None:
    with failing("slimming.scoring.sensitivity.Planner", KeyError("in sensitivity")):
        search(score="taylor", sensitivity=4)


def one_shot(out: Path) -> None:
    with failing("slimming.scoring.redundancy.ridge", RuntimeError("in a bug")):
        slimming.score(make(), IMAGES)


def compensation(out: Path) -> None:
    masks = slimming.attach(make())
    plan = slimming.plan(masks, slimming.Budget(keep={"mlp": 0.5}))
    with failing("slimming.pruning.compensation.precise", MemoryError("in compensation")):
        slimming.cut(masks.model, plan, images=IMAGES)


def evaluation(out: Path) -> None:
    slimming.evaluate(make(), Unreadable())  # type: ignore[arg-type]


def reading(out: Path) -> None:
    slimming.train(make(), Data(Unreadable(), DATA.val, DATA.classes), TRAIN)


def saving(out: Path) -> None:
    full = slimming.errors.OutputError("The disk is full.")
    with failing("slimming.training.loop.TrainingState.save", full, rank=0):
        slimming.train(make(), DATA, TRAIN, directory=out / "saving")


def logging(out: Path) -> None:
    full = slimming.errors.OutputError("The log is full.")
    with failing("slimming.training.log.RunLog.write", full, rank=0):
        slimming.train(make(), DATA, TRAIN, directory=out / "logging")


def _run(out: Path, name: str) -> None:
    """A whole run that is as short as it can be."""
    if rank_and_world_size()[0] == 0:
        save_file(timm.create_model("test_vit", img_size=32, num_classes=10).state_dict(), out / "dense.safetensors")
    torch.distributed.barrier()
    arguments = {"img_size": 32, "num_classes": 10}
    slimming.run(
        slimming.RunConfig(
            model=slimming.ModelConfig(name="test_vit", checkpoint=str(out / "dense.safetensors"), arguments=arguments),
            data=slimming.DataConfig(source=settings()["data"]["source"], train_limit=8, val_limit=8),
            budgets=(slimming.Budget(macs=0.7),),
            search=slimming.SearchConfig(train=TRAIN, images=8),
            retrain=TRAIN,
            bench=slimming.BenchConfig(batch_sizes=(1,), runs=5, seconds=0.01),
        ),
        out / name,
    )


def planning(out: Path) -> None:
    with failing("slimming.runs.stages.plan", slimming.errors.BudgetError("No such plan."), rank=0):
        _run(out, "planning")


def reporting(out: Path) -> None:
    full = slimming.errors.OutputError("No space for the report.")
    with failing("slimming.report.write_report", full, rank=0):
        _run(out, "reporting")


class Breaks(nn.Module):
    """A model whose forward fails on process 1 in the second step, or kills it."""

    def __init__(self, kill: bool = False) -> None:
        super().__init__()
        self.layer, self.kill, self.calls = nn.Linear(3, 2), kill, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2 and rank_and_world_size()[0] == 1:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("in the forward pass")
        return self.layer(images.mean((2, 3)))


def forward(out: Path) -> None:
    slimming.train(Breaks(), DATA, TRAIN)


def killed(out: Path) -> None:
    slimming.train(Breaks(kill=True), DATA, TRAIN)


CASES: dict[str, Callable[[Path], None]] = {
    case.__name__: case
    for case in (
        scoring, reading, saving, rotation, sensitivity, one_shot, compensation, evaluation, logging, planning,
        reporting, forward, killed,
    )
}  # fmt: skip
LAST = ("forward", "killed")
"""Cases that end the processes; after the others they can go on."""


def main(out: Path, names: list[str]) -> None:
    """Run cases; append one line per case to the file of this process."""
    torch.set_num_threads(1)
    rank = distributed_state().process_index
    for name in names:
        began = time.monotonic()
        ended = {"case": name, "error": "none", "message": ""}
        try:
            CASES[name](out)
        except (slimming.errors.SlimmingError, MemoryError, RuntimeError, KeyError) as error:
            ended |= {"error": type(error).__name__, "message": str(error)}
        with (out / f"{rank}.jsonl").open("a") as file:
            file.write(json.dumps({**ended, "seconds": time.monotonic() - began}) + "\n")
        if name in LAST:
            os._exit(3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
