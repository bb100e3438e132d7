"""Complete a plan: derive the kept units of all groups of the model from the groups named in the plan."""

from __future__ import annotations

from collections import Counter

from slimming.core.groups import Anatomy, Group, resolve
from slimming.core.pruning_plan import Plan
from slimming.errors import PlanError


def complete(anatomy: Anatomy, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Check ``plan`` against the model and return the kept units of every group.

    Raises:
        PlanError: the plan was made for another model, or removes more units of a group than its limits allow.
    """
    kept = resolve_plan(anatomy, plan)
    removed = {group.name for group in anatomy.groups if group.role == "branch" and plan.kept.get(group.name) == ()}
    # Groups that the plan itself empties are reported first: they can be the reason why other groups are empty.
    for group in sorted(anatomy.groups, key=lambda group: len(plan.kept.get(group.name, range(group.size))) > 0):
        in_removed = not removed.isdisjoint(anatomy.around[group.name])
        if group.role != "qkv" and not in_removed and len(kept[group.name]) < group.limits.minimum:
            raise PlanError(
                f"The plan leaves {len(kept[group.name])} units in {group.name!r}; "
                f"at least {group.limits.minimum} must stay."
            )
    _check_heads(anatomy, kept)
    _check_sizes(anatomy, kept)
    return kept


def _check_heads(anatomy: Anatomy, kept: dict[str, tuple[int, ...]]) -> None:
    """Raise PlanError if a head keeps V dimensions but no QK dimension."""
    for v in (group for group in anatomy.groups if group.role == "v"):
        qk = next((g for g in anatomy.groups if g.site == v.site and g.role == "qk"), None)
        if qk is None:
            continue
        heads_with_qk = {qk.part_of_unit[unit] for unit in kept[qk.name]}
        for head in sorted({v.part_of_unit[unit] for unit in kept[v.name]} - heads_with_qk):
            raise PlanError(
                f"The plan leaves head {head} of {v.site} with V but without QK; keep at least one QK dimension of it."
            )


def _check_sizes(anatomy: Anatomy, kept: dict[str, tuple[int, ...]]) -> None:
    """Raise PlanError if heads keep other numbers of dimensions than the model's attention module can hold."""
    for group in anatomy.groups:
        if not group.limits.equal or group.role == "qkv":
            continue
        sizes = _sizes_of_heads(group, kept)
        if len(set(sizes) - {0}) > 1:
            raise PlanError(
                f"The plan leaves {', '.join(map(str, sizes))} units in the heads of {group.name!r}, but the attention "
                "of this model has one head size: keep equally many in every head that stays."
            )
        if group.limits.alike and len(set(_places_in_heads(group, kept)) - {()}) > 1:
            raise PlanError(
                f"The plan leaves different units in the heads of {group.name!r}, but they share a table, such as that "
                "of rotary positions, or are put together unit by unit: keep the same units in every head that stays."
            )
        other = None if group.limits.same_as is None else anatomy.group(group.limits.same_as)
        if other is not None and set(_sizes_of_heads(other, kept)) != set(sizes):
            raise PlanError(
                f"The plan leaves {max(sizes)} units in the heads of {group.name!r} and "
                f"{max(_sizes_of_heads(other, kept))} in those of {other.name!r}, but the attention of this model has "
                "one size for QK and V: keep equally many of both."
            )


def _sizes_of_heads(group: Group, kept: dict[str, tuple[int, ...]]) -> list[int]:
    counts = Counter(group.part_of_unit[unit] for unit in kept[group.name])
    return [counts[head] for head in range(len(group.limits.parts))]


def _places_in_heads(group: Group, kept: dict[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """For each head, which of its units are kept."""
    starts = [sum(group.limits.parts[:head]) for head in range(len(group.limits.parts))]
    ranges = [range(start, start + size) for start, size in zip(starts, group.limits.parts, strict=True)]
    left = set(kept[group.name])
    return [tuple(place for place, unit in enumerate(units) if unit in left) for units in ranges]


def resolve_plan(anatomy: Anatomy, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Check that ``plan`` fits the sizes of the model and complete it, see `resolve`.

    Raises:
        PlanError: the plan was made for another model.
    """
    sizes = {group.name: group.size for group in anatomy.groups}
    for name, size in plan.sizes.items():
        if name in sizes and sizes[name] != size:
            raise PlanError(
                f"The plan was made for another model: its group {name!r} has {size} units, here it has {sizes[name]}."
            )
    return resolve(anatomy, plan.kept)
