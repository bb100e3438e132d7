"""Interrupted at any change of a file, a command goes on where it was; `slow` interrupts at many more of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from . import two_writers
from .conftest import COUNTS, Record
from .interruptions import Interruptions, allow_size, fill_disk, interrupt, kill, terminate
from .jobs import make_jobs
from .processes import CHANGES, SPACE
from .tally import Tally

SAME = "the same command ends with the same files, bit for bit, and leaves nothing else"
Case = tuple[str, Callable[[], None], tuple[int, ...], str, Collection[str]]
ACTS: dict[str, Case] = {
    "killed": ("killed (SIGKILL) before a change of a file", kill, (-signal.SIGKILL, 0), "", CHANGES),
    "Ctrl-C": ("Ctrl-C before a change of a file", interrupt, (0, 128 + signal.SIGINT), "", CHANGES),
    "terminated": ("SIGTERM before a change of a file", terminate, (0, 128 + signal.SIGTERM), "", CHANGES),
    "disk full": ("disk full at a new file or directory", fill_disk, (0, 2), "disk is full", SPACE),
}
JOBS = ("train", "search") if COUNTS is None else ("train", "search", "run")
"""A run draws a report, which hangs in a process that is forked from one that drew another. The whole campaign has a
process for this file alone; in the test runs, runs are interrupted by tests/cli/test_directories.py."""
FILLED = ("train",) if COUNTS is None else ("train", "search")
"""The jobs for which files are limited, and a second process starts."""
STRIDES = {"train": (20, 1), "search": (96, 8), "run": (180, 60)}
"""Every how many changes a job is interrupted, in the slow tests and in the whole campaign."""
LIMITS = (0, 1, 100, 1000, 4096, 10_000, 50_000, 100_000, 200_000, 400_000, 800_000, 1_200_000, 1_600_000, 2_400_000)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Interruptions]:
    """The attacks on a job by its name; a job runs undisturbed when it is first asked for."""
    root = tmp_path_factory.mktemp("interrupted")
    jobs, known = make_jobs(root), {}

    def find(name: str) -> Interruptions:
        if name not in known:
            known[name] = Interruptions(jobs[name], root)
        return known[name]

    return find


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_an_interrupted_training_goes_on(act: str, attacked: Callable[[str], Interruptions]) -> None:
    what, function, codes, says, events = ACTS[act]
    tally, job = Tally(f"`train`: {what}", SAME), attacked("train")
    job.attack(tally, function, range(3, job.changes(events) + 1, 25), codes, says, events)
    tally.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS, ids=str)
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_interrupted_at_many_changes_a_command_goes_on(
    act: str,
    name: str,
    attacked: Callable[[str], Interruptions],
    record: Record,
) -> None:
    what, function, codes, says, events = ACTS[act]
    tally, job = Tally(f"`{name}`: {what}", SAME), attacked(name)
    stride = STRIDES[name][COUNTS is not None]
    job.attack(tally, function, range(1, job.changes(events) + 1, stride), codes, says, events)
    record(tally)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILLED, ids=str)
def test_a_quota_of_the_file_size_ends_in_a_sentence(
    name: str, attacked: Callable[[str], Interruptions], record: Record
) -> None:
    tally = Tally(f"`{name}`: files may not grow beyond a limit", f"one sentence; without the limit, {SAME}")
    for limit in LIMITS:
        attacked(name).attack(tally, allow_size(limit), [1], (0, 2), "cannot be written")
    record(tally)


def test_a_second_process_is_refused(attacked: Callable[[str], Interruptions], tmp_path: Path) -> None:
    tally, job = Tally("two processes", ""), attacked("train")
    two_writers.attack(tally, job, tmp_path, range(12, job.changes() + 1, 40))
    tally.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", FILLED, ids=str)
def test_a_second_process_is_refused_at_any_time(
    name: str,
    attacked: Callable[[str], Interruptions],
    tmp_path: Path,
    record: Record,
) -> None:
    promise = "the second is refused with the process number of the first, which ends as if alone"
    tally, job = Tally(f"`{name}`: started twice for one directory", promise), attacked(name)
    two_writers.attack(tally, job, tmp_path, range(12, job.changes() + 1, 10 if COUNTS is None else 3))
    record(tally)
