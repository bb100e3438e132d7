"""What a model costs under a plan, by formula: parameters, multiply-adds, memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from slimming.core.formulas import evaluate
from slimming.core.groups import Anatomy


@dataclass(frozen=True, kw_only=True)
class GroupCost:
    """What all units of one group cost together.

    Attributes:
        params: parameters that go when all its units go.
        macs: multiply-adds that go with them, everything else staying whole.
    """

    params: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs for one image.

    Attributes:
        params: elements of all parameters.
        macs: multiply-adds of the matrix products and convolutions, attention included; a multiply-add is one.
            Element-wise work (norms, activations, softmax) is not counted.
        memory_bytes: parameters plus the largest sum of activations alive at once, at batch 1 in eager
            inference with fused attention; the input image and the framework itself are not counted.
        groups: what each group accounts for.
    """

    params: int
    macs: int
    memory_bytes: int
    groups: Mapping[str, GroupCost] = field(default_factory=dict)


def total(anatomy: Anatomy, kept: Mapping[str, int], *, element_bytes: int = 4) -> Cost:
    """The cost when group ``name`` keeps ``kept[name]`` units (complete: one entry per group).

    Args:
        anatomy: the model.
        kept: number of kept units per group.
        element_bytes: bytes of one parameter or activation.
    """
    params, macs, live = anatomy.formulas.evaluate(kept)
    return Cost(params=params, macs=macs, memory_bytes=(params + live) * element_bytes)


def per_group(anatomy: Anatomy, kept: Mapping[str, int]) -> dict[str, GroupCost]:
    """What each group accounts for: the cost that goes when all its kept units go and the rest stays."""
    return {group.name: together(anatomy, kept, [group.name]) for group in anatomy.groups}


def together(anatomy: Anatomy, kept: Mapping[str, int], names: Iterable[str]) -> GroupCost:
    """The cost that goes when all kept units of the groups ``names`` go at once and the rest stays."""
    gone = dict(kept)
    for name in names:
        gone[name] = 0
        for other in linked(anatomy, name):
            gone[other] = 0
    touched = [o for o in anatomy.operations if _mentions(o.params, gone, kept) or _mentions(o.macs, gone, kept)]
    return GroupCost(
        params=sum(evaluate(o.params, kept) - evaluate(o.params, gone) for o in touched),
        macs=sum(evaluate(o.macs, kept) - evaluate(o.macs, gone) for o in touched),
    )


def linked(anatomy: Anatomy, name: str) -> tuple[str, ...]:
    """Groups whose units are the same slices as those of ``name``: QK and V of a coupled group or of heads."""
    group = anatomy.group(name)
    if group.role not in ("qkv", "head"):
        return ()
    return tuple(g.name for g in anatomy.groups if g.site == group.site and g.role in ("qk", "v"))


def _mentions(products: tuple[tuple, ...], gone: Mapping[str, int], kept: Mapping[str, int]) -> bool:
    return any(gone[name] != kept[name] for product in products for dim in product for name, _ in dim.groups)
