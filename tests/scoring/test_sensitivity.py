"""What cutting one kind alone does, and how plans weigh kinds by it."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import slimming
from slimming import demo
from slimming.core.budget import Budget
from slimming.core.layout import Layout
from slimming.errors import ConfigError, NonFiniteLossError
from slimming.masks.soft_masks import SoftMasks, attached
from slimming.planning.budgeting import costs_of
from slimming.planning.candidates import all_candidates, removal_order_of_kind
from slimming.planning.planner import Planner
from slimming.planning.sensitivity import SPREADS, Sensitivity, with_measured_loss
from slimming.scoring.sensitivity import BROKEN, JOINT, SHARES, sensitivity

KINDS = ("head_dim", "mlp", "token")


@pytest.fixture(scope="module")
def masks() -> SoftMasks:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=64, depth=3, num_heads=2)
    found = slimming.attach(model.eval(), [g for g in slimming.describe(model) if g.kind in KINDS])
    for mask in found.values():
        torch.nn.init.uniform_(mask)
    return found


def weighted(**per_kind: float) -> Any:
    """A loss that grows by so much for a whole kind."""

    def loss(model: nn.Module) -> float:
        own = attached(model)
        assert own is not None
        gone = {kind: sum(int((own[g.name] == 0).sum()) for g in own.of_kind(kind)) for kind in KINDS}
        total = {kind: sum(g.size for g in own.of_kind(kind)) for kind in KINDS}
        return 5.0 + sum(weight * gone[kind] / total[kind] for kind, weight in per_kind.items())

    return loss


def test_each_kind_is_cut_alone_and_the_model_stays(masks: SoftMasks) -> None:
    before = {name: mask.detach().clone() for name, mask in masks.items()}
    found = sensitivity(masks, masks.scores("mask"), Layout(), weighted(head_dim=1.0, mlp=0.5, token=2.0))
    assert all(torch.equal(mask, before[name]) for name, mask in masks.items())
    for kind, weight in {"head_dim": 1.0, "mlp": 0.5, "token": 2.0}.items():
        kept = [share for share, _ in found.curves[kind]]
        assert kept == sorted(set(kept), reverse=True)
        assert len(kept) >= 3
        assert kept[0] <= SHARES[0]
        for share, loss in found.curves[kind]:
            assert loss == pytest.approx(weight * (1 - share), abs=1e-6)
    assert found.joint.keys() == set(SPREADS)
    for curve in found.joint.values():
        assert [share for share, _ in curve] == list(JOINT)
        assert all(0 < loss < 3.5 for _, loss in curve)


@given(losses=st.lists(st.floats(0, 3), min_size=4, max_size=4), spread=st.sampled_from(("rank", "score")))
@settings(max_examples=20)
def test_the_order_within_a_kind_stays(masks: SoftMasks, losses: list[float], spread: str) -> None:
    curve = tuple(zip((0.8, 0.5, 0.3, 0.1), sorted(losses), strict=True))
    groups = list(masks.groups)
    candidates = all_candidates(groups, masks.scores("mask"), Layout())
    sizes = np.array([float(len(candidate.units)) for candidate in candidates])
    for kind in KINDS:
        new = with_measured_loss(candidates, groups, Sensitivity(curves={kind: curve}, spread=spread), sizes)
        places = removal_order_of_kind(candidates, groups, kind)
        scores = [new[place].score for place in places]
        assert scores == sorted(scores)
        assert all(score > 0 for score in scores)
        assert removal_order_of_kind(new, groups, kind) == places
        others = [place for place in range(len(candidates)) if place not in set(places)]
        assert all(new[place] == candidates[place] for place in others)


@pytest.mark.parametrize("spread", ["rank", "score"], ids=str)
def test_candidates_have_the_value_that_was_measured(masks: SoftMasks, spread: str) -> None:
    groups = list(masks.groups)
    candidates = all_candidates(groups, masks.scores("mask"), Layout(multiple=1))
    curve = tuple((1 - gone, gone**3) for gone in (0.1, 0.3, 0.5, 0.7, 0.9))
    sizes = np.array([float(len(candidate.units)) for candidate in candidates])
    new = with_measured_loss(candidates, groups, Sensitivity(curves={"mlp": curve}, spread=spread), sizes)
    total = sum(group.size for group in groups if group.kind == "mlp")
    for kept, loss in curve[1:-1]:
        gone = [new[place] for place in removal_order_of_kind(new, groups, "mlp")][: round((1 - kept) * total)]
        # Between measurements the slope grows steadily, so that the sum is near, and not exactly, what was measured.
        assert sum(candidate.value for candidate in gone) == pytest.approx(loss, rel=0.25)


def test_limits_take_the_kind_that_costs_least_and_keep_ratios_do_not_care(masks: SoftMasks) -> None:
    scores, measure = masks.scores("mask"), partial(costs_of, masks.anatomy)

    def kept(budget: Budget, **per_kind: float) -> dict[str, float]:
        measured = sensitivity(masks, scores, Layout(), weighted(**per_kind)) if per_kind else None
        plan = Planner(masks.anatomy, scores, Layout(), measure, measured).plan(budget, fold=True)
        left, all_of = Counter(), Counter()
        for name, units in plan.kept.items():
            kind = masks.anatomy.group(name).kind
            left[kind] += len(units)
            all_of[kind] += plan.sizes[name]
        return {kind: left[kind] / all_of[kind] for kind in KINDS}

    for cheap in KINDS:
        dear = dict.fromkeys(set(KINDS) - {cheap}, 5.0)
        found = kept(Budget(macs=0.8), **{cheap: 0.01}, **dear)
        assert min(found, key=lambda kind: found[kind]) == cheap
        assert all(found[kind] == 1.0 for kind in dear)
    ratios = Budget(keep=dict.fromkeys(KINDS, 0.5))
    assert kept(ratios) == kept(ratios, head_dim=3.0, mlp=0.1, token=1.0)


def test_a_search_measures_it_once_there_are_several_kinds(tmp_path: Any) -> None:
    data = slimming.open_data(
        slimming.DataConfig(source=demo.settings()["data"]["source"], train_limit=16, val_limit=8),
        timm.create_model("test_vit", img_size=32, num_classes=10),
    )
    base = slimming.SearchConfig(train=slimming.TrainConfig(steps=2, batch_size=4), sensitivity=6)
    for kinds, measured in ((None, set(KINDS)), (("mlp",), set())):
        model = timm.create_model("test_vit", img_size=32, num_classes=10)
        result = slimming.search(model, data, dataclasses.replace(base, kinds=kinds))
        curves = result.sensitivity.curves if result.sensitivity else {}
        assert set(curves) == measured
        # A divergence from what the whole model says is never below 0, and not 0 where everything went.
        assert all(loss >= -1e-6 for curve in curves.values() for _, loss in curve)
        assert all(curve[-1][1] > 0 for curve in curves.values())
        result.save(tmp_path / str(len(measured)))
        assert slimming.load_search(tmp_path / str(len(measured))).sensitivity == result.sensitivity
    with pytest.raises(ConfigError, match="at least 0"):
        slimming.SearchConfig(sensitivity=-1)


def test_the_spread_that_loses_least_together_is_taken(masks: SoftMasks) -> None:
    scores = masks.scores("mask")
    first = next(group for group in masks.of_kind("mlp"))
    scores = {name: score * (1.0 if name == first.name else 0.999) for name, score in scores.items()}

    def loss(worth: float) -> Any:
        def of(model: nn.Module) -> float:
            own = attached(model)
            assert own is not None
            gone = {g.name: float((own[g.name] == 0).float().mean()) for g in own.groups}
            return worth * gone[first.name] + 0.01 * sum(gone.values())

        return of

    found = sensitivity(masks, scores, Layout(), loss(1.0))
    best = min(SPREADS, key=lambda spread: sum(np.log(max(loss, 0.0) + 1e-3) for _, loss in found.joint[spread]))
    assert found.spread == best
    # A plan for one of the measured shares loses what was measured for it.
    planner = Planner(masks.anatomy, scores, Layout(), partial(costs_of, masks.anatomy), found)
    plan = planner.plan(Budget(macs=JOINT[1]), fold=True)
    trial = copy.deepcopy(masks.model)
    own = attached(trial)
    assert own is not None
    own.apply_(plan)
    assert loss(1.0)(trial) == pytest.approx(found.joint[found.spread][1][1], abs=1e-6)


def test_a_loss_that_is_no_number_counts_as_broken(masks: SoftMasks) -> None:
    whole = {name: float(mask.detach().sum()) for name, mask in masks.items()}

    def loss(model: nn.Module) -> float:
        own = attached(model)
        assert own is not None
        same = all(float(mask.detach().sum()) == whole[name] for name, mask in own.items())
        return 1.0 if same else float("nan")

    found = sensitivity(masks, masks.scores("mask"), Layout(), loss)
    assert {loss for curve in found.curves.values() for _, loss in curve} == {BROKEN}
    with pytest.raises(NonFiniteLossError, match="is nan"):
        sensitivity(masks, masks.scores("mask"), Layout(), lambda model: float("nan"))


def test_a_kind_that_cannot_lose_a_unit_is_passed_over() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=64, depth=2, num_heads=1)
    masks = slimming.attach(model.eval(), [g for g in slimming.describe(model) if g.kind in ("head", "mlp")])
    found = sensitivity(masks, masks.scores("mask"), Layout(), lambda model: 1.0)
    assert found.curves["head"] == ()
    assert len(found.curves["mlp"]) > 3
    assert slimming.plan(masks, Budget(keep={"head": 1.0}), score="mask").kept
