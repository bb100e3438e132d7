"""What a run checks before it works for hours."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import slimming
from slimming.benchmarking.programs import write_onnx
from slimming.errors import ConfigError, UnsupportedModelError
from slimming.masks.attachment import prunable
from slimming.runs.config import RunConfig
from slimming.runs.pipeline import check_budgets, check_settings
from slimming.runs.setup import check_input


def config(**options: Any) -> RunConfig:
    return RunConfig(
        model=slimming.ModelConfig(name="test_vit"),
        data=slimming.DataConfig(source="photos"),
        **{"budgets": (slimming.Budget(macs=0.5),), **options},
    )


def test_a_run_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    first = config()
    check_settings(first, tmp_path, write=False)
    assert not list(tmp_path.iterdir())
    check_settings(first, tmp_path, write=True)
    free = {"budgets": (slimming.Budget(macs=0.3),), "bench": slimming.BenchConfig(runs=3), "note": "again"}
    watched = {"retrain": dataclasses.replace(first.retrain, workers=1)}
    for change in (free, watched):
        check_settings(dataclasses.replace(first, **change), tmp_path, write=True)
    deciding: tuple[dict[str, Any], ...] = (
        {"retrain": dataclasses.replace(first.retrain, steps=4000)},
        {"search": dataclasses.replace(first.search, layout=slimming.Layout(multiple=4))},
        {"distil": None},
        {"compensate": 0},
        {"model": slimming.ModelConfig(name="test_vit2")},
    )
    for change in deciding:
        (name,) = change
        with pytest.raises(ConfigError, match=rf"(?s)was started with .*  {name}\b.* \(now .*give another directory"):
            check_settings(dataclasses.replace(first, **change), tmp_path, write=True)


def test_modules_to_distil_are_looked_for_before_the_search() -> None:
    dense = prunable(timm.create_model("test_vit"))
    with pytest.raises(ConfigError, match=r"has no module 'blocks\.99' to distil"):
        check_budgets(dense, config(distil=slimming.DistilConfig(features=("blocks.99",))))


def test_something_must_be_measured() -> None:
    with pytest.raises(ConfigError, match=r"bench\.batch_sizes one number or more"):
        slimming.BenchConfig(batch_sizes=())


def test_a_host_that_says_nothing_of_a_wrong_size_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_vit", img_size=32)

    def refuse(x: Tensor) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(model, "forward", refuse)
    with pytest.raises(UnsupportedModelError, match=r"32 x 32 pixels: its forward raises AssertionError\."):
        check_input(model)


def test_a_full_disk_is_no_fault_of_the_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    with pytest.raises(OSError, match=r"directory"):
        write_onnx(model, torch.randn(1, 3, 2, 2), tmp_path / "none" / "model.onnx")
