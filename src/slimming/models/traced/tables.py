"""Look up the row of an attention or MLP class in the tables of all hosts."""

from __future__ import annotations

from torch import nn

from slimming.models.traced.heads import Heads
from slimming.models.traced.mlp import Hidden
from slimming.models.traced.timm_heads import TIMM
from slimming.models.traced.timm_mlps import TIMM_MLPS
from slimming.models.traced.torchvision_heads import TORCHVISION
from slimming.models.traced.transformers_heads import TRANSFORMERS, inferred_row

_HEADS = {**TIMM, **TORCHVISION, **TRANSFORMERS}


def register(cls: type[nn.Module], heads: Heads) -> None:
    """Add a row for an attention class of your own. Call it before a model with this class is first read."""
    _HEADS[f"{cls.__module__}.{cls.__qualname__}"] = heads


def heads_of(module: nn.Module) -> Heads | None:
    """The row of the attention module ``module``; None if no table has one."""
    cls = type(module)
    row = _HEADS.get(f"{cls.__module__}.{cls.__qualname__}")
    if row is None and cls.__module__.startswith("transformers.models."):
        return inferred_row(module)
    return row if row is None or isinstance(row, Heads) else row(module)


def hidden_of(module: nn.Module) -> tuple[Hidden, ...]:
    """The rows of the MLP ``module``; empty if no table has one."""
    cls = type(module)
    row = TIMM_MLPS.get(f"{cls.__module__}.{cls.__qualname__}")
    if row is None:
        return ()
    rows = row if isinstance(row, Hidden) else row(module)
    return (rows,) if isinstance(rows, Hidden) else rows
