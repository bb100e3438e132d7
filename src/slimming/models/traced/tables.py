"""Which classes keep their heads and hidden units where: tables per host."""

from __future__ import annotations

from torch import nn

from slimming.models.traced.heads import Heads
from slimming.models.traced.mlp import Hidden
from slimming.models.traced.timm_heads import TIMM
from slimming.models.traced.timm_mlps import TIMM_MLPS
from slimming.models.traced.torchvision_heads import TORCHVISION
from slimming.models.traced.transformers_heads import TRANSFORMERS, layout_of

_HEADS = {**TIMM, **TORCHVISION, **TRANSFORMERS}


def register(cls: type[nn.Module], heads: Heads) -> None:
    """Say where a class of attention keeps its heads, for models of one's own; before the model is first read."""
    _HEADS[f"{cls.__module__}.{cls.__qualname__}"] = heads


def heads_of(module: nn.Module) -> Heads | None:
    """The row of the table for ``module``, if it has one."""
    cls = type(module)
    row = _HEADS.get(f"{cls.__module__}.{cls.__qualname__}")
    if row is None and cls.__module__.startswith("transformers.models."):
        return layout_of(module)
    return row if row is None or isinstance(row, Heads) else row(module)


def hidden_of(module: nn.Module) -> Hidden | None:
    """The row of the table for the MLP ``module``, if it has one."""
    cls = type(module)
    row = TIMM_MLPS.get(f"{cls.__module__}.{cls.__qualname__}")
    return row if row is None or isinstance(row, Hidden) else row(module)
