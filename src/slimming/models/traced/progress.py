"""Say on the standard error stream what is being read of a model, if reading takes more than a few seconds."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

SECONDS = 4.0
"""Seconds before the first line, and between two lines."""


@dataclass
class Progress:
    """Prints a line now and then.

    Attributes:
        model: the class of the model that is being read.
        printed: when the last line was printed, or reading began.
    """

    model: str
    printed: float = field(default_factory=lambda: time.monotonic())

    def step(self, what: str) -> None:
        """Say that ``what`` comes next, if the last line is `SECONDS` old."""
        now = time.monotonic()
        if now - self.printed >= SECONDS:
            self.printed = now
            print(f"slimming: reading {self.model}: {what}", file=sys.stderr, flush=True)
