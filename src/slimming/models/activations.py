"""What layers read while a model runs over images, on one process or shared out over many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from slimming.core.groups import Group, Slices
from slimming.training.distributed import rank_and_world_size

T = TypeVar("T")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WIDEST = 8192
"""Layers that read more than this have no covariance of their inputs: it would take over 0.5 GB."""
GIGABYTES = 1.0
"""At most so much memory for covariances in one pass over the images."""

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
    rank, world = rank_and_world_size()
    return batches if world == 1 else batches[rank::world]


def add_up(*sums: Tensor) -> None:
    """Add up what the processes found, in place and on each."""
    if rank_and_world_size()[1] > 1:
        for one in sums:
            torch.distributed.all_reduce(one)


class Moments:
    """Sums over rows x and, with ``others``, y that come with them, in double precision.

    Attributes:
        count: how many rows.
        x: their sum, shape (size,).
        xx: the sum of their products with themselves, shape (size, size).
        y: the sum of the others, shape (others,).
        yx: the sum of their products with x, shape (others, size).

    Args:
        size: numbers in a row x.
        device: where the sums are.
        others: numbers in a row y.
    """

    def __init__(self, size: int, device: torch.device, others: int = 0) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count, self.x, self.xx = zeros(), zeros(size), zeros(size, size)
        self.y, self.yx = zeros(others), zeros(others, size)

    def add(self, x_NC: Tensor, y_ND: Tensor | None = None) -> None:
        """Count rows in; they come in the precision that `precise` gives."""
        self.count += len(x_NC)
        self.x += x_NC.sum(0)
        self.xx += x_NC.T @ x_NC
        if y_ND is not None:
            self.y += y_ND.sum(0)
            self.yx += y_ND.T @ x_NC

    def add_up(self) -> None:
        """Add up what the processes found, on each."""
        add_up(self.count, self.x, self.xx, *((self.y, self.yx) if len(self.y) else ()))


def in_parts(items: Iterable[T], gigabytes: Callable[[T], float], most: int | None = None) -> Iterator[list[T]]:
    """Cut ``items`` into runs that are done in one pass over the images: `GIGABYTES` together, or one item.

    Args:
        items: in their order.
        gigabytes: memory that one takes.
        most: items in a run, at most.
    """
    part: list[T] = []
    size = 0.0
    for item in items:
        own = gigabytes(item)
        if part and (len(part) == most or size + own > GIGABYTES):
            yield part
            part, size = [], 0.0
        part.append(item)
        size += own
    if part:
        yield part


def feeds_layers(group: Group) -> bool:
    """Whether the units of ``group`` lie between a layer that makes them and one that reads them.

    Norms lie between features of the embedding and their readers; an attention or MLP that goes has no reader; QK and V
    are groups of their own beside the coupled one.
    """
    return not group.norms and group.role not in ("branch", "qkv")


def layers_reading(model: nn.Module, group: Group) -> list[Slices]:
    """The slices by which layers whose inputs have a covariance read the units of ``group``: columns of weights."""
    return [
        one
        for one in group.slices
        if one.side == "consumes" and one.dim == 1 and one.tensor.endswith(".weight")
        and reads_all(layer := model.get_submodule(one.tensor.rpartition(".")[0]))
        and layer.get_parameter("weight").shape[1] <= WIDEST
    ]  # fmt: skip
