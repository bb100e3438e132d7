"""Apply a plan to a model in place, without compensation."""

from __future__ import annotations

from slimming.core.completion import complete
from slimming.core.pruning_plan import Plan
from slimming.models.family import assign_state_
from slimming.models.prunable import PrunableModel


def cut_(prunable: PrunableModel, plan: Plan) -> None:
    """Cut a model in place. The anatomy in ``prunable`` is no longer valid afterwards.

    Args:
        prunable: a model without masks.
        plan: the units to keep.

    Raises:
        PlanError: the plan was made for another model, or removes more units of a group than its limits allow.
    """
    model, family, anatomy = prunable.model, prunable.family, prunable.anatomy
    kept = complete(anatomy, plan)
    structure = family.structure(anatomy, kept)
    if structure == anatomy.structure:
        return
    state = family.select(anatomy, kept, model.state_dict())
    family.resize_(model, structure)
    assign_state_(model, state)
