"""What a run makes of the hours that it is granted: arithmetic, with a pace that is given."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import timm

import slimming
from slimming.benchmarking.config import BenchConfig
from slimming.errors import ConfigError
from slimming.runs.config import RunConfig
from slimming.runs.time_budget import LEAST_RETRAIN, Pace, TimeAllocation, allocate, measure_pace

PACE = Pace(read_seconds=0.002, step_seconds=0.008)
EPOCH, SHARES = 40, (0.7, 0.3)


def config(hours: float = 1.0, **options: Any) -> RunConfig:
    base: dict[str, Any] = {
        "model": slimming.ModelConfig(name="vit"),
        "data": slimming.DataConfig(source="photos"),
        "budgets": tuple(slimming.Budget(macs=share) for share in SHARES),
        "hours": hours,
    }
    return RunConfig(**base | options)


def given(hours: float = 1.0, pace: Pace = PACE, **options: Any) -> TimeAllocation:
    return allocate(config(hours, **options), pace, SHARES, epochs=(EPOCH, EPOCH), val_images=100)


def test_by_hand() -> None:
    found = given(1.0)
    step = 64 * 0.010 + 100 * (0.002 + 0.008 / 3) / 40
    fixed = {
        "before": 0.0,
        "bench": 3 * 2 * 2.0,
        "score": 10 * 512 * 0.010,
        "cut": 2 * 3 * 256 * 0.010,
        "evaluate": 100 * (0.002 + 0.008 / 3 + 2 * (2 * 0.002 + 0.008 * (0.7 + 0.3) / 3)),
        "search": 40 * step,
    }
    both = 64 * (2 * 0.002 + 0.008 * (0.7 + 0.3 + 2 / 3)) + 100 * (2 * 0.002 + 0.008 * (0.7 + 0.3) / 3) / 40
    assert found.search_steps == 40
    assert found.retrain_steps is not None
    assert found.retrain_steps == int((0.9 * 3600 - sum(fixed.values())) / both)
    assert found.seconds == pytest.approx({**fixed, "retrain": found.retrain_steps * both})
    assert found.images_per_second == pytest.approx(100)
    assert 0.89 < found.expected_hours <= 0.9
    assert found == given(1.0), "nothing but the arguments decides"


def test_more_time_is_more_training() -> None:
    found = [given(hours) for hours in (0.02, 0.1, 0.3, 1.0, 4.0, 1000.0)]
    steps = [one.retrain_steps for one in found]
    assert steps == sorted(steps)  # type: ignore[type-var]
    assert steps[0] == LEAST_RETRAIN
    assert steps[-1] == 300 * EPOCH
    assert [one.search_steps for one in found] == sorted(one.search_steps for one in found)  # type: ignore[type-var]
    assert found[0].search_steps == 0
    assert found[-1].search_steps == EPOCH
    assert found[0].bench_seconds < found[-1].bench_seconds == BenchConfig().seconds
    for one in found[1:]:
        assert one.expected_hours <= one.hours
    assert found[0].expected_hours > 0.02
    assert "MORE than granted" in found[0].line(config(0.02))
    assert "MORE" not in found[1].line(config(0.1))


def test_a_search_of_less_than_a_tenth_of_an_epoch_is_none() -> None:
    for hours in (0.05, 0.1, 0.12, 0.15, 0.2):
        found = allocate(config(hours), PACE, SHARES, epochs=(1000, 1000), val_images=0)
        assert found.search_steps is not None
        assert not 0 < found.search_steps < 100


def test_a_score_that_training_collects_is_not_left_without_training() -> None:
    search = slimming.SearchConfig(score="taylor")
    found = allocate(config(0.01, search=search), PACE, SHARES, epochs=(1000, 1000), val_images=0)
    assert found.search_steps == 100
    assert found.applied(config(0.01, search=search)).search.train.steps == 100
    assert "MORE than granted" in found.line(config(0.01, search=search))
    assert found.seconds["score"] == 0
    assert given(one_shot=64, search=search).seconds["score"] == pytest.approx(10 * 64 * 0.010)


def test_a_slower_machine_trains_less() -> None:
    assert given(pace=Pace(read_seconds=0.02, step_seconds=0.08)).retrain_steps < given().retrain_steps  # type: ignore[operator]


def test_what_the_user_says_wins() -> None:
    long = slimming.SearchConfig(train=slimming.TrainConfig(epochs=3.0))
    short = slimming.SearchConfig(train=slimming.TrainConfig(steps=0))
    searched = [given(search=search) for search in (long, short)]
    assert [one.search_steps for one in searched] == [None, None]
    assert searched[0].retrain_steps < searched[1].retrain_steps  # type: ignore[operator]
    fixed = given(0.3, retrain=slimming.TrainConfig(steps=70))
    assert fixed.retrain_steps is None
    assert fixed.search_steps == EPOCH
    assert fixed.seconds["retrain"] == pytest.approx(given(0.3).seconds["retrain"] / given(0.3).retrain_steps * 70)  # type: ignore[operator]
    assert given(0.05, bench=BenchConfig(seconds=1.0)).bench_seconds == 1.0
    applied = fixed.applied(config(0.3, retrain=slimming.TrainConfig(steps=70)))
    assert (applied.search.train.steps, applied.retrain.steps) == (EPOCH, 70)
    assert "retrain as set" in fixed.line(applied)


def test_one_training_for_all_gets_the_time_of_all() -> None:
    each, together = given(), given(retraining="together")
    # A step of all costs one of the dense model, however many budgets it serves.
    assert together.seconds["retrain"] == pytest.approx(each.seconds["retrain"], rel=0.01)
    assert "for all budgets together" in together.line(config(retraining="together"))
    assert "for each budget" in each.line(config())


def test_without_a_teacher_there_is_time_for_more() -> None:
    assert given(distil=None).retrain_steps > given().retrain_steps  # type: ignore[operator]


def test_it_survives_json_and_changes_nothing_else() -> None:
    found = given()
    assert TimeAllocation(**dataclasses.asdict(found)) == found
    applied = found.applied(config())
    assert applied.hours is None
    back = dataclasses.replace(
        applied, hours=1.0, search=config().search, retrain=config().retrain, bench=config().bench
    )
    assert back == config()
    assert applied.retrain.lr == config().retrain.lr


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan"), float("inf")], ids=str)
def test_nonsense_is_refused(hours: float) -> None:
    with pytest.raises(ConfigError, match=r"hours is (nan|inf|.*; give the time)"):
        config(hours)


def test_hours_with_nothing_to_decide_are_refused() -> None:
    fixed: dict[str, Any] = {
        "search": slimming.SearchConfig(train=slimming.TrainConfig(steps=5)),
        "retrain": slimming.TrainConfig(steps=5),
    }
    with pytest.raises(ConfigError, match="hours has no effect"):
        config(**fixed)
    assert config(**{**fixed, "hours": None}).hours is None


def test_the_pace_of_this_machine() -> None:
    from slimming.demo import settings

    model = timm.create_model("test_vit", img_size=32, num_classes=10)
    images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=32, val_limit=8)
    data = slimming.open_data(images, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # A batch of 6, which a mixup of a third of it could not pair, and a warm-up longer than the few steps.
    train = slimming.TrainConfig(batch_size=6, accumulate=2, mixup=0.2, epochs=9.0, warmup_epochs=5.0, ema=0.9)
    found = measure_pace(model, data, train)
    assert found.read_seconds > 0
    assert found.step_seconds > 0
    assert all((model.state_dict()[name] == tensor).all() for name, tensor in before.items())


@pytest.mark.parametrize("workers", [0, 2], ids=lambda count: f"{count} workers")
def test_reading_that_is_slower_than_training_is_seen(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimming.demo import settings
    from slimming.training.samples import ImageDataset

    model = timm.create_model("test_vit", img_size=32, num_classes=10)
    images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=64, val_limit=8)
    data = slimming.open_data(images, model)
    own = ImageDataset.sample

    def slow(dataset: ImageDataset, index: int, epoch: int) -> Any:
        time.sleep(0.1)
        return own(dataset, index, epoch)

    monkeypatch.setattr(ImageDataset, "sample", slow)
    found = measure_pace(model, data, slimming.TrainConfig(batch_size=4, workers=workers))
    assert found.training_seconds(1) >= 0.8 * 0.1 / max(1, workers)
