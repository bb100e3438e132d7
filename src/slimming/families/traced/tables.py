"""Which classes of attention keep their heads where: one table per host."""

from __future__ import annotations

from torch import nn

from slimming.families.traced.heads import Heads
from slimming.families.traced.timm_heads import TIMM


def heads_of(module: nn.Module) -> Heads | None:
    """The row of the table for ``module``, if it has one."""
    cls = type(module)
    row = TIMM.get(f"{cls.__module__}.{cls.__qualname__}")
    return row if row is None or isinstance(row, Heads) else row(module)
