"""Explain out-of-memory errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slimming.errors import ConfigError


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn out-of-memory errors of this block into a `ConfigError` with the message "Out of memory {advice}.".

    Raises:
        ConfigError: the block ran out of memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # For memory of the CPU, PyTorch raises a plain RuntimeError.
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise ConfigError(f"Out of memory {advice}.") from error
