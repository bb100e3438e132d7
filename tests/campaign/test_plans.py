"""A cut equals the masked model, whatever is cut."""

from __future__ import annotations

import pytest

from .conftest import COUNTS, Record
from .plans import attack
from .tally import Tally

PROMISE = "the slim model equals the masked one within 1e-9, forward and backward, and after saving and loading"


@pytest.mark.slow
def test_random_cuts_equal_the_masked_model(record: Record) -> None:
    tally = Tally("a random cut of a small model", PROMISE)
    attack(tally, times=24 if COUNTS is None else 180, seed=0)
    record(tally)
