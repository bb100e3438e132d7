"""Which processes take part, decided in one place: the launcher's environment and the hardware at hand."""

from __future__ import annotations

import torch
from accelerate import PartialState


def no_accelerator() -> bool:
    """Whether only CPUs are at hand; Accelerate then has to be told to join CPU processes at all."""
    return not torch.accelerator.is_available()


def processes() -> PartialState:
    """The processes that ``accelerate launch`` or ``torchrun`` started, or this one alone."""
    return PartialState(cpu=no_accelerator())
