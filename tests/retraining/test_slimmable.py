"""From one search to many budgets: one training that serves all, and one that cuts on its way."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import slimming
from slimming.core.pruning_plan import Plan
from slimming.errors import ConfigError, PlanError
from slimming.masks.attachment import prunable
from slimming.retraining import progressive
from slimming.retraining.progressive import cut_from_last, rebase_plan
from slimming.retraining.retrain import common_tokens
from slimming.retraining.slimmable import SandwichTask, recalibrate_batch_norms_
from slimming.training.loop import History
from slimming.training.samples import Data
from slimming.training.tasks import ClassificationTask
from variants import STYLES, VARIANTS, Variant, distance, draw, image, randomise_

SHARES = (0.5, 0.8, 0.3, 0.65)
"""Not in order of size."""
FEW: dict[str, Any] = {"batch_size": 8, "lr": 3e-3, "eval_every": 0.0, "log_every": 1}


def tiny(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=10, **options)


@pytest.fixture(scope="module")
def data() -> Data:
    from slimming.demo import settings

    source = settings()["data"]["source"]
    return slimming.open_data(slimming.DataConfig(source=source, train_limit=32, val_limit=16), tiny())


def searched(data: Data, model: nn.Module | None = None, **options: Any) -> slimming.SearchResult:
    """A search in which the masks moved, so that folding them or not is seen."""
    train = slimming.TrainConfig(steps=2, schedule="constant", **FEW)
    config = slimming.SearchConfig(train=train, score="taylor", rotate=False, mask_lr=30.0, **options)
    result = slimming.search(model if model is not None else tiny(proj_drop_rate=0.1), data, config)
    assert (
        options.get("norms")
        or max(float((mask.detach() - 1).abs().max()) for mask in result.masks.own().values()) > 0.05
    )
    return result


@pytest.fixture(scope="module")
def result(data: Data) -> slimming.SearchResult:
    return searched(data)


@pytest.fixture(scope="module")
def plans(result: slimming.SearchResult) -> list[Plan]:
    return slimming.plans(result, [slimming.Budget(macs=share) for share in SHARES], solver="nested")


@pytest.fixture(scope="module")
def x(data: Data) -> Tensor:
    return torch.cat(slimming.calibration_images(data, 8)).double()


def at(shared: slimming.SearchResult, plan: Plan) -> nn.Module:
    """The masked model at one of its plans, in float64."""
    model = copy.deepcopy(shared.model).double()
    masks = model.__dict__["slimming_masks"]
    masks.apply_(dataclasses.replace(plan, fold=False))
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"ema": 0.5}], ids=str)
def test_every_plan_is_trained_and_its_cut_is_the_masked_model(
    options: dict[str, Any], result: slimming.SearchResult, plans: list[Plan], data: Data, x: Tensor
) -> None:
    assert any(name.endswith(".tokens") and len(p.kept[name]) < p.sizes[name] for p in plans for name in p.kept)
    shared = slimming.train_slimmable(result, data, plans, slimming.TrainConfig(steps=4, **FEW, **options))
    for plan in plans:
        small = slimming.cut(shared.model, plan).double().eval()
        assert distance(small(x), at(shared, plan)(x)) < 1e-9
        before = slimming.cut(result.model, plan).double().eval()
        assert distance(small(x), before(x)) > 1e-3
        assert slimming.plan(shared, slimming.Budget(**plan.budget), solver="nested").kept == plan.kept


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "as it is"])
def test_it_starts_where_the_search_ended(fold: bool, data: Data, x: Tensor) -> None:
    result = searched(data, fold=fold)
    before = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    plans = slimming.plans(result, [slimming.Budget(macs=share) for share in (0.8, 0.4)], solver="nested")
    nothing = slimming.train_slimmable(result, data, plans, slimming.TrainConfig(steps=0, batch_size=8))
    for plan in plans:
        expected = slimming.cut(result.model, plan).double().eval()(x)
        assert distance(slimming.cut(nothing.model, plan).double().eval()(x), expected) < 1e-5
    slimming.train_slimmable(result, data, plans[:1], slimming.TrainConfig(steps=1, **FEW))
    after = result.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_order_of_the_plans_does_not_matter(result: slimming.SearchResult, plans: list[Plan], data: Data) -> None:
    config = slimming.TrainConfig(steps=4, **FEW)
    one = slimming.train_slimmable(result, data, plans, config)
    other = slimming.train_slimmable(result, data, plans[::-1], config)
    fewer = slimming.train_slimmable(result, data, plans[:1], config)
    assert same(one.model, other.model)
    assert not same(one.model, fewer.model)


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_largest_the_smallest_and_one_between(result: slimming.SearchResult, plans: list[Plan]) -> None:
    turns = {count: SandwichTask(ClassificationTask(), result.masks, plans[:1] * count, 0) for count in (1, 2, 3, 5)}
    drawn = {count: [turn.choice(call) % count for call in range(60)] for count, turn in turns.items()}
    assert set(drawn[1]) == {0}
    assert drawn[2] == [0, 1] * 30
    assert drawn[3] == [0, 2, 1] * 20
    assert drawn[5][::3] == [0] * 20
    assert drawn[5][1::3] == [4] * 20
    assert set(drawn[5][2::3]) == {1, 2, 3}


class Stopped(Exception):
    """What ends a training in the middle."""


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "ema": 0.5}], ids=str)
def test_stopped_and_resumed_it_ends_with_the_same_bits(
    options: dict[str, Any], result: slimming.SearchResult, plans: list[Plan], data: Data, tmp_path: Path
) -> None:
    config = slimming.TrainConfig(steps=5, **{**FEW, "eval_every": 0.75}, checkpoint_seconds=0.0, **options)
    seen: list[dict[str, float]] = []

    def judge(model: nn.Module, stop: bool) -> dict[str, float]:
        if stop:
            raise Stopped
        seen.append({"kept": sum(float((m > 0).sum()) for m in model.__dict__["slimming_masks"].values())})
        return seen[-1]

    def go(place: str, stop: bool, resume: bool) -> slimming.SearchResult:
        return slimming.train_slimmable(
            result, data, plans, config, directory=tmp_path / place, resume=resume, evaluate=lambda m: judge(m, stop)
        )

    undisturbed = go("one", stop=False, resume=False)
    with pytest.raises(Stopped):
        go("two", stop=True, resume=False)
    resumed = go("two", stop=False, resume=True)
    assert same(undisturbed.model, resumed.model)
    assert undisturbed.history is not None
    # It was evaluated at the smallest plan, and every unit takes part again at the end.
    smallest = plans[SHARES.index(0.3)]
    assert undisturbed.metrics == {"kept": sum(map(len, smallest.kept.values()))}
    assert all(bool((mask == 1).all()) for mask in resumed.masks.values())


def test_a_training_under_way_keeps_its_plans(
    result: slimming.SearchResult, plans: list[Plan], data: Data, tmp_path: Path
) -> None:
    config = slimming.TrainConfig(steps=1, **FEW)
    slimming.train_slimmable(result, data, plans[:2], config, directory=tmp_path)
    with pytest.raises(ConfigError, match="started for other plans"):
        slimming.train_slimmable(result, data, plans, config, directory=tmp_path, resume=True)


def test_what_it_refuses(result: slimming.SearchResult, plans: list[Plan], data: Data) -> None:
    with pytest.raises(ConfigError, match="Give the plans"):
        slimming.train_slimmable(result, data, [])
    distil = slimming.DistilConfig(relations=("blocks.1",))
    with pytest.raises(ConfigError, match=r"Plans may remove tokens \(blocks.*only masked"):
        slimming.train_slimmable(
            result, data, plans, slimming.TrainConfig(steps=1, batch_size=8), tiny(), distil=distil
        )
    unsearched = Plan(kept={"blocks.0.mlp.branch": ()}, sizes={"blocks.0.mlp.branch": 1})
    with pytest.raises(PlanError, match="which has no mask"):
        slimming.train_slimmable(result, data, [unsearched], slimming.TrainConfig(steps=1))


def test_saved_and_loaded_it_is_cut_alike(data: Data, x: Tensor, tmp_path: Path) -> None:
    result = searched(data, tokens="multiply", kinds=("mlp", "token"))
    plan = slimming.plan(result, slimming.Budget(macs=0.7))
    shared = slimming.train_slimmable(result, data, [plan], slimming.TrainConfig(steps=1, **FEW))
    shared.save(tmp_path)
    loaded = slimming.load_search(tmp_path)
    cuts = [slimming.cut(each.model, plan).double().eval()(x) for each in (shared, loaded)]
    assert torch.equal(*cuts)
    assert distance(at(shared, plan)(x), cuts[0]) < 1e-9


def test_scales_of_batch_norms_as_masks(data: Data, x: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    result = searched(data, model, norms=True)
    few = [slimming.plan(result, slimming.Budget(macs=share), solver="nested") for share in (0.8, 0.5)]
    shared = slimming.train_slimmable(result, data, few, slimming.TrainConfig(steps=2, **FEW))
    shared.save(tmp_path)
    loaded = slimming.load_search(tmp_path)
    for plan in few:
        small = slimming.cut(loaded.model, plan).double().eval()
        assert distance(small(x), at(shared, plan)(x)) < 1e-9


def test_running_statistics_are_taken_anew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))
    images = [torch.randn(6, 3, 4, 4) for _ in range(3)]
    recalibrate_batch_norms_(model.eval(), images)
    outputs = [model[0](batch) for batch in images]
    first, second = model[1], model[4]
    torch.testing.assert_close(first.running_mean, torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0))
    assert first.momentum == second.momentum == 0.1
    assert not any(module.training for module in model.modules())
    # Without dropout, whatever the modes around.
    after = [model[3]((o - o.mean((0, 2, 3), keepdim=True)) / o.std((0, 2, 3), keepdim=True)) for o in outputs]
    torch.testing.assert_close(
        second.running_mean, torch.stack([o.mean((0, 2, 3)) for o in after]).mean(0), atol=1e-2, rtol=0
    )
    before = copy.deepcopy(model.state_dict())
    recalibrate_batch_norms_(model, [])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def union(one: Plan, other: Plan) -> Plan:
    kept = {name: tuple(sorted({*units, *other.kept[name]})) for name, units in one.kept.items()}
    return dataclasses.replace(one, kept=kept)


@pytest.mark.parametrize("variant", VARIANTS[::5], ids=lambda variant: variant.id)
def test_a_cut_of_a_cut_is_the_cut(variant: Variant) -> None:
    dense = variant.make()
    x = image(dense)
    anatomy, off = prunable(dense).anatomy, {}
    for style in STYLES:
        groups, small = draw(anatomy, style)
        if not groups or style == "joint":
            continue
        large = union(small, draw(anatomy, style, seed=5)[1])
        first = slimming.cut(dense, large)
        randomise_(first, seed=3)  # a plan says which units stay, whatever the training made of them
        rest = rebase_plan(dense, large, small, first)
        second = slimming.cut(slimming.cut(dense, large), rest)
        off[style] = distance(second(x), slimming.cut(dense, small)(x))
        assert slimming.cost(first, rest).params == slimming.cost(dense, small).params, style
    assert len(off) > 8
    assert {style: found for style, found in off.items() if found >= 1e-9} == {}


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"], ids=str)
def test_a_cut_of_a_cut_of_a_traced_model(name: str) -> None:
    model = timm.create_model(name).double().eval()
    anatomy, dice = prunable(model).anatomy, random.Random(0)
    x = torch.randn(2, *anatomy.input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = {group.name: group.size for group in anatomy.groups if group.kind != "width"}
    half = {n: tuple(sorted(dice.sample(range(size), max(1, size // 2)))) for n, size in sizes.items()}
    more = {n: tuple(sorted({*units, *dice.sample(range(sizes[n]), sizes[n] // 2)})) for n, units in half.items()}
    small, large = (Plan(kept=kept, sizes=sizes) for kept in (half, more))
    again = cut_from_last(model, small, [(large, slimming.cut(model, large))])
    assert distance(again(x), slimming.cut(model, small)(x)) < 1e-9


def test_a_wrong_unit_is_seen() -> None:
    """Heads of several sizes change places at a cut: taking units by their place alone would be wrong."""
    dense = VARIANTS[0].make()
    x = image(dense)
    wrong = 0
    for seed in range(3):
        small = draw(prunable(dense).anatomy, "free", seed)[1]
        large = union(small, draw(prunable(dense).anatomy, "free", seed + 5)[1])
        first = slimming.cut(dense, large)
        right = rebase_plan(dense, large, small, first)
        by_place = {
            name: tuple(large.kept[name].index(unit) for unit in small.kept[name] if unit in large.kept[name])
            for name in right.kept
        }
        if any(by_place[name] != right.kept[name] for name in by_place if "attn" in name):
            wrong += 1
            assert distance(slimming.cut(first, right)(x), slimming.cut(dense, small)(x)) < 1e-9
    assert wrong


def test_rebase_plan_refuses_what_is_gone(result: slimming.SearchResult, plans: list[Plan]) -> None:
    large, small = plans[SHARES.index(0.8)], plans[SHARES.index(0.3)]
    with pytest.raises(PlanError, match="keeps units that were already removed"):
        rebase_plan(result.model, small, large, slimming.cut(result.model, small))


def test_each_model_is_cut_from_the_trained_one_above(
    result: slimming.SearchResult, plans: list[Plan], data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []

    def double(model: nn.Module, *_: Any, **__: Any) -> History:
        trained.append(slimming.cost(model).macs)
        model.get_parameter("head.weight").data.mul_(2.0)
        return History(1, 0.0, (), {}, None)

    monkeypatch.setattr(progressive, "train", double)
    found = slimming.train_progressive(result, data, plans)
    assert trained == sorted(trained, reverse=True)
    head = result.model.get_parameter("head.weight")
    for share, plan, model in zip(SHARES, plans, found, strict=True):
        assert slimming.cost(model).macs == slimming.cost(result.model, plan).macs
        times = 1 + sorted(SHARES, reverse=True).index(share)
        torch.testing.assert_close(model.get_parameter("head.weight"), head * 2.0**times)


def test_a_plan_that_does_not_follow_is_cut_from_the_search(
    result: slimming.SearchResult, plans: list[Plan], data: Data, x: Tensor
) -> None:
    group = "blocks.0.mlp.hidden"
    large = plans[SHARES.index(0.8)]
    gone = [unit for unit in range(large.sizes[group]) if unit not in large.kept[group]]
    other = dataclasses.replace(plans[0], kept={**plans[0].kept, group: (*gone[:1], *plans[0].kept[group][1:])})
    other = dataclasses.replace(other, kept={**other.kept, group: tuple(sorted(other.kept[group]))})
    nothing = slimming.TrainConfig(steps=0, batch_size=8)
    _, small = slimming.train_progressive(result, data, [large, other], nothing)
    assert torch.equal(small.double().eval()(x), slimming.cut(result.model, other).double().eval()(x))


def test_progressive_goes_on_and_averages(
    result: slimming.SearchResult, plans: list[Plan], data: Data, x: Tensor, tmp_path: Path
) -> None:
    config = slimming.TrainConfig(steps=2, ema=0.5, **FEW)
    images = slimming.calibration_images(data, 8)
    options: dict[str, Any] = {"teacher": tiny(), "images": images, "directory": tmp_path}
    first = slimming.train_progressive(result, data, plans[:2], config, **options)
    again = slimming.train_progressive(result, data, plans[:2], config, resume=True, **options)
    assert all(same(one, other) for one, other in zip(first, again, strict=True))
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
    alone = slimming.train_progressive(result, data, plans[:1], config, teacher=tiny(), images=images)
    assert not same(alone[0], first[0]), "the smaller one went on from the larger one's training"
    with pytest.raises(ConfigError, match="Give the plans"):
        slimming.train_progressive(result, data, [])


def test_averaged_models_can_be_trained_on(data: Data) -> None:
    train = slimming.TrainConfig(steps=1, ema=0.5, **FEW)
    result = slimming.search(tiny(), data, slimming.SearchConfig(train=train, score="taylor"))
    small = slimming.cut(result.model, slimming.plan(result, slimming.Budget(macs=0.5)))
    once = slimming.train(small, data, train).averaged
    assert once is not None
    assert slimming.train(once, data, train).steps == 1


def test_relations_of_a_cut_model_are_of_the_tokens_that_it_has(
    result: slimming.SearchResult, plans: list[Plan], data: Data
) -> None:
    small = slimming.cut(result.model, plans[SHARES.index(0.3)])
    tokens = {group.token.block: len(group.token.positions) for group in prunable(small).anatomy.groups if group.token}
    block = min(tokens, key=tokens.__getitem__)
    assert tokens[block] < 16
    names = (f"{block}.attn.qkv", block)
    positions = next(
        group.token.positions for group in prunable(small).anatomy.groups if group.name == f"{block}.tokens"
    )  # type: ignore[union-attr]
    # The class token comes first on both sides.
    shared = common_tokens(small, tiny(), names)
    assert list(shared) == list(names)
    assert all(places.tolist() == [0, *(1 + position for position in positions)] for places in shared.values())
    assert common_tokens(small, small, names) == {}
    distil = slimming.DistilConfig(relations=names, relation_weight=10.0, relation_heads=6)
    config = slimming.TrainConfig(steps=24, **{**FEW, "lr": 1e-3})
    history = slimming.train(small, data, config, teacher=tiny().eval(), distil=distil)
    told = [line["relations"] for line in history.log if "relations" in line]
    assert 0 < sum(told[-4:]) < 0.8 * sum(told[:4])


def test_settings_of_distillation_that_cannot_be_are_refused() -> None:
    for setting, said in (
        ({"alpha": 5.0}, "alpha is 5.0; the teacher's share"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"pool": "frist"}, r"pool is 'frist'.*Did you mean 'first'"),
        ({"relation_heads": 0}, "relation_heads is 0; it must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            slimming.DistilConfig(**setting)
    model: Any = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="distil needs a teacher: give the teacher"):
        slimming.train(model, Data([], [], ("a", "b")), distil=slimming.DistilConfig())
