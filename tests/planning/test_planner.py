"""Properties of budgets, ranking and plans, for any scores; and the files that plans are kept in."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimming.core.budget import Budget
from slimming.core.completion import complete
from slimming.core.files import seal
from slimming.core.groups import Anatomy, Group
from slimming.core.kinds import KINDS
from slimming.core.layout import FREE, Layout
from slimming.core.pruning_plan import Plan
from slimming.errors import BudgetError, CheckpointError, ConfigError, OutputError, PlanError
from slimming.masks.attachment import prunable
from slimming.planning.budgeting import costs_of, plan
from slimming.planning.candidates import Candidate, chain_of, removal_order
from slimming.planning.planner import Planner
from slimming.planning.scores import HasScores, ScoredModel
from variants import SMALL, draw

KIND_SETS = (
    {"head_dim", "mlp", "token"},
    {"head_dim"},
    {"mlp"},
    {"head", "mlp"},
    {"head", "head_dim"},
    {"head_dim", "token"},
)
LAYOUTS = (
    FREE,
    Layout(),
    Layout(multiple=2),
    Layout(equal_heads=False, multiple=4),
    Layout(equal_heads=False, equal_qkv=False, multiple=4),
)


@cache
def anatomy() -> Anatomy:
    return prunable(timm.create_model("vit_tiny_patch16_224", num_classes=10, **{**SMALL, "depth": 3})).anatomy


def scored(kinds: set[str], seed: int, *, coupled: bool = False, ties: bool = False) -> dict[str, Tensor]:
    """Random scores for the groups of ``kinds``; with ties, of three values only."""
    dice = torch.Generator().manual_seed(seed)
    unwanted = {"qk", "v"} if coupled else {"qkv"}
    groups = [group for group in anatomy().groups if group.kind in kinds and group.role not in unwanted]
    scores = {group.name: torch.rand(group.size, generator=dice) for group in groups}
    return {name: (score * 3).floor() if ties else score for name, score in scores.items()}


def plan_for(scores: Mapping[str, Tensor], budget: Budget, layout: Layout, solver: str | None = None) -> Plan:
    return Planner(anatomy(), scores, layout, partial(costs_of, anatomy())).plan(budget, fold=True, solver=solver)


def cost_of(made: Plan) -> Mapping[str, int]:
    return costs_of(anatomy(), {name: len(units) for name, units in complete(anatomy(), made).items()})


DENSE = cost_of(Plan(kept={}, sizes={}))

cases = given(
    kinds=st.sampled_from(KIND_SETS),
    seed=st.integers(0, 10**6),
    layout=st.sampled_from(LAYOUTS),
    coupled=st.booleans(),
    ties=st.booleans(),
    metrics=st.sampled_from((("macs",), ("params",), ("macs", "params"))),
    share=st.floats(0.05, 1.0),
)


@settings(max_examples=60)
@cases
def test_a_budget_is_held_or_the_reachable_one_is_named(
    kinds: set[str], seed: int, layout: Layout, coupled: bool, ties: bool, metrics: tuple[str, ...], share: float
) -> None:
    scores = scored(kinds, seed, coupled=coupled, ties=ties)
    budget = Budget(**dict.fromkeys(metrics, share))
    try:
        made = plan_for(scores, budget, layout)
    except BudgetError as error:
        named = dict(re.findall(r"(macs|params) (\d\.\d+)", str(error).partition("smallest reachable")[2]))
        assert set(named) == set(metrics)
        assert any(float(named[metric]) > share for metric in metrics)
        reachable = {metric: max(float(named[metric]), share) for metric in metrics}
        made = plan_for(scores, Budget(**reachable), layout)
        budget = Budget(**reachable)
    cost = cost_of(made)
    for metric, limit in budget.limits.items():
        assert cost[metric] <= limit * DENSE[metric]
    _is_sound(made, layout, scores)


def _is_sound(made: Plan, layout: Layout, scores: Mapping[str, Tensor]) -> None:
    """At least one unit per group, heads whole or gone, sizes as the layout says."""
    kept = complete(anatomy(), made)
    groups = {group.name: group for group in anatomy().groups}
    assert set(made.kept) == set(scores)
    for name, units in made.kept.items():
        assert units == kept[name], "the plan is complete by itself"
        assert list(units) == sorted(set(units))
        assert len(units) >= 1
    for name in made.kept:
        group = groups[name]
        if group.kind == "head_dim" and layout.equal_heads:
            assert len({count for count in _per_head(group, kept[name]) if count}) == 1
        if group.kind == "mlp":
            assert len(kept[name]) % min(layout.multiple or 8, group.size) == 0
    for depth in range(3):
        site = f"blocks.{depth}.attn"
        qk, v = (_per_head(groups[f"{site}.{role}"], kept[f"{site}.{role}"]) for role in ("qk", "v"))
        if layout.equal_qkv and {f"{site}.qk", f"{site}.v"} <= made.kept.keys():
            assert qk == v
        assert [bool(count) for count in qk] == [bool(count) for count in v], "a head keeps QK without V"
        assert [head for head, count in enumerate(v) if count] == list(kept[f"{site}.heads"])
    for one, next_one in ((0, 1), (1, 2)):
        assert set(kept[f"blocks.{next_one}.tokens"]) <= set(kept[f"blocks.{one}.tokens"])


def _per_head(group: Group, kept: tuple[int, ...]) -> list[int]:
    counts = [0] * len(group.limits.parts)
    for unit in kept:
        counts[group.part_of_unit[unit]] += 1
    return counts


@settings(max_examples=40)
@cases
def test_larger_budgets_keep_all_of_smaller_ones(
    kinds: set[str], seed: int, layout: Layout, coupled: bool, ties: bool, metrics: tuple[str, ...], share: float
) -> None:
    scores = scored(kinds, seed, coupled=coupled, ties=ties)
    smaller: Mapping[str, tuple[int, ...]] = {}
    for each in sorted((share, (share + 1) / 2, 1.0)):
        try:
            budget = Budget(**dict.fromkeys(metrics, each))
            kept = plan_for(scores, budget, layout, solver="nested").kept
        except BudgetError:
            assert not smaller, "a larger budget failed where a smaller one was reached"
            continue
        assert all(set(units) <= set(kept[name]) for name, units in smaller.items())
        smaller = kept
    assert all(len(units) == len(scores[name]) for name, units in smaller.items()), "budget 1 keeps all"


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    coupled=st.booleans(),
    ratios=st.dictionaries(st.sampled_from(("head_dim", "mlp", "token")), st.floats(0.2, 1.0), min_size=1),
)
def test_keep_ratios_are_hit_and_nested(seed: int, coupled: bool, ratios: dict[str, float]) -> None:
    scores = scored({"head_dim", "mlp", "token"}, seed, coupled=coupled)
    made = plan_for(scores, Budget(keep=ratios), FREE, "nested")
    wider = Budget(keep={kind: (ratio + 1) / 2 for kind, ratio in ratios.items()})
    larger = plan_for(scores, wider, FREE, "nested")
    groups = {group.name: group for group in anatomy().groups}
    for kind in KINDS:
        names = [name for name in scores if groups[name].kind == kind]
        total = sum(groups[name].size for name in names)
        kept = sum(len(made.kept[name]) for name in names)
        if kind not in ratios:
            assert kept == total
            continue
        # The last V of a head takes its QK along, at most a head's worth at once.
        slack = 16 if kind == "head_dim" and not coupled else 0
        assert 0 <= math.floor(ratios[kind] * total + 1e-9) - kept <= slack
        assert all(set(made.kept[name]) <= set(larger.kept[name]) for name in names)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), layout=st.sampled_from(LAYOUTS), share=st.floats(0.5, 1.0))
def test_the_order_of_the_groups_does_not_matter(seed: int, layout: Layout, share: float) -> None:
    scores = scored({"head_dim", "mlp", "token"}, seed, ties=True)
    names = list(scores)
    random.Random(seed).shuffle(names)
    budget = Budget(macs=share)
    assert plan_for(scores, budget, layout) == plan_for({name: scores[name] for name in names}, budget, layout)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), layout=st.sampled_from(LAYOUTS), share=st.floats(0.7, 1.0))
def test_permuted_hidden_units_give_the_permuted_plan(seed: int, layout: Layout, share: float) -> None:
    scores = scored({"head_dim", "mlp"}, seed)
    name = "blocks.1.mlp.hidden"
    order = torch.randperm(len(scores[name]), generator=torch.Generator().manual_seed(seed))
    one = plan_for(scores, Budget(macs=share), layout)
    other = plan_for({**scores, name: scores[name][order]}, Budget(macs=share), layout)
    assert sorted(int(order[unit]) for unit in other.kept[name]) == list(one.kept[name])
    assert {**other.kept, name: ()} == {**one.kept, name: ()}


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), share=st.floats(0.6, 0.95))
def test_scores_are_followed_within_a_group(seed: int, share: float) -> None:
    scores = scored({"mlp", "token"}, seed)
    made = plan_for(scores, Budget(macs=share), FREE)
    for name, units in made.kept.items():
        if name.endswith("hidden") and len(units) < len(scores[name]):
            gone = sorted(set(range(len(scores[name]))) - set(units))
            assert float(scores[name][list(units)].min()) >= float(scores[name][gone].max())


def test_a_head_whose_values_all_go_vanishes_with_its_queries_and_keys() -> None:
    scores = scored({"head_dim"}, 0)
    for depth in range(3):
        for role in ("qk", "v"):
            scores[f"blocks.{depth}.attn.{role}"][16:32] *= 1e-3
    made = plan_for(scores, Budget(keep={"head_dim": 0.6}), FREE)
    for depth in range(3):
        for role in ("qk", "v"):
            assert not set(range(16, 32)) & set(made.kept[f"blocks.{depth}.attn.{role}"])
        assert 1 not in complete(anatomy(), made)[f"blocks.{depth}.attn.heads"]


def test_queries_and_keys_without_masks_go_with_their_head_too() -> None:
    """The formula must not count what the cut takes along."""
    all_v = {f"blocks.{depth}.attn.v": tuple(range(16)) for depth in range(3)}
    made = complete(anatomy(), Plan(kept=all_v, sizes=dict.fromkeys(all_v, 48)))
    assert made["blocks.2.attn.qk"] == tuple(range(16))
    assert made["blocks.2.attn.heads"] == (0,)


@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda layout: f"{layout.multiple}-{'equal' if layout.equal_heads else 'uneven'}"
)
def test_the_smallest_plan_leaves_one_unit_everywhere(layout: Layout) -> None:
    scores = scored({"head_dim", "mlp", "token"}, 1)
    with pytest.raises(BudgetError) as caught:
        plan_for(scores, Budget(macs=0.001), layout)
    reach = float(re.findall(r"macs (\d\.\d+)", str(caught.value).partition("reachable")[2])[0])
    made = plan_for(scores, Budget(macs=reach), layout)
    assert all(len(units) >= 1 for units in made.kept.values())
    assert len(made.kept["blocks.2.tokens"]) == 1


class _Scores(HasScores):
    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self.scores = scores

    @property
    def scored(self) -> ScoredModel:
        return ScoredModel(anatomy=anatomy(), scores=self.scores, layout=Layout(multiple=2), fold=False)


def test_a_rated_source_brings_its_layout_and_fold() -> None:
    source = _Scores(scored({"mlp"}, 0))
    made = plan(source, Budget(macs=0.8))
    assert not made.fold
    assert all(len(units) % 2 == 0 for units in made.kept.values())
    assert plan(source, Budget(macs=0.8), fold=True).fold
    with pytest.raises(ConfigError, match="score applies to attached masks"):
        plan(source, Budget(macs=0.8), score="mask")


def test_scores_that_do_not_fit_are_refused() -> None:
    budget = Budget(macs=0.8)
    name = "blocks.0.mlp.hidden"
    for scores, says in (
        ({}, "no scores to plan with"),
        ({"blocks.0.mlp.hiden": torch.ones(192)}, "Did you mean 'blocks.0.mlp.hidden'"),
        ({name: torch.ones(191)}, r"for \(191,\) units, this model has 192"),
        ({name: torch.full((192,), math.nan)}, "not all finite"),
        ({name: torch.full((192,), math.inf)}, "not all finite"),
    ):
        with pytest.raises(PlanError, match=says):
            plan_for(scores, budget, FREE)
    with pytest.raises(BudgetError, match="kind 'token', but there are scores only for mlp"):
        plan_for({name: torch.ones(192)}, Budget(keep={"token": 0.5}), FREE)


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.01, 50, math.nan, math.inf, -math.inf, True, False, "0.5"], ids=repr)
@pytest.mark.parametrize("field", ["params", "macs", "keep"], ids=str)
def test_a_budget_is_a_share(field: str, value: object) -> None:
    with pytest.raises(BudgetError, match="not a share of the dense model; give a number above 0 and at most 1"):
        Budget(**{field: {"mlp": value} if field == "keep" else value})


def test_a_budget_needs_one_kind_of_limit() -> None:
    for arguments, says in (
        ({}, "needs a limit"),
        ({"keep": {}}, "at least one"),
        ({"keep": {"mlp": 0.5}, "macs": 0.5}, "either keep ratios"),
        ({"keep": {"tokens": 0.5}}, "Did you mean 'token'"),
        ({"keep": {"xyz": 0.5}}, "no kind 'xyz'; kinds are head_dim, head, mlp, channel, token"),
    ):
        with pytest.raises(BudgetError, match=says):
            Budget(**arguments)
    assert Budget(macs=1, params=0.25).name == "macs-1.00_params-0.25"
    with pytest.raises(ConfigError, match=r"layout.multiple=0"):
        Layout(multiple=0)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), style=st.sampled_from(("free", "equal", "coupled", "heads")), fold=st.booleans())
def test_a_plan_survives_json(seed: int, style: str, fold: bool) -> None:
    drawn = draw(anatomy(), style, seed)[1]
    one = Plan(kept=drawn.kept, sizes=drawn.sizes, budget={"macs": 0.5}, fold=fold)
    assert Plan.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    plan_for(scored({"mlp", "token"}, 0), Budget(macs=0.7), FREE).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_a_saved_plan_is_the_same(plan_file: Path) -> None:
    assert Plan.load(plan_file) == plan_for(scored({"mlp", "token"}, 0), Budget(macs=0.7), FREE)
    assert [path.name for path in plan_file.parent.iterdir()] == ["plan.json"]


def test_every_changed_digit_and_truncation_of_a_plan_is_seen(plan_file: Path) -> None:
    whole = plan_file.read_bytes()
    dice = random.Random(0)
    digits = [place for place, byte in enumerate(whole) if chr(byte).isdigit()]
    for place in dice.sample(digits, 40):
        other = whole[:place] + bytes([48 + (whole[place] - 48 + 1) % 10]) + whole[place + 1 :]
        plan_file.write_bytes(other)
        with pytest.raises(CheckpointError):
            Plan.load(plan_file)
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        plan_file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated or not JSON"):
            Plan.load(plan_file)
    for place in dice.sample(range(len(whole)), 30):
        plan_file.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            Plan.load(plan_file)


def test_files_that_are_no_plan(plan_file: Path) -> None:
    value = json.loads(plan_file.read_text())
    del value["sha256"]
    for changed, says in (
        ({**value, "format": 2}, "has format 2, this version of slimming reads up to 1. Upgrade"),
        ({**value, "format": "1"}, "no format number"),
        ([], "no format number"),
        ({**value, "groups": []}, "is damaged"),
        ({"format": 1}, "is damaged"),
        ({**value, "groups": {"a": {"size": 3, "kept": "x"}}}, "is damaged"),
    ):
        plan_file.write_text(json.dumps(seal(changed) if isinstance(changed, dict) else changed))
        with pytest.raises(CheckpointError, match=says):
            Plan.load(plan_file)
    with pytest.raises(CheckpointError, match="does not exist"):
        Plan.load(plan_file.parent / "none.json")
    plan_file.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="has no checksum"):
        Plan.load(plan_file)
    plan_file.write_text(json.dumps(seal(value)))
    assert Plan.load(plan_file).kept
    with pytest.raises(OutputError, match="cannot be written"):
        Plan.load(plan_file).save(plan_file / "inside" / "plan.json")


def test_a_plan_names_the_sizes_of_its_groups() -> None:
    with pytest.raises(PlanError, match="needs the size of each group"):
        Plan(kept={"a": (0,)}, sizes={})


def test_the_smallest_share_is_what_no_smaller_budget_reaches() -> None:
    planner = Planner(anatomy(), scored({"head_dim", "mlp"}, 0), FREE, partial(costs_of, anatomy()))
    for metric in ("macs", "params"):
        least = planner.smallest(metric)
        assert 0 < least < 1
        made = planner.plan(Budget(**{metric: least + 1e-9}), fold=True)
        assert cost_of(made)[metric] == pytest.approx(least * DENSE[metric])
        with pytest.raises(BudgetError, match="cannot be reached"):
            planner.plan(Budget(**{metric: least - 1e-3}), fold=True)


def test_a_chain_goes_in_its_order_whatever_its_candidates_cost() -> None:
    """A later candidate that is cheaper to lose per multiply-add still waits for the earlier one."""
    dear = Candidate(units=(("a", 0),), score=1.0, value=1.0, chain=("a", 0))
    cheap = Candidate(units=(("a", 1), ("b", 0)), score=1.0, value=1.0, chain=("a", 0))
    other = Candidate(units=(("c", 0),), score=1.0, value=1.0, chain=("c", 0))
    assert removal_order([dear, cheap, other], [1.0, 100.0, 2.0]) == [2, 0, 1]


def test_scores_along_a_chain_never_fall() -> None:
    candidates = chain_of("a", 0, [[("a", 0)], [("a", 1), ("a", 2)], [("a", 3)]], {"a": [3.0, 1.0, 2.0, 5.0]})
    assert [candidate.score for candidate in candidates] == [3.0, 3.0, 5.0]
