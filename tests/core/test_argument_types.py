"""Numbers of every library are taken, other values are refused by a sentence that names what is needed."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import slimming
from slimming.errors import BudgetError, ConfigError, SlimmingError


@pytest.mark.parametrize(
    "half",
    [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)],
    ids=["float", "float32", "float64", "array", "tensor", "fraction"],
)
def test_budgets_take_every_number(half: Any) -> None:
    for budget in (slimming.Budget(macs=half), slimming.Budget(keep={"mlp": half})):
        assert budget.name in ("macs-0.50", "mlp-0.50")
        assert type(next(iter((budget.keep or budget.limits).values()))) is float


@pytest.mark.parametrize("value", [True, np.bool_(True), "0.5", [0.5], 10**400, float("nan"), np.inf, 1j], ids=repr)
def test_budgets_take_nothing_else(value: Any) -> None:
    for given in ({"macs": value}, {"keep": {"mlp": value}}):
        with pytest.raises(BudgetError, match="is not a share"):
            slimming.Budget(**given)
    with pytest.raises(BudgetError, match="not a mapping"):
        slimming.Budget(keep=value)


def test_settings_take_numbers_of_numpy_and_torch() -> None:
    train = slimming.TrainConfig(steps=np.int64(3), batch_size=torch.tensor(4), lr=np.float32(0.5))  # pyright: ignore
    assert (train.steps, train.batch_size, train.lr) == (3, 4, 0.5)
    assert {type(train.steps), type(train.batch_size), type(train.lr)} == {int, float}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: slimming.TrainConfig(batch_size="8"), "batch_size is '8'; it must be a whole number"),  # pyright: ignore
        (lambda: slimming.TrainConfig(lr=True), "lr is True; it must be a number"),
        (lambda: slimming.SearchConfig(images=2.5), "images is 2.5; it must be a whole number"),  # pyright: ignore
        (lambda: slimming.SearchConfig(kinds=3), "kinds is 3"),  # pyright: ignore
        (lambda: slimming.SearchConfig(penalty={"mlp": "x"}), r"penalty\['mlp'\] is 'x'"),  # pyright: ignore
        (lambda: slimming.DataConfig(source=None), "source is None; it must be text"),  # pyright: ignore
        (lambda: slimming.DataConfig(source="a\0b"), "null character"),
        (lambda: slimming.Layout(multiple="8"), "multiple is '8'"),  # pyright: ignore
        (lambda: slimming.RunConfig(), "missing|must be"),  # pyright: ignore
    ],
    ids=["text", "bool", "float", "number", "entry", "none", "null", "layout", "none given"],
)
def test_settings_of_another_type_are_named(make: Any, says: str) -> None:
    with pytest.raises((ConfigError, TypeError), match=says):
        make()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("load", (3,)),
        ("load", ("a\0b",)),
        ("load", ("x" * 300,)),
        ("load", ("x/" * 3000,)),
        ("save", ("model", "path")),
        ("cost", ("model",)),
        ("cut", ("model", "plan")),
        ("load_search", (None,)),
        ("evaluate", ("model", [])),
        ("run", ({}, "runs")),
        ("open_model", ("name",)),
        ("search", ("model", "data")),
    ],
    ids=["number", "null", "name", "path", "save", "cost", "cut", "none", "evaluate", "run", "open", "search"],
)
def test_arguments_of_another_type_are_named(name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(SlimmingError, match=r"it must be|null character|too long"):
        getattr(slimming, name)(*arguments)


def test_a_path_that_cannot_be_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=2)
    for path in ("a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"null character|too long"):
            slimming.save(model, path)
    with pytest.raises(ConfigError, match="seed is 'x'"):
        slimming.score(model, [torch.zeros(1, 3, 160, 160)], seed="x")  # pyright: ignore
