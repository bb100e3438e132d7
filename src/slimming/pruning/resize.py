"""Apply a plan to a model in place: its tensors get smaller, and an ordinary module is left."""

from __future__ import annotations

from torch import nn

from slimming.core.completion import complete
from slimming.core.groups import Anatomy
from slimming.core.pruning_plan import Plan
from slimming.models.family import Family, fill_


def cut_(model: nn.Module, family: Family, anatomy: Anatomy, plan: Plan) -> None:
    """Cut ``model``, which has no masks, in place.

    Args:
        model: the model that ``anatomy`` describes.
        family: the family that read it.
        anatomy: what it read.
        plan: which units stay.

    Raises:
        PlanError: the plan was made for another model, or leaves a group without a unit.
    """
    kept = complete(anatomy, plan)
    structure = family.structure(anatomy, kept)
    if structure == anatomy.structure:
        return
    state = family.select(anatomy, kept, model.state_dict())
    family.resize_(model, structure)
    fill_(model, state)
