"""Handle Ctrl-C and SIGTERM, the signal that batch systems send before they kill a job."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from slimming.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], None]


class InterruptRequest:
    """Signal handler that records Ctrl-C or SIGTERM, so that the current step can finish.

    A second signal stops at once, without saving. It is ignored within one second after the first, because launchers
    forward signals and a process then receives them twice.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self.signal: int = signal.SIGINT
        self._at_once = False

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return self.since is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Record the signal.

        Raises:
            KeyboardInterrupt: it is a second signal, more than one second after the first, or the block is `at_once`.
        """
        now = time.monotonic()
        repeated = self.since is not None and now - self.since > 1.0
        if self.since is None:
            self.since, self.signal = now, number
        if repeated or self._at_once:
            raise KeyboardInterrupt(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `KeyboardInterrupt` in this block as soon as a signal is received, or was received before."""
        self._at_once = True
        try:
            if self.requested:
                raise KeyboardInterrupt(self.signal)
            yield
        finally:
            self._at_once = False


@contextmanager
def defer_interrupt() -> Iterator[InterruptRequest]:
    """Record Ctrl-C and SIGTERM in this block, instead of stopping at once."""
    request = InterruptRequest()
    with handled_by(request):
        yield request


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Stop this block at once at Ctrl-C or SIGTERM.

    Raises:
        Interrupted: a signal was received; the message is "Stopped. {advice}".
    """
    try:
        with handled_by(raise_interrupt):
            yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"Stopped. {advice}", signal_of(error)) from error


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt` with the number of the signal; a signal handler."""
    raise KeyboardInterrupt(number)


def signal_of(error: KeyboardInterrupt) -> int:
    """Return the number of the signal that raised ``error``."""
    return error.args[0] if error.args else signal.SIGINT


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Handle `SIGNALS` in this block; in threads other than the main one, where Python cannot do so, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
