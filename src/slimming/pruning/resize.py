"""Apply a plan to a model in place: its tensors get smaller, and an ordinary module is left."""

from __future__ import annotations

from slimming.core.completion import complete
from slimming.core.pruning_plan import Plan
from slimming.models.family import assign_state_
from slimming.models.prunable import PrunableModel


def cut_(prunable: PrunableModel, plan: Plan) -> None:
    """Cut the model, which has no masks, in place; what was read in it no longer holds afterwards.

    Args:
        prunable: the model.
        plan: which units stay.

    Raises:
        PlanError: the plan was made for another model, or leaves a group without a unit.
    """
    model, family, anatomy = prunable.model, prunable.family, prunable.anatomy
    kept = complete(anatomy, plan)
    structure = family.structure(anatomy, kept)
    if structure == anatomy.structure:
        return
    state = family.select(anatomy, kept, model.state_dict())
    family.resize_(model, structure)
    assign_state_(model, state)
