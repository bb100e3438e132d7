"""What layers read while a model runs over images, on one process or shared out over many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WIDEST = 8192
"""Layers that read more than this have no covariance of their inputs: it would take over 0.5 GB."""

RIDGE, DOUBT = 1e-4, 0.1


def ridge(inputs: int, samples: Tensor) -> Tensor:
    """What is added to the diagonal of a covariance before it is inverted, as a share of the mean variance."""
    return RIDGE + DOUBT * inputs / samples


def reads_all(module: nn.Module) -> bool:
    """Whether every output of ``module`` is a weighted sum of all its inputs, at one place or around it."""
    return isinstance(module, nn.Linear) or (isinstance(module, CONVOLUTIONS) and module.groups == 1)


@contextmanager
def inputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What the layers called ``names`` read while the context lasts: one tensor of rows per call, shape (N, C)."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            rows = x.movedim(1, -1) if isinstance(module, CONVOLUTIONS) else x
            found[name].append(rows.reshape(-1, rows.shape[-1]))

        return keep

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in found]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def precise(rows: Tensor) -> Tensor:
    """``rows`` in the precision in which their products are summed: double on the CPU, single elsewhere."""
    return rows.double() if rows.device.type == "cpu" else rows.float()


def own_share(batches: Sequence[T]) -> Sequence[T]:
    """The batches that this process runs; all of them where there is one process."""
    if not _many():
        return batches
    return batches[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def add_up(*sums: Tensor) -> None:
    """Add up what the processes found, in place and on each."""
    if _many():
        for one in sums:
            torch.distributed.all_reduce(one)


def _many() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
