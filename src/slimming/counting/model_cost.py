"""Cost of a model under a plan by formula: parameters, multiply-adds and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from slimming.core.formulas import evaluate
from slimming.core.groups import Anatomy


@dataclass(frozen=True, kw_only=True)
class GroupCost:
    """The cost of all units of one group together.

    Attributes:
        params: parameters that are removed with all its units.
        macs: multiply-adds that are removed with them, with all other groups whole.
    """

    params: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a model for one image.

    Attributes:
        params: elements of all parameters.
        macs: multiply-adds of matrix products and convolutions, including attention; one multiply-add counts as one.
            Element-wise operations (norms, activations, softmax) are not counted.
        memory_bytes: bytes of the parameters plus the peak of the activations, at batch size 1 in eager inference with
            fused attention; the input image and the framework itself are not counted.
        groups: cost of each group.
    """

    params: int
    macs: int
    memory_bytes: int
    groups: Mapping[str, GroupCost] = field(default_factory=dict)


def total(anatomy: Anatomy, kept: Mapping[str, int], *, element_bytes: int = 4) -> Cost:
    """Return the cost when group ``name`` keeps ``kept[name]`` units.

    Args:
        anatomy: the model.
        kept: number of kept units, with an entry for every group.
        element_bytes: bytes of one parameter or activation.
    """
    params, macs, live = anatomy.formulas.evaluate(kept)
    return Cost(params=params, macs=macs, memory_bytes=(params + live) * element_bytes)


def per_group(anatomy: Anatomy, kept: Mapping[str, int]) -> dict[str, GroupCost]:
    """Return, for each group, the cost that is saved by removing all its kept units and nothing else."""
    return {group.name: together(anatomy, kept, [group.name]) for group in anatomy.groups}


def together(anatomy: Anatomy, kept: Mapping[str, int], names: Iterable[str]) -> GroupCost:
    """Return the cost that is saved by removing all kept units of the groups ``names`` and nothing else."""
    left = dict(kept)
    for name in names:
        left[name] = 0
        for other in linked(anatomy, name):
            left[other] = 0
    changed = [o for o in anatomy.operations if _differs(o.params, left, kept) or _differs(o.macs, left, kept)]
    return GroupCost(
        params=sum(evaluate(o.params, kept) - evaluate(o.params, left) for o in changed),
        macs=sum(evaluate(o.macs, kept) - evaluate(o.macs, left) for o in changed),
    )


def linked(anatomy: Anatomy, name: str) -> tuple[str, ...]:
    """Return the groups with the same slices as group ``name``: QK and V of a coupled group or of heads."""
    group = anatomy.group(name)
    if group.role not in ("qkv", "head"):
        return ()
    return tuple(g.name for g in anatomy.groups if g.site == group.site and g.role in ("qk", "v"))


def _differs(products: tuple[tuple, ...], left: Mapping[str, int], kept: Mapping[str, int]) -> bool:
    """Whether the products have a group whose number of units differs between ``left`` and ``kept``."""
    return any(left[name] != kept[name] for product in products for dim in product for name, _ in dim.groups)
