"""Search, interrupt, resume, score, cut and retrain in one or more processes, with or without FSDP2.

python tests/training/sharding_job.py OUT
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import timm
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import slimming
from slimming.training.distributed import distributed_state
from slimming.training.samples import Data


def make() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=2)


class Batches:
    """Batches that cannot be read from number ``bad`` on."""

    def __init__(self, bad: int = 99) -> None:
        self.bad = bad

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for number in range(6):
            if number >= self.bad:
                raise slimming.errors.DataError("unreadable")
            yield torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 0, 1])


def data(bad: int = 99) -> Data:
    return Data(Batches(bad), list(Batches())[:2], ("no", "yes"))


def main(out: Path) -> None:
    """Leave the results in OUT."""
    torch.set_num_threads(1)
    first = distributed_state().is_main_process
    train = slimming.TrainConfig(steps=4, batch_size=4, lr=1e-3, accumulate=2, checkpoint_seconds=0, clip_grad=0.5)
    config = slimming.SearchConfig(train=train, mask_lr=10.0, images=8)
    dense = make()
    with suppress(slimming.errors.DataError):
        slimming.search(copy.deepcopy(dense), data(bad=2), config, directory=out / "search")
    assert (out / "search" / "state.pt").exists() or not first
    result = slimming.search(
        copy.deepcopy(dense),
        data(),
        config,
        directory=out / "search",
        resume=True,
        evaluate=lambda model: slimming.evaluate(model, data().val),
    )
    plan = slimming.plan(result, slimming.Budget(macs=0.5))
    small = slimming.cut(result.model, plan)
    still = dataclasses.replace(train, accumulate=1, optimizer="sgd", clip_grad=None)
    distil = slimming.DistilConfig(features=("blocks.0",))
    slimming.train(small, data(), still, teacher=dense, distil=distil)
    saw: set[bool] = set()

    def probe(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        saw.add(isinstance(model, FSDPModule))
        return model(batch[0]).square().mean()

    slimming.train(make(), data(), still, loss=probe)
    if first:
        found = {
            "sharded": {"all": torch.tensor(saw == {True}), "none": torch.tensor(saw == {False})},
            "searched": result.masks.weights(),
            "masks": {name: mask.detach() for name, mask in result.masks.items()},
            "collected": result.masks.collected,
            "scores": dict(result.scores),
            "retrained": small.state_dict(),
            "evaluated": {"loss": torch.tensor(result.metrics["loss"])},
        }
        torch.save(found, out / "found.pt")
        slimming.save(small, out / "small")
        (out / "kept.txt").write_text(repr(plan.kept))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
