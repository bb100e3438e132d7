"""Apply a plan: tensors get smaller, and an ordinary module is left."""

from __future__ import annotations

from torch import nn

from slimming.errors import PlanError
from slimming.family import Family, fill_
from slimming.groups import Anatomy, resolve_plan
from slimming.plan import Plan


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


def complete(anatomy: Anatomy, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Check ``plan`` against the model and give the kept units of every group.

    Raises:
        PlanError: the plan was made for another model, or leaves a group without a unit.
    """
    kept = resolve_plan(anatomy, plan)
    gone = {group.site for group in anatomy.groups if group.role == "branch" and plan.kept.get(group.name) == ()}
    # What the plan itself leaves empty comes first: other groups go only because of it.
    for group in sorted(anatomy.groups, key=lambda group: len(plan.kept.get(group.name, range(group.size))) > 0):
        if group.role != "qkv" and group.site not in gone and len(kept[group.name]) < group.limits.minimum:
            raise PlanError(
                f"The plan leaves {len(kept[group.name])} units in {group.name!r}; "
                f"at least {group.limits.minimum} must stay."
            )
    _check_heads(anatomy, kept)
    return kept


def _check_heads(anatomy: Anatomy, kept: dict[str, tuple[int, ...]]) -> None:
    """A head needs QK as long as it has V."""
    for v in (group for group in anatomy.groups if group.role == "v"):
        qk = next((g for g in anatomy.groups if g.site == v.site and g.role == "qk"), None)
        if qk is None:
            continue
        heads_with_qk = {qk.part_of_unit[unit] for unit in kept[qk.name]}
        for head in sorted({v.part_of_unit[unit] for unit in kept[v.name]} - heads_with_qk):
            raise PlanError(
                f"The plan leaves head {head} of {v.site} with V but without QK; keep at least one QK dimension of it."
            )
