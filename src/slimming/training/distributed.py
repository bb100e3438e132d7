"""Set up Accelerate: device and distributed processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed

if TYPE_CHECKING:
    from accelerate import PartialState


def cpu_only() -> bool:
    """Return whether there is no accelerator; Accelerate needs ``cpu=True`` to connect processes on CPUs."""
    return not torch.accelerator.is_available()


def distributed_state() -> PartialState:
    """Return the state of the processes of ``accelerate launch`` or ``torchrun``, or of this single process.

    The first call in a launched process initialises the process group.
    """
    from accelerate import PartialState

    return PartialState(cpu=cpu_only())


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank and the number of processes; (0, 1) as long as no process group is initialised."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
