"""Every error that slimming raises on purpose.

    SlimmingError
     ├── UnsupportedModelError   no family reads the model, or a part that was asked for is not covered
     ├── PlanError               a plan (or a set of groups) that does not fit the model
     ├── BudgetError             a budget that is malformed or cannot be reached
     ├── CheckpointError         a checkpoint that is missing, damaged, of a newer format or of another model
     ├── ConfigError             a setting that is unknown, malformed or without effect
     ├── DataError               data that is missing, empty, unreadable or inconsistent
     ├── OutputError             an output place that is occupied, not writable or full
     ├── ParityError             an exported file does not say what the model says
     ├── NonFiniteLossError      training met a loss or a gradient that is NaN or infinite
     ├── MissingExtraError       an optional dependency is not installed
     └── Interrupted             training was stopped by the user, after its state was saved

Each message is for the person who made the mistake: what is wrong, where, and how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SlimmingError(Exception):
    """Base of every error that slimming raises on purpose."""


class UnsupportedModelError(SlimmingError):
    """No family reads the model, or a part that was asked for is not covered."""


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
    """An output place is occupied, not writable or full."""


class ParityError(SlimmingError):
    """An exported file does not say what the model says."""


class NonFiniteLossError(SlimmingError):
    """Training met a loss or a gradient that is NaN or infinite."""


class MissingExtraError(SlimmingError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class Interrupted(SlimmingError):
    """Training was stopped by the user, after its state was saved."""


def nearest(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """Return ``" Did you mean 'x'?"`` for the candidate nearest to ``name``, or an empty string.

    ``prefix`` is written before the candidate, and not compared.

    >>> nearest("batchsize", ["batch_size", "lr"], "train.")
    " Did you mean 'train.batch_size'?"
    """
    found = difflib.get_close_matches(name, list(candidates), n=1)
    return f" Did you mean {prefix + found[0]!r}?" if found else ""
