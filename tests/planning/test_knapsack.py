"""The exact solver, against trying every choice; and plans made with it."""

from __future__ import annotations

import copy
import ctypes
import os
import subprocess
import sys
from functools import partial
from itertools import product

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import slimming
from slimming.core.budget import Budget
from slimming.core.layout import Layout
from slimming.errors import BudgetError, ConfigError
from slimming.masks.attachment import prunable
from slimming.planning.budgeting import costs_of
from slimming.planning.candidates import all_candidates
from slimming.planning.knapsack import GAP, knapsack, silenced
from slimming.planning.planner import Planner
from slimming.planning.scores import HasScores, ScoredModel

number = st.integers(0, 20)
items = st.lists(st.tuples(number, number, number), min_size=1, max_size=9)


@settings(max_examples=40, deadline=None)
@given(items, st.tuples(st.integers(0, 60), st.integers(0, 60)), st.booleans())
def test_no_choice_is_better(rows: list[tuple[int, int, int]], room: tuple[int, int], chained: bool) -> None:
    values, first, second = zip(*rows, strict=True)
    before = [(place, place + 1) for place in range(0, len(rows) - 1, 2)] if chained else []
    found = knapsack(values, {"a": first, "b": second}, {"a": room[0], "b": room[1]}, before)
    assert found is not None

    def fits(kept: tuple[bool, ...]) -> bool:
        sums = [sum(price for price, one in zip(prices, kept, strict=True) if one) for prices in (first, second)]
        return sums[0] <= room[0] and sums[1] <= room[1] and all(kept[b] for a, b in before if kept[a])

    assert fits(found.kept)
    best = max(
        sum(value for value, one in zip(values, kept, strict=True) if one)
        for kept in product((False, True), repeat=len(rows))
        if fits(kept)
    )
    assert found.value >= best * (1 - GAP) - 1e-9
    assert found.bound >= best - 1e-6


def test_nothing_fits() -> None:
    assert knapsack([1.0], {"a": [1.0]}, {"a": -1.0}, []) is None


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", img_size=64, depth=4)


class Scored(HasScores):
    def __init__(self, model: nn.Module, layout: Layout | None = None) -> None:
        dice = torch.Generator().manual_seed(0)
        anatomy = prunable(model).anatomy
        groups = [g for g in anatomy.groups if g.role in ("qk", "v", "mlp", "token")]
        self.scores = {g.name: torch.rand(g.size, generator=dice) for g in groups}
        self.found = ScoredModel(anatomy=anatomy, scores=self.scores, layout=layout or Layout())

    @property
    def scored(self) -> ScoredModel:
        return self.found

    def share(self, plan: slimming.Plan) -> float:
        kept = sum(float(self.scores[name][list(units)].sum()) for name, units in plan.kept.items())
        return kept / sum(float(score.sum()) for score in self.scores.values())


LIMITS = [
    Budget(macs=0.5),
    Budget(params=0.5),
    Budget(macs=0.5, params=0.6),
    Budget(macs=0.3, params=0.4),
    Budget(macs=1.5e8, params=4e6),
    Budget(macs=0.6, memory_bytes=0.9),
]


@pytest.mark.parametrize("budget", LIMITS, ids=lambda budget: budget.name)
def test_exact_plans_hold_and_keep_at_least_what_nested_ones_keep(model: nn.Module, budget: Budget) -> None:
    scored = Scored(model)
    nested, exact = (slimming.plan(scored, budget, solver=name) for name in ("nested", "exact"))
    whole, found = slimming.cost(model), slimming.cost(model, exact)
    for metric, limit in budget.limits.items():
        assert getattr(found, metric) <= (limit * getattr(whole, metric) if limit <= 1 else limit)
    assert exact.solution["solver"] == "exact"
    assert 0 <= exact.solution["gap"] < 0.01
    assert exact.solution["kept_score"] > 0
    assert scored.share(exact) >= scored.share(nested) - 1e-3
    if len(budget.limits) == 1:
        (metric, limit), *_ = budget.limits.items()
        short = getattr(slimming.cost(model, nested), metric) < 0.99 * limit * getattr(whole, metric)
        assert slimming.plan(scored, budget).solution["solver"] == ("exact" if short else "nested")


def test_several_limits_are_both_nearly_met(model: nn.Module) -> None:
    whole = slimming.cost(model)
    plan = slimming.plan(Scored(model), Budget(macs=0.5, params=0.6))
    assert plan.solution["solver"] == "exact", "the default for several limits"
    found = slimming.cost(model, plan)
    assert 0.495 <= found.macs / whole.macs <= 0.5
    assert 0.594 <= found.params / whole.params <= 0.6


def test_a_large_last_step_does_not_leave_a_limit_far_above(model: nn.Module) -> None:
    """Whole attentions and MLPs are a twentieth of the model each: one order ends below, the default fills up."""
    anatomy, whole = prunable(model).anatomy, slimming.cost(model)
    dice = torch.Generator().manual_seed(0)
    groups = [g for g in anatomy.groups if g.role in ("qk", "v", "mlp", "branch")]
    scores = {g.name: torch.rand(g.size, generator=dice) * (500 if g.role == "branch" else 1) for g in groups}
    planner = Planner(anatomy, scores, Layout(), partial(costs_of, anatomy))
    short = 0
    for percent in range(35, 100, 10):
        budget = Budget(macs=percent / 100)
        nested, default = (planner.plan(budget, fold=True, solver=name) for name in ("nested", None))
        shares = [slimming.cost(model, made).macs / whole.macs / budget.limits["macs"] for made in (nested, default)]
        assert 0.99 <= shares[1] <= 1
        assert default.solution["kept_score"] >= nested.solution["kept_score"]
        assert default.solution["solver"] == ("exact" if shares[0] < 0.99 else "nested")
        short += shares[0] < 0.99
    assert short


def test_whole_branches_alone(model: nn.Module) -> None:
    """Nothing is left for the solver where every candidate is a whole branch: the order's plan is the answer."""
    image = torch.randn(1, *prunable(model).anatomy.input_shape)
    scored = slimming.score(model, [image], kinds=["block"], how="contribution")
    plan = slimming.plan(scored, Budget(macs=0.88))
    assert slimming.cost(model, plan).macs <= 0.88 * slimming.cost(model).macs
    assert plan.solution["solver"] == "nested"


def test_channels_in_times_channels_out(model: nn.Module) -> None:
    net = timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    anatomy = prunable(net).anatomy
    scores = {g.name: torch.rand(g.size, generator=torch.Generator().manual_seed(1)) for g in anatomy.groups}
    measure = partial(costs_of, anatomy)
    plan = Planner(anatomy, scores, Layout(), measure).plan(Budget(macs=0.5, params=0.5), fold=True, solver="exact")
    whole, found = slimming.cost(net), slimming.cost(net, plan)
    assert found.macs <= 0.5 * whole.macs
    assert found.params <= 0.5 * whole.params


def test_channels_count_the_more_the_fewer_are_left() -> None:
    net = timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    anatomy = prunable(net).anatomy
    groups = [group for group in anatomy.groups if group.kind == "channel"]
    scores = {g.name: torch.rand(g.size, generator=torch.Generator().manual_seed(1)) for g in groups}
    scores[groups[-1].name] *= 1e-2  # the weakest

    for solver in ("nested", "exact"):
        left = []
        for scarcity in (0.0, 2.0):
            planner = Planner(anatomy, scores, Layout(scarcity=scarcity), partial(costs_of, anatomy))
            kept = planner.plan(Budget(macs=0.5), fold=True, solver=solver).kept
            left.append(len(kept[groups[-1].name]))
        assert left[0] < left[1] < groups[-1].size, solver


def test_scarcity_divides_scores_by_the_share_that_is_left() -> None:
    net = timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    group = next(group for group in prunable(net).anatomy.groups if group.kind == "channel")
    scores = {group.name: torch.arange(1.0, group.size + 1).flip(0)}
    candidates = all_candidates([group], scores, Layout(multiple=1, scarcity=2.0))
    expected = [(gone + 1) / (1 - gone / group.size) ** 2 for gone in range(group.size - 1)]
    assert [candidate.value for candidate in candidates] == pytest.approx(expected)
    assert [candidate.units for candidate in candidates] == [
        ((group.name, group.size - 1 - gone),) for gone in range(len(candidates))
    ]
    with pytest.raises(ConfigError, match=r"layout\.scarcity=-1: give a power of 0"):
        Layout(scarcity=-1)


@pytest.mark.skipif(sys.platform == "win32", reason="asks the C library by name")
def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with silenced():
        ctypes.CDLL(None).puts(b"HighsMipSolverData")
        os.write(1, b"more")
    print("and then")
    assert capfd.readouterr().out == "and then\n"


def test_a_process_that_solves_prints_nothing() -> None:
    """With SciPy 1.17.1 the solver prints on the first of these."""
    code = """
import numpy
from slimming.planning.knapsack import knapsack
for seed in (0, 17, 19):
    dice = numpy.random.default_rng(seed)
    values, prices = dice.random(300) ** 3, dice.random((3, 300))
    room = dict(zip("abc", prices.sum(1) * dice.uniform(0.1, 0.6, 3)))
    assert knapsack(values, dict(zip("abc", prices)), room, [])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_what_cannot_be_planned_is_named(model: nn.Module) -> None:
    scored = Scored(model)
    with pytest.raises(ConfigError, match="There is no solver 'exakt'"):
        slimming.plan(scored, Budget(macs=0.5), solver="exakt")
    with pytest.raises(BudgetError, match=r"Budget macs 1,000 cannot be reached.*macs 0\.\d+ \([\d,]+\) of the dense"):
        slimming.plan(scored, Budget(macs=1000))
    with pytest.raises(BudgetError, match="no formula for the memory of heads of several sizes"):
        slimming.plan(scored, Budget(memory_bytes=0.5), layout=Layout(equal_heads=False))
    net = timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    with pytest.raises(BudgetError, match="was read by tracing"):
        slimming.plan(slimming.attach(net), Budget(memory_bytes=0.5), score="mask")
    for wrong in (1.5, 999, -1, float("nan"), True):
        with pytest.raises(BudgetError, match="or an absolute number of 1000 or more"):
            Budget(macs=wrong)


@pytest.mark.parametrize("budget", [Budget(macs=0.5), Budget(params=0.4), Budget(macs=0.5, params=0.5)], ids=str)
def test_width_and_whole_branches_are_planned_with_the_rest(model: nn.Module, budget: Budget) -> None:
    joint = copy.deepcopy(model)
    masks = slimming.attach(joint, [group for group in slimming.describe(joint) if group.kind != "head"])
    with torch.no_grad():
        for name, mask in masks.items():
            # A feature of the width, or a whole branch, is worth about what its units are.
            scale = 30 if name == "embedding" else 100 if name.endswith("branch") else 1
            mask.copy_(scale * torch.rand(mask.shape, generator=torch.Generator().manual_seed(len(name))))
    whole = slimming.cost(model)
    for solver in ("nested", "exact"):
        plan = slimming.plan(masks, budget, score="mask", solver=solver)
        small = slimming.cut(joint, plan)
        found, formula = slimming.cost(small), slimming.cost(model, plan)
        assert (found.macs, found.params) == (formula.macs, formula.params)
        for metric, share in budget.limits.items():
            assert getattr(found, metric) <= share * getattr(whole, metric)
        if solver == "exact":
            assert plan.solution["solver"] == "exact"
            assert max(getattr(found, m) / getattr(whole, m) / share for m, share in budget.limits.items()) > 0.98
        assert len(plan.kept["embedding"]) % 8 == 0
