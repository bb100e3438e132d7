"""Directories that name odd arguments of models run nothing, open nothing else and reach nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import COUNTS, Record
from .hostile import Guard, attack, attack_arguments, good_directories
from .tally import Tally

PROMISE = "nothing is run, opened or reached beside it; a model, or one sentence, within 5 s"


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard()


def test_hostile_directories_run_and_open_nothing(tmp_path: Path, guard: Guard) -> None:
    tally = Tally("hostile", PROMISE)
    attack(tally, good_directories(tmp_path / "good"), tmp_path, guard, times=60, seed=0)
    tally.check()


@pytest.mark.slow
def test_many_hostile_directories_run_and_open_nothing(tmp_path: Path, guard: Guard, record: Record) -> None:
    tally = Tally("a directory with correct checksums names an odd argument anywhere", PROMISE)
    times = 300 if COUNTS is None else 1000
    attack(tally, good_directories(tmp_path / "good"), tmp_path, guard, times=times, seed=1)
    record(tally)


@pytest.mark.slow
def test_no_argument_names_a_file(tmp_path: Path, guard: Guard, record: Record) -> None:
    tally = Tally("a directory names a pickle by an argument of its model", PROMISE)
    attack_arguments(tally, good_directories(tmp_path / "good"), tmp_path, guard)
    record(tally)
