"""Exceptions of slimming.

    SlimmingError
     ├── UnsupportedModelError   the model, or a part of it that was named, is not supported
     ├── PlanError               a plan, or a set of groups, does not fit the model
     ├── BudgetError             a budget is malformed or cannot be reached
     ├── CheckpointError         a checkpoint is missing, damaged, of a newer format or of another model
     ├── ConfigError             a setting is unknown, malformed or without effect
     ├── DataError               data is missing, empty, unreadable or inconsistent
     ├── OutputError             an output file or directory exists, is in use or not writable; or the disk is full
     ├── ParityError             the outputs of an exported file differ from those of the model
     ├── NonFiniteLossError      a loss or a gradient in training is NaN or infinite
     ├── MissingExtraError       an optional dependency is not installed
     ├── ProcessError            another process of the run failed or ended
     └── Interrupted             the work was stopped by Ctrl-C or SIGTERM; a training saves its state first

A message says what is wrong, where, and how to correct it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SlimmingError(Exception):
    """Base class of the exceptions of slimming."""


class UnsupportedModelError(SlimmingError):
    """The model, or a part of it that was named, is not supported."""


class PlanError(SlimmingError):
    """A plan, or a set of groups, does not fit the model."""


class BudgetError(SlimmingError):
    """A budget is malformed or cannot be reached."""


class CheckpointError(SlimmingError):
    """A checkpoint is missing, damaged, of a newer format or of another model."""


class ConfigError(SlimmingError):
    """A setting is unknown, malformed or without effect."""


class DataError(SlimmingError):
    """Data is missing, empty, unreadable or inconsistent."""


class OutputError(SlimmingError):
    """An output file or directory exists, is in use or not writable; or the disk is full."""


class ParityError(SlimmingError):
    """The outputs of an exported file differ from those of the model."""


class NonFiniteLossError(SlimmingError):
    """A loss or a gradient in training is NaN or infinite."""


class MissingExtraError(SlimmingError):
    """An optional dependency is not installed; the message says how to install it."""


class ProcessError(SlimmingError):
    """Another process of a run with several processes failed, or ended."""


class Interrupted(SlimmingError):
    """The work was stopped by Ctrl-C or SIGTERM; a training saves its state first.

    Attributes:
        signal: number of the signal, 2 for Ctrl-C (SIGINT) and 15 for SIGTERM.
    """

    def __init__(self, message: str, signal: int = 2) -> None:
        super().__init__(message)
        self.signal = signal


def nearest(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """Return ``" Did you mean 'x'?"`` for the candidate closest to ``name``, or an empty string if none is close.

    ``prefix`` is written before the candidate but not compared.

    >>> nearest("batchsize", ["batch_size", "lr"], "train.")
    " Did you mean 'train.batch_size'?"
    """
    matches = difflib.get_close_matches(name, list(candidates), n=1)
    return f" Did you mean {prefix + matches[0]!r}?" if matches else ""
