"""Two processes that write the same directory at the same time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from .interruptions import Interruptions
from .jobs import content
from .processes import AtChange, run, start
from .tally import Tally


def attack(tally: Tally, job: Interruptions, root: Path, at: Iterable[int], others: Iterable[list[str]] = ()) -> None:
    """Hold the job at each change in ``at``, start its command a second time, and let the first one go on.

    The second must be refused with the process number of the first, and the first end as if it had been alone.

    Args:
        tally: receives one count per attack.
        job: the job with its undisturbed content.
        root: an empty directory.
        at: numbers of changes.
        others: command lines without ``--output`` that are tried as the second process too.
    """
    for number, change in enumerate(at):
        for turn, words in enumerate((list(job.job.words), *others)):
            directory = root / f"{job.job.name}-two-{number}-{turn}"
            held, released = root / f"held-{number}-{turn}", root / f"released-{number}-{turn}"
            first = start(job.job.into(directory), hook=AtChange(directory, change, _pause(held, released)))
            while not held.exists() and time.monotonic() - first.began < 60:
                time.sleep(0.01)
            second = run([*words, "--output", str(directory)])
            released.touch()
            outcome = first.wait()
            fault = None
            if second.code != 2 or str(first.pid) not in second.output:
                fault = f"the second ended with {second.code}: {second.output[-300:]}"
            elif outcome.code != 0:
                fault = f"the first ended with {outcome.code}: {outcome.output[-300:]}"
            elif content(directory) != job.expected:
                fault = "the first wrote other files than alone"
            tally.add(None if fault is None else f"{job.job.name}, change {change}: {fault}")


def _pause(held: Path, released: Path) -> Callable[[], None]:
    def act() -> None:
        os.close(os.open(held, os.O_CREAT | os.O_WRONLY))
        began = time.monotonic()
        while not released.exists() and time.monotonic() - began < 60:
            time.sleep(0.01)

    return act
