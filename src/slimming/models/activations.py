"""Capture the inputs of layers during forward passes, and sum their statistics over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MAX_DIM = 8192
"""Largest number of inputs of a layer for which a covariance is computed; a larger one would take over 0.5 GB."""

RIDGE, RIDGE_PER_INPUT = 1e-4, 0.1


def ridge(inputs: int, samples: Tensor) -> Tensor:
    """The ridge term of a least-squares problem, as a share of the mean variance; larger for few samples.

    Args:
        inputs: number of variables.
        samples: number of samples from which the covariance was estimated.
    """
    return RIDGE + RIDGE_PER_INPUT * inputs / samples


def reads_all(module: nn.Module) -> bool:
    """Whether every output of ``module`` depends on all input channels: a Linear or a convolution without groups."""
    return isinstance(module, nn.Linear) or (isinstance(module, CONVOLUTIONS) and module.groups == 1)


@contextmanager
def inputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Capture the inputs of the layers called ``names`` inside the context: a tensor of shape (N, C) per call."""
    captured: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            rows = x.movedim(1, -1) if isinstance(module, CONVOLUTIONS) else x
            captured[name].append(rows.reshape(-1, rows.shape[-1]))

        return capture

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in captured]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def precise(rows: Tensor) -> Tensor:
    """``rows`` in the precision in which their products are summed: float64 on the CPU, float32 on other devices."""
    return rows.double() if rows.device.type == "cpu" else rows.float()


def own_share(batches: Sequence[T]) -> Sequence[T]:
    """The batches of this process, which are all batches if there is only one process."""
    if not _is_distributed():
        return batches
    return batches[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def add_up(*sums: Tensor) -> None:
    """Replace ``sums`` by their sums over all processes, in place."""
    if _is_distributed():
        for tensor in sums:
            torch.distributed.all_reduce(tensor)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
