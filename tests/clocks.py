"""A clock that counts in place of timing: no timing decides a test."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from slimming.models.family import TimedModule


class CountingClock:
    """In place of `latency_measurement.Clock`: a layer takes as long as the operations that torch counts in it.

    Attributes:
        asked: how often any such clock was asked for a time.
    """

    asked = 0

    def __init__(self, *args: Any) -> None:
        pass

    def reference(self, seconds: float) -> float:
        return 1.0

    def times(self, timed: TimedModule, seconds: float, reference_ms: float) -> dict[str, Any]:
        CountingClock.asked += 1
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            timed.module(torch.zeros(1, *timed.shape))
        ms = max(counter.get_total_flops(), 1) / timed.copies / 1e6
        return {"ms": ms, "p25": ms, "p75": ms, "runs": 5}
