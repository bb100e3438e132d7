"""Groups as plain data: what goes because other units do, and what is no plan of a model."""

from __future__ import annotations

from functools import cache

import pytest
import timm

from slimming.core.completion import complete, resolve_plan
from slimming.core.formulas import Dim
from slimming.core.groups import Anatomy, Group, Limits, keep_all, resolve
from slimming.core.pruning_plan import Plan
from slimming.errors import PlanError
from slimming.masks.attachment import prunable
from variants import SMALL


@cache
def anatomy() -> Anatomy:
    return prunable(timm.create_model("vit_tiny_patch16_224", **SMALL)).anatomy


def plan(kept: dict[str, tuple[int, ...]]) -> Plan:
    return Plan(kept=kept, sizes={name: anatomy().group(name).size for name in kept})


def test_groups_are_shown_short() -> None:
    group = Group(name="a", kind="mlp", size=4, site="b", role="mlp")
    assert repr(group) == "Group('a', kind='mlp', size=4, minimum=1)"
    parts = Group(name="a", kind="head_dim", size=4, site="b", role="v", limits=Limits(minimum=0, parts=(1, 3)))
    assert repr(parts) == "Group('a', kind='head_dim', size=4, minimum=0, parts=(1, 3))"
    assert parts.part_of_unit == (0, 1, 1, 1)
    assert group.part_of_unit == (0, 0, 0, 0)


def test_a_group_is_found_by_name_and_a_near_one_is_told() -> None:
    assert anatomy().group("blocks.1.mlp.hidden").size == 192
    with pytest.raises(PlanError, match=r"no group 'blocks\.1\.mlp\.hiden'.*Did you mean 'blocks\.1\.mlp\.hidden'"):
        anatomy().group("blocks.1.mlp.hiden")


@pytest.mark.parametrize("units", [(-1, 0), (0, 192), (3, 3)], ids=["below", "above", "twice"])
def test_units_outside_their_group_are_no_plan(units: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match=r"repeated or outside 0\.\.191"):
        resolve(anatomy(), {"blocks.1.mlp.hidden": units})
    with pytest.raises(PlanError, match="made for another model"):
        resolve(anatomy(), {"blocks.7.mlp.hidden": (0,)})
    found = resolve(anatomy(), {"blocks.1.mlp.hidden": (0, 191)})
    assert found["blocks.1.mlp.hidden"] == (0, 191)
    whole = keep_all(anatomy().groups)
    assert {name for name, kept in found.items() if kept != whole[name]} == {"blocks.1.mlp.hidden"}


def test_a_head_goes_with_its_last_value_and_takes_its_queries_along() -> None:
    values = tuple(range(16, 48))  # the first of three heads of 16 goes
    found = resolve(anatomy(), {"blocks.0.attn.v": values})
    assert found["blocks.0.attn.heads"] == (1, 2)
    assert found["blocks.0.attn.qk"] == values
    assert resolve(anatomy(), {"blocks.0.attn.heads": (1, 2)})["blocks.0.attn.v"] == values
    one = resolve(anatomy(), {"blocks.0.attn.v": (15, *values)})
    assert one["blocks.0.attn.heads"] == (0, 1, 2)


def test_a_token_that_left_stays_away() -> None:
    found = resolve(anatomy(), {"blocks.0.tokens": (1, 2, 3), "blocks.1.tokens": (0, 2, 3)})
    assert found["blocks.0.tokens"] == (1, 2, 3)
    assert found["blocks.1.tokens"] == (2, 3)


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ({"blocks.0.mlp.hidden": ()}, r"leaves 0 units in 'blocks\.0\.mlp\.hidden'; at least 1 must stay"),
        ({"blocks.0.attn.qk": tuple(range(32))}, r"leaves head 2 of blocks\.0\.attn with V but without QK"),
        ({"blocks.0.tokens": (0,), "blocks.1.tokens": (1,)}, r"leaves 0 units in 'blocks\.1\.tokens'"),
    ],
    ids=["nothing", "no queries", "no token"],
)
def test_plans_that_leave_too_little_are_refused(kept: dict[str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        complete(anatomy(), plan(kept))


def test_a_whole_branch_may_leave_nothing() -> None:
    found = complete(anatomy(), plan({"blocks.0.mlp.branch": ()}))
    assert found["blocks.0.mlp.hidden"] == ()
    assert len(found["blocks.1.mlp.hidden"]) == 192


def test_a_plan_of_other_sizes_is_of_another_model() -> None:
    plan = Plan(kept={"blocks.0.mlp.hidden": (0,)}, sizes={"blocks.0.mlp.hidden": 191})
    with pytest.raises(PlanError, match=r"has 191 units, here it has 192"):
        resolve_plan(anatomy(), plan)


def test_dimensions_add_up() -> None:
    both = Dim(fixed=1, groups=(("a", 2),)) + Dim(fixed=3, groups=(("b", 4),))
    assert both == Dim(fixed=4, groups=(("a", 2), ("b", 4)))
    assert both.value({"a": 10, "b": 100}) == 424
