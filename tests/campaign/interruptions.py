"""Interrupt a job at a chosen change of a file, repeat its command, and compare with an undisturbed one."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from .jobs import Job, content, hidden
from .processes import CHANGES, AtChange, Outcome, run
from .tally import Tally

ALLOWED_HIDDEN = (".slimming.lock",)


def kill() -> None:
    """End this process at once, as the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    """Press Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    """Ask the process to end, as batch systems do."""
    os.kill(os.getpid(), signal.SIGTERM)


def fill_disk() -> None:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def allow_size(limit: int) -> Callable[[], None]:
    """Let files grow to ``limit`` bytes only, as a quota does."""

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return act


class Interruptions:
    """Attacks on one job.

    Attributes:
        job: the job.
        expected: content of the directory after an undisturbed job.
    """

    def __init__(self, job: Job, root: Path) -> None:
        self.job, self.root, self.number = job, root, 0
        self._counts: dict[frozenset[str], int] = {}
        self.expected = content(self._undisturbed(CHANGES))

    def _undisturbed(self, events: Collection[str]) -> Path:
        directory = self.root / f"{self.job.name}-undisturbed-{len(self._counts)}"
        with tempfile.TemporaryFile() as counter:
            outcome = run(self.job.into(directory), hook=AtChange(directory, 0, kill, counter.fileno(), events))
            assert outcome.code == 0, outcome.output
            self._counts[frozenset(events)] = os.fstat(counter.fileno()).st_size
        return directory

    def changes(self, events: Collection[str] = CHANGES) -> int:
        """Return how often the undisturbed job changes a file, by the events that count as changes."""
        if frozenset(events) not in self._counts:
            self._undisturbed(events)
        return self._counts[frozenset(events)]

    def attack(
        self,
        tally: Tally,
        act: Callable[[], None],
        at: Iterable[int],
        codes: tuple[int, ...],
        says: str = "",
        events: Collection[str] = CHANGES,
    ) -> None:
        """Act at each change in ``at``, repeat the command, and count what differs from the undisturbed job.

        Args:
            tally: receives one count per attack.
            act: what happens in the process.
            at: numbers of changes.
            codes: exit codes that the promise allows for the attacked process.
            says: part of what the attacked process must print, unless it ended with 0.
            events: audit events that count as changes, see `AtChange`.
        """
        for change in at:
            assert 1 <= change <= self.changes(events), f"there is no change {change}"
            self.number += 1
            directory = self.root / f"{self.job.name}-{self.number}"
            attacked = run(self.job.into(directory), hook=AtChange(directory, change, act, events=events))
            fault = self._fault_of(attacked, codes, says)
            if fault is None and attacked.code == 0:
                fault = self._difference(directory)
            fault = fault or self._fault_after(directory)
            tally.add(None if fault is None else f"{self.job.name}, change {change} of {self.changes(events)}: {fault}")
            if fault is None:
                shutil.rmtree(directory)

    def _fault_of(self, attacked: Outcome, codes: tuple[int, ...], says: str) -> str | None:
        if attacked.code not in codes:
            return f"ended with {attacked.code}, not {codes}: {attacked.output[-300:]}"
        if "Traceback" in attacked.output:
            return f"printed a traceback: {attacked.output[-500:]}"
        if attacked.code > 0 and says not in attacked.output:
            return f"does not say {says!r}: {attacked.output[-300:]}"
        return None

    def _fault_after(self, directory: Path) -> str | None:
        again = run(self.job.into(directory))
        if again.code != 0:
            return f"the command does not go on ({again.code}): {again.output[-500:]}"
        left = [name for name in hidden(directory) if Path(name).name not in ALLOWED_HIDDEN]
        if left:
            return f"leftovers: {left}"
        return self._difference(directory)

    def _difference(self, directory: Path) -> str | None:
        found = content(directory)
        names = sorted({*found, *self.expected})
        different = [name for name in names if found.get(name) != self.expected.get(name)]
        return f"other content than undisturbed: {different}" if different else None
