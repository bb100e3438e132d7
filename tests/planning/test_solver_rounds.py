"""Greedy and exact plans of groups that are plain data, under costs that are invented."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch

from planning.tiny import anatomy_of, mlp, sizes, tokens
from slimming.core.budget import Budget
from slimming.core.layout import FREE
from slimming.planning import planner as planner_module
from slimming.planning.knapsack import Solution, knapsack
from slimming.planning.planner import Planner

GROUPS = mlp("m", 6), mlp("n", 5), mlp("o", 4)


def product(kept: Mapping[str, int]) -> dict[str, float]:
    """Costs that are products of sizes, as of convolutions one after the other."""
    m, n, o = (kept[name] for name in "mno")
    return {"macs": m * n + n * o + o * o + 1.0, "params": m * o + 2.0 * n}


def planner(seed: int, scale: float = 1.0, unit: float = 1.0) -> Planner:
    dice = torch.Generator().manual_seed(seed)
    scores = {group.name: scale * torch.rand(group.size, generator=dice) for group in GROUPS}

    def measure(kept: Mapping[str, int]) -> dict[str, float]:
        return {name: unit * cost for name, cost in product(kept).items()}

    return Planner(anatomy_of(*GROUPS), scores, FREE, measure)


BUDGETS = Budget(macs=0.5), Budget(macs=0.3), Budget(macs=0.7), Budget(macs=0.45, params=0.5)


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.name)
def test_exact_plans_are_never_worse_than_nested_ones_and_within_the_limits(budget: Budget) -> None:
    dense = product(sizes(*GROUPS))
    better = 0
    for seed in range(40):
        nested, exact = (planner(seed).plan(budget, fold=True, solver=name) for name in ("nested", "exact"))
        assert exact.solution["kept_score"] >= nested.solution["kept_score"], seed
        better += exact.solution["kept_score"] > nested.solution["kept_score"]
        cost = product({name: len(units) for name, units in exact.kept.items()})
        assert all(cost[name] <= share * dense[name] for name, share in budget.limits.items())
    assert better


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.name)
def test_plans_do_not_depend_on_the_units_of_scores_and_costs(budget: Budget) -> None:
    for seed in range(25):
        for solver in ("nested", "exact"):
            plain = planner(seed).plan(budget, fold=True, solver=solver)
            for scale, unit in ((2.0**-12, 1.0), (2.0**12, 1.0), (1.0, 2.0**-12), (1.0, 2.0**12)):
                assert planner(seed, scale, unit).plan(budget, fold=True, solver=solver).kept == plain.kept, seed


def test_a_round_that_finds_less_does_not_replace_a_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    budget, better = Budget(macs=0.5), 0
    for seed in range(25):
        rounds: list[Solution] = []

        def stumbling(values: Any, *others: Any, rounds: list[Solution] = rounds) -> Solution | None:
            found = knapsack(values, *others)
            assert found is not None
            rounds.append(found)
            return found if len(rounds) == 1 else Solution(kept=(False,) * len(values), value=0.0, bound=found.bound)

        plain, nested = (planner(seed).plan(budget, fold=True, solver=name) for name in ("exact", "nested"))
        monkeypatch.setattr(planner_module, "knapsack", stumbling)
        made = planner(seed).plan(budget, fold=True, solver="exact")
        monkeypatch.undo()
        assert made.solution["kept_score"] >= nested.solution["kept_score"]
        if len(rounds) == 2:
            better += made.solution["kept_score"] == plain.solution["kept_score"] > nested.solution["kept_score"]
    assert better


def test_what_does_not_fit_the_order_is_left_out_and_the_rest_fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where branching fails, items are added by value per price."""
    solve = scipy.optimize.milp

    def relaxed_only(*arguments: Any, integrality: Any, **others: Any) -> Any:
        if integrality.any():
            return SimpleNamespace(x=None, message="no time")
        return solve(*arguments, integrality=integrality, **others)

    monkeypatch.setattr(scipy.optimize, "milp", relaxed_only)
    found = knapsack([10.0, 6.0, 1.0], {"a": [5.0, 4.0, 1.0]}, {"a": 6.0}, [])
    assert found is not None
    assert found.kept == (True, False, True)
    assert (found.value, found.bound) == (11.0, pytest.approx(11.5))


def test_items_are_filled_in_until_no_more_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first item may be kept with the third only, which comes later in the order; the fourth never fits."""

    def nothing(cost: Any, *, integrality: Any, **_: Any) -> Any:
        x = None if integrality.any() else np.zeros(len(cost))
        return SimpleNamespace(x=x, fun=-10.0, message="no time")

    monkeypatch.setattr(scipy.optimize, "milp", nothing)
    value, price = [4.0, 3.0, 1.0, 5.0], {"a": [2.0, 2.0, 2.0, 9.0]}
    for room, before, kept in ((6.5, [(0, 2)], (True, True, True, False)), (4.5, [], (True, True, False, False))):
        found = knapsack(value, price, {"a": room}, before)
        assert found is not None
        assert found.kept == kept


def test_there_is_no_branching_where_the_relaxation_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    solve = scipy.optimize.milp

    def watched(*arguments: Any, integrality: Any, **others: Any) -> Any:
        asked.append(bool(integrality.any()))
        return solve(*arguments, integrality=integrality, **others)

    monkeypatch.setattr(scipy.optimize, "milp", watched)
    found = knapsack([3.0, 2.0, 1.0], {"a": [1.0, 1.0, 1.0]}, {"a": 2.0}, [])
    assert found == Solution(kept=(True, True, False), value=5.0, bound=pytest.approx(5.0))
    assert asked == [False]
    knapsack([10.0, 6.0, 1.0], {"a": [5.0, 4.0, 1.0]}, {"a": 6.0}, [])
    assert asked == [False, False, True]


def test_times_are_averaged_over_a_quarter_of_the_group() -> None:
    """Times have steps: one unit less may cost nothing, or all of a step."""
    group = mlp("m", 16)

    def measure(kept: Mapping[str, int]) -> dict[str, float]:
        return {"latency": float(-(-kept["m"] // 4)) ** 2, "macs": float(kept["m"])}

    found = planner_module.independent_unit_cost(anatomy_of(group), "m", {"m": 16}, {"latency": 1.0}, measure)
    assert found == {"latency": (16 - 9) / 4}
    counted = planner_module.independent_unit_cost(anatomy_of(group), "m", {"m": 16}, {"macs": 1.0}, measure)
    assert counted == {"macs": 1.0}


def test_a_unit_of_a_group_that_keeps_one_is_priced_by_one_more() -> None:
    group = mlp("m", 4)

    def measure(kept: Mapping[str, int]) -> dict[str, float]:
        return {"macs": float(kept["m"]) ** 2}

    for count, price in ((1, 4 - 1), (2, 4 - 1), (4, 16 - 9)):
        found = planner_module.independent_unit_cost(anatomy_of(group), "m", {"m": count}, {"macs": 1.0}, measure)
        assert found == {"macs": float(price)}


def test_a_token_is_priced_where_deeper_blocks_have_lost_it_already() -> None:
    groups = tokens("t0", 0, 8), tokens("t1", 1, 8)

    def measure(kept: Mapping[str, int]) -> dict[str, float]:
        return {"macs": float(kept["t0"] * kept["t1"])}

    for counts, price in (({"t0": 5, "t1": 5}, 4), ({"t0": 5, "t1": 1}, 1)):
        found = planner_module.independent_unit_cost(anatomy_of(*groups), "t0", counts, {"macs": 1.0}, measure)
        assert found == {"macs": float(price)}
