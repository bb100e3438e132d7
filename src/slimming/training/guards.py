"""Handle Ctrl-C and out-of-memory errors during training."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from slimming.errors import ConfigError


class InterruptRequest:
    """Signal handler that records Ctrl-C, so that the current step can finish.

    A second Ctrl-C stops at once, without saving. It is ignored within one second after the first, because launchers
    forward the signal and a process then receives it twice.
    """

    def __init__(self) -> None:
        self.since: float | None = None

    @property
    def requested(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self.since is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Record the signal.

        Raises:
            KeyboardInterrupt: it is a second signal, more than one second after the first.
        """
        if self.since is not None and time.monotonic() - self.since > 1.0:
            raise KeyboardInterrupt
        self.since = self.since or time.monotonic()


@contextmanager
def defer_interrupt() -> Iterator[InterruptRequest]:
    """Record Ctrl-C instead of raising `KeyboardInterrupt` in this block.

    Python allows signal handlers in the main thread only; in other threads this does nothing.
    """
    request = InterruptRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = signal.signal(signal.SIGINT, request)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, previous)


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
