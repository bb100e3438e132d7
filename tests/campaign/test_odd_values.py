"""Odd values of settings are taken and read back, or end in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import COUNTS, Record
from .odd_values import attack
from .tally import Tally

PROMISE = "one sentence, or settings that are read back the same, within 5 s"


def test_odd_values_end_in_a_sentence(tmp_path: Path) -> None:
    tally = Tally("odd values", PROMISE)
    attack(tally, tmp_path, share=0.03, seed=0)
    tally.check()


@pytest.mark.slow
def test_many_odd_values_end_in_a_sentence(tmp_path: Path, record: Record) -> None:
    tally = Tally("an odd value for a setting of `run`", PROMISE)
    attack(tally, tmp_path, share=0.3 if COUNTS is None else 1.0, seed=1)
    record(tally)
