"""Where the campaign keeps its counts, and how much of it is tried."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from .tally import Tally

Record = Callable[[Tally], None]
COUNTS = os.environ.get("CAMPAIGN_COUNTS")
"""File to which every test appends its counts; `benchmarks/reliability.py` sets it and tries the whole campaign."""


@pytest.fixture
def record() -> Record:
    """A function that keeps the counts of an attack, and fails if any was bad."""

    def keep(tally: Tally) -> None:
        if COUNTS is not None:
            with Path(COUNTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(tally)) + "\n")
        tally.check()

    return keep
