"""Layouts: which sizes a plan may give to the layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimming.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which sizes a plan may give to the layers; sizes decide how fast the hardware runs.

    Attributes:
        equal_heads: all heads of a layer keep the same number of dimensions, QK and V alike, so that the
            host's own attention module stays. Otherwise each head keeps what its scores say.
        equal_qkv: a head's QK and V keep the same number of dimensions, which fused attention kernels ask for; heads
            of one size always do.
        multiple: head dimensions (per head) and hidden units stay in multiples of this; null: of what a latency table
            found fast on its device where a plan is made with one, of 8 elsewhere. It is halved where a layer would
            otherwise have fewer than four sizes to choose from.
        scarcity: a channel's score is divided by the share of its group that is still there at its turn, to this power;
            0: it counts the same however few are left. Scores tell what single channels matter while the others are
            there, and too little of a layer that loses nearly all of them.

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
