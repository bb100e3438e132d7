"""Capture the inputs of layers during forward passes, and sum their statistics over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from slimming.core.groups import Group, Slices
from slimming.errors import NonFiniteLossError
from slimming.training.distributed import add_up, rank_and_world_size

T = TypeVar("T")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MAX_COVARIANCE_INPUTS = 8192
"""Largest number of inputs of a layer for which a covariance is computed; a larger one would take over 0.5 GB."""
GIGABYTES = 1.0
"""Largest memory for covariances in one pass over the images."""

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
    rank, world = rank_and_world_size()
    return batches if world == 1 else batches[rank::world]


class Moments:
    """Sums and sums of products of rows x, and of rows y that belong to them, in float64.

    Attributes:
        count: number of rows.
        x: sum of x, shape (size,).
        xx: sum of the products of x with itself, shape (size, size).
        y: sum of y, shape (others,).
        yx: sum of the products of y with x, shape (others, size).

    Args:
        size: length of a row x.
        device: device of the sums.
        others: length of a row y; 0 if there is no y.
    """

    def __init__(self, size: int, device: torch.device, others: int = 0) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count, self.x, self.xx = zeros(), zeros(size), zeros(size, size)
        self.y, self.yx = zeros(others), zeros(others, size)

    def add(self, x_NC: Tensor, y_ND: Tensor | None = None) -> None:
        """Add rows in the precision of `precise`."""
        self.count += len(x_NC)
        self.x += x_NC.sum(0)
        self.xx += x_NC.T @ x_NC
        if y_ND is not None:
            self.y += y_ND.sum(0)
            self.yx += y_ND.T @ x_NC

    def add_up(self) -> None:
        """Replace the sums by their sums over all processes.

        Raises:
            NonFiniteLossError: they are not finite, so that no factorisation of them exists; on all processes alike.
        """
        sums = (self.count, self.x, self.xx, *((self.y, self.yx) if len(self.y) else ()))
        add_up(*sums)
        if not all(bool(torch.isfinite(total).all()) for total in sums):
            raise NonFiniteLossError(
                "The inputs of the layers are not finite. Check the images and the weights of the model."
            )


def in_parts(items: Iterable[T], gigabytes: Callable[[T], float], most: int | None = None) -> Iterator[list[T]]:
    """Divide ``items`` into parts that need one pass over the images each: `GIGABYTES` of memory, or one item.

    Args:
        items: the items, in order.
        gigabytes: memory of an item.
        most: largest number of items in a part.
    """
    part: list[T] = []
    part_size = 0.0
    for item in items:
        size = gigabytes(item)
        if part and (len(part) == most or part_size + size > GIGABYTES):
            yield part
            part, part_size = [], 0.0
        part.append(item)
        part_size += size
    if part:
        yield part


def feeds_layers(group: Group) -> bool:
    """Whether the units of ``group`` are outputs of one layer and inputs of another.

    This is False for features of the embedding, because norms lie between them and the layers that read them; for a
    whole attention or MLP; and for coupled dimensions, which also belong to the groups of QK and V.
    """
    return group.kind != "width" and group.role not in ("branch", "qkv")


def layers_reading(model: nn.Module, group: Group) -> list[Slices]:
    """The slices of ``group`` in weights of layers whose inputs have a covariance: Linears and convolutions.

    Layers that standardise their weights are left out, because they compute with other weights than they hold.
    """
    return [
        part
        for part in group.slices
        if part.side == "consumes" and part.dim == 1 and part.tensor.endswith(".weight")
        and part.tensor.rpartition(".")[0] not in group.norms
        and reads_all(layer := model.get_submodule(part.tensor.rpartition(".")[0]))
        and layer.get_parameter("weight").shape[1] <= MAX_COVARIANCE_INPUTS
    ]  # fmt: skip
