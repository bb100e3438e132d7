"""Interrupt a job at a chosen change of a file, repeat its command, and compare with an undisturbed one."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
import shutil

from tests.campaign.jobs import Job, content, hidden
from tests.campaign.processes import CHANGES, AtChange, Outcome, run
from tests.campaign.tally import Tally

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


def count_changes(job: Job, directory: Path) -> int:
    """Run ``job`` undisturbed in ``directory`` and return how often it changed a file."""
    with tempfile.TemporaryFile() as counter:
        outcome = run(job.into(directory), hook=AtChange(directory, 0, kill, counter.fileno()))
        assert outcome.code == 0, outcome.output
        return counter.tell() or os.fstat(counter.fileno()).st_size


class Interruptions:
    """Attacks on one job.

    Attributes:
        job: the job.
        changes: how often the undisturbed job changes a file.
    """

    def __init__(self, job: Job, root: Path) -> None:
        self.job, self.root = job, root
        self.undisturbed = root / f"{job.name}-undisturbed"
        self.changes = count_changes(job, self.undisturbed)
        self.expected = content(self.undisturbed)
        self.number = 0

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
            self.number += 1
            directory = self.root / f"{self.job.name}-{self.number}"
            attacked = run(self.job.into(directory), hook=AtChange(directory, change, act, events=events))
            fault = self._fault_of(attacked, codes, says) or self._fault_after(directory)
            tally.add(None if fault is None else f"{self.job.name}, change {change} of {self.changes}: {fault}")
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
        found = content(directory)
        different = sorted(
            name for name in {*found, *self.expected} if found.get(name, None) != self.expected.get(name, None)
        )
        return f"other content than undisturbed: {different}" if different else None

