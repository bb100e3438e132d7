"""Scoring after the training of a search: what cannot be computed is not replaced, and the training is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import slimming
from slimming.errors import ConfigError, DataError, NonFiniteLossError, PlanError
from slimming.training.samples import Data

STEPS = 2
Pairs = list[tuple[Tensor, Tensor]]


def make() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=2)


def config(**changes: Any) -> slimming.SearchConfig:
    train = slimming.TrainConfig(steps=STEPS, batch_size=4, lr=1e-3)
    return dataclasses.replace(slimming.SearchConfig(train=train, images=4), **changes)


def batches(count: int = STEPS) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 0, 1])) for _ in range(count)]


class BreaksAfter:
    """Batches that can be read until ``passes`` passes were begun."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes -= 1
        if self.passes < 0:
            raise DataError("The bucket cannot be reached.")
        return iter(batches())


def data(train: Any) -> Data:
    return Data(train, batches(1), ("no", "yes"))


def test_a_score_that_fails_keeps_the_training_and_goes_on_with_another(tmp_path: Path) -> None:
    """With an iterator that ends with the training: the score has no images left."""
    once = data(iter(batches()))
    wanted = r"Score 'compensated' could not be computed: .*saved in .*search\.score.*taylor, contribution, mask"
    with pytest.raises(DataError, match=wanted):
        slimming.search(make(), once, config(), directory=tmp_path)
    assert not (tmp_path / "search.json").exists()
    # The same call with another score trains no further and reads no image.
    taylor = config(score="taylor")
    result = slimming.search(make(), data(BreaksAfter(0)), taylor, directory=tmp_path, resume=True)
    undisturbed = slimming.search(make(), data(iter(batches())), taylor)
    for name, score in undisturbed.scores.items():
        assert torch.equal(result.scores[name], score)
    assert result.history is not None
    assert result.history.seconds < undisturbed.history.seconds  # pyright: ignore[reportOptionalMemberAccess]
    result.save(tmp_path)
    record = json.loads((tmp_path / "search.json").read_text())
    assert (record["config"]["score"], record["scored_by"]) == ("taylor", "taylor")
    assert slimming.load_search(tmp_path).scored_by == "taylor"


def test_without_a_directory_the_model_keeps_its_masks(tmp_path: Path) -> None:
    model = make()
    with pytest.raises(DataError, match=r"keeps its masks: call slimming\.score_search"):
        slimming.search(model, data(iter(batches())), config())
    expected = slimming.search(make(), data(batches()), config(rotate=False))
    found = slimming.score_search(model, data(batches()), config())
    for name, score in expected.scores.items():
        torch.testing.assert_close(found.scores[name], score)
    with pytest.raises(PlanError, match="has no masks"):
        slimming.score_search(make(), data(batches()), config())


def test_a_sensitivity_that_fails_is_not_left_out(tmp_path: Path) -> None:
    """A loss that is not finite in evaluation."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0]).square().mean() * (1.0 if model.training else float("nan"))

    both = config(sensitivity=4, score="taylor")
    with pytest.raises(NonFiniteLossError, match=r"sensitivity of the kinds .*search\.sensitivity set to 0"):
        slimming.search(make(), data(batches()), both, directory=tmp_path, loss=loss)
    result = slimming.search(
        make(), data(BreaksAfter(0)), config(score="taylor"), directory=tmp_path, resume=True, loss=loss
    )
    assert result.sensitivity is None


def test_an_error_of_the_users_code_says_that_the_training_is_kept(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if not model.training:
            raise ZeroDivisionError("in the loss")
        return model(batch[0]).square().mean()

    with pytest.raises(ZeroDivisionError, match="in the loss") as raised:
        slimming.search(make(), data(batches()), config(sensitivity=4), directory=tmp_path, loss=loss)
    assert any("saved in" in note and "search.sensitivity" in note for note in raised.value.__notes__)


def test_memory_that_runs_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("slimming.scoring.fisher.fisher_scores", exhausted)
    with pytest.raises(ConfigError, match=r"Out of memory in forward passes of 4 images.*saved in"):
        slimming.search(make(), data(batches()), config(), directory=tmp_path)


def test_the_gradients_of_a_custom_loss_are_named() -> None:
    result = slimming.search(
        make(), data(batches()), config(score="fisher"), loss=lambda model, batch: model(batch[0]).square().mean()
    )
    assert result.scored_by == "fisher, by the gradients of the custom loss"
