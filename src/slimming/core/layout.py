"""Layouts: the sizes that a plan may give to the layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimming.core.argument_types import check_fields
from slimming.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes that a plan may give to the layers. Sizes affect the speed on hardware.

    Attributes:
        equal_heads: all heads of a layer keep the same number of dimensions, of QK and V alike, so that the attention
            module of the model can be used as it is. Otherwise the number of each head follows from its scores.
        equal_qkv: QK and V of a head keep the same number of dimensions, which fused attention kernels require; always
            so with ``equal_heads``.
        multiple: head dimensions (per head) and hidden units are kept in multiples of this; null takes the multiple
            that the latency table found fast if the plan uses one, else 8. It is halved for layers that would
            otherwise have fewer than four possible sizes.
        scarcity: the score of a channel is divided by the share of its group that remains when it is removed, raised to
            this power; 0 leaves scores unchanged. Scores measure the effect of removing single channels, which
            underestimates the effect of removing nearly all channels of a layer.

    Raises:
        ConfigError: ``multiple`` is below 1, or ``scarcity`` is below 0.
    """

    equal_heads: bool = True
    equal_qkv: bool = True
    multiple: int | None = None
    scarcity: float = 2.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.scarcity >= 0 and math.isfinite(self.scarcity)):
            raise ConfigError(f"layout.scarcity={self.scarcity}: give a power of 0 (as scored) or more, such as 2.")
        if self.multiple is not None and self.multiple < 1:
            raise ConfigError(f"layout.multiple={self.multiple}: give 1 (any size) or more, for example 8.")


SOLVERS = ("nested", "exact")
"""Solvers that make a plan under limits, see `slimming.plan`."""

FREE = Layout(equal_heads=False, equal_qkv=False, multiple=1, scarcity=0.0)
"""Layout without constraints, as in the ViT-Slim paper."""
