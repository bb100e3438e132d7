"""Layouts: which sizes a plan may give to the layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimming.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which sizes a plan may give to the layers; sizes decide how fast the hardware runs.

    Attributes:
        equal_heads: all heads of a layer keep the same number of query-key and value dimensions, so that the
            host's own attention module stays. Otherwise each head has its own size.
        equal_qkv: query-key and value sizes of a head are equal, which fused attention kernels need; with
            ``equal_heads`` they always are.
        multiple: head dimensions (per head), hidden units and channels are kept in multiples of this. None takes the
            multiple that a latency table found fast if the plan is made with one, else 8. It is halved where a layer
            would have fewer than four sizes to choose from.
        scarcity: a channel's score is divided by the share of its group that is still there, to this power. Scores are
            taken while all channels are there and underestimate a layer that is nearly gone. 0 switches this off.

    Raises:
        ConfigError: ``multiple`` is below 1, or ``scarcity`` below 0.
    """

    equal_heads: bool = True
    equal_qkv: bool = True
    multiple: int | None = None
    scarcity: float = 2.0

    def __post_init__(self) -> None:
        if not (self.scarcity >= 0 and math.isfinite(self.scarcity)):
            raise ConfigError(f"layout.scarcity={self.scarcity}: give a power of 0 (as scored) or more, such as 2.")
        if self.multiple is not None and self.multiple < 1:
            raise ConfigError(f"layout.multiple={self.multiple}: give 1 (any size) or more, for example 8.")


SOLVERS = ("nested", "exact")
"""Ways to make a plan under limits, see `slimming.plan`."""

FREE = Layout(equal_heads=False, equal_qkv=False, multiple=1, scarcity=0.0)
"""Every unit on its own, as in the paper."""
