"""A model together with what its family read in it: what every step of the method is given."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from torch import nn

from slimming.core.groups import Anatomy
from slimming.models.families import family_called, family_of
from slimming.models.family import Family


@dataclass(frozen=True, kw_only=True)
class PrunableModel:
    """A model that was read. Public functions read a model once and hand this on.

    Attributes:
        model: the model itself, not a copy.
        family: the reader of its kind.
        anatomy: its groups, cost formulas, structure and input shape.
    """

    model: nn.Module
    family: Family
    anatomy: Anatomy

    def copy(self) -> PrunableModel:
        """A deep copy of the model, which need not be read again."""
        return replace(self, model=copy.deepcopy(self.model))


def read(model: nn.Module) -> PrunableModel:
    """Read a model that has no masks attached.

    Raises:
        UnsupportedModelError: no family reads the model, or one of its parts.
    """
    family = family_of(model)
    return PrunableModel(model=model, family=family, anatomy=family.read(model))


def read_as(model: nn.Module, anatomy: Anatomy) -> PrunableModel:
    """Pair ``model`` with the ``anatomy`` that was read in it before, for example in the same model without masks."""
    return PrunableModel(model=model, family=family_called(anatomy.structure.family), anatomy=anatomy)
