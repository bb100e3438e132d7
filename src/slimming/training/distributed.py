"""Which processes take part, decided in one place: the launcher's environment and the hardware at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed

if TYPE_CHECKING:
    from accelerate import PartialState


def cpu_only() -> bool:
    """Whether only CPUs are at hand; Accelerate then has to be told to join CPU processes at all."""
    return not torch.accelerator.is_available()


def distributed_state() -> PartialState:
    """The processes that ``accelerate launch`` or ``torchrun`` started, or this one alone."""
    from accelerate import PartialState

    return PartialState(cpu=cpu_only())


def rank_and_world_size() -> tuple[int, int]:
    """The number of this process and how many have joined: (0, 1) until `processes` or the user has joined them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
