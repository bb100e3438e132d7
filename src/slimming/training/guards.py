"""What may stop a run from outside: Ctrl-C and a full memory."""

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
    """Remembers that Ctrl-C was pressed, so that the step under way can end first.

    Pressing it again after a second or more stops at once, without saving. (Launchers pass the signal on, so
    that it arrives twice within moments.)
    """

    def __init__(self) -> None:
        self.since: float | None = None

    @property
    def requested(self) -> bool:
        """Whether it was pressed."""
        return self.since is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal.

        Raises:
            KeyboardInterrupt: it came again.
        """
        if self.since is not None and time.monotonic() - self.since > 1.0:
            raise KeyboardInterrupt
        self.since = self.since or time.monotonic()


@contextmanager
def defer_interrupt() -> Iterator[InterruptRequest]:
    """Catch Ctrl-C while the block runs. Outside the main thread Python cannot, and nothing changes."""
    request = InterruptRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.signal(signal.SIGINT, request)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn a lack of memory into ``advice``, which follows on "Out of memory".

    Raises:
        ConfigError: the block ran out of memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        lacking = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if not lacking:
            raise
        raise ConfigError(f"Out of memory {advice}.") from error
