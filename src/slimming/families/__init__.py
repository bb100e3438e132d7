"""Reading models: one family per kind of host model, and the only code that names host classes.

Families are imported when the first model is read, so that ``import slimming`` stays light.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from slimming.errors import CheckpointError
from slimming.family import STRUCTURE, Family

__all__ = ["STRUCTURE", "Family", "all_families", "family_called", "family_of"]


@cache
def all_families() -> Mapping[str, Family]:
    """Every family by name."""
    from slimming.families.timm_vit import TimmViT
    from slimming.families.traced import Traced

    vit = TimmViT()
    return {family.name: family for family in (vit, Traced([vit]))}


def family_of(model: nn.Module) -> Family:
    """The family that reads ``model``; the last one reads what no other does."""
    return next(family for family in all_families().values() if family.reads(model))


def family_called(name: Any) -> Family:
    """The family with this name, as a structure gives it.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return all_families()[name]
    except (KeyError, TypeError) as error:
        known = ", ".join(all_families())
        raise CheckpointError(
            f"The checkpoint is of family {name!r}; this version of slimming knows {known}. Upgrade slimming."
        ) from error
