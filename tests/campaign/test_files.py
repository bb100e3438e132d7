"""No damaged file is read without a word, crashes the program, or takes long; `slow` tries many more."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import COUNTS, Record
from .files import Target, attack, good_files, targets


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_files(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_damaged_files_end_in_a_sentence(target: Target, good: Path, tmp_path: Path) -> None:
    attack(target, good, tmp_path, times=24, seed=0).check()


@pytest.mark.slow
@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_many_damaged_files_end_in_a_sentence(target: Target, good: Path, tmp_path: Path, record: Record) -> None:
    record(attack(target, good, tmp_path, times=100 if COUNTS is None else 300, seed=1))
