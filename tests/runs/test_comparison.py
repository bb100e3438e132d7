"""Comparisons of models of any task: results, table, report, drawn predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import slimming
from slimming.errors import ConfigError
from slimming.report.figures import around
from slimming.report.pages import read_results
from slimming.training.drawing import draw_prediction

QUICK = slimming.BenchConfig(batch_sizes=(1,), runs=1, seconds=0.01)
BOXES = {"boxes": torch.tensor([[2.0, 2, 20, 20], [1, 1, 5, 5]]), "scores": torch.tensor([0.9, 0.1]),
         "labels": torch.tensor([1, 0])}  # fmt: skip
ERROR = slimming.Metric(name="abs rel", higher_is_better=False)


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dense = timm.create_model("test_vit", img_size=32, num_classes=4).eval()
    plan = slimming.plan(slimming.attach(dense), slimming.Budget(macs=0.7))
    return {"dense": dense, "macs-0.70": slimming.cut(dense, plan)}


def test_a_comparison_of_another_task(tmp_path: Path) -> None:
    values = iter([0.105, 0.131])
    image = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8)
    slimming.compare(
        models(), tmp_path, evaluate=lambda model: next(values), metric=ERROR, images=[image, image],
        classes=("a", "cat"), predict=lambda model, image: BOXES, bench=QUICK, name="Depth", data="rooms",
    )  # fmt: skip
    results = read_results(tmp_path)
    assert results.metric == ERROR
    assert [row.metric for row in (results.dense, *results.rows)] == [0.105, 0.131]
    assert [list(one.pictures) for one in results.predictions] == [["dense", "macs-0.70"]] * 2
    page, table = (tmp_path / "report.html").read_text(), (tmp_path / "table.md").read_text()
    assert "abs rel against MACs" in page
    assert "Lower is better" in page
    assert "Of abs rel, lower values are better" in page
    assert page.count("data:image/png;base64") >= 4
    assert "top-1" not in page.lower().replace("top-1 accuracy", "")
    assert "| 0.131 (+0.026) |" in table
    again = slimming.compare(models(), tmp_path, evaluate=lambda model: {"abs rel": 0.1}, metric=ERROR, bench=QUICK)
    assert again["rows"][0]["metric"] == 0.1


def test_axes_leave_out_what_is_much_worse() -> None:
    low, high = around([0.10, 0.12], [0.13, 0.9], ERROR)
    assert 0.0 <= low < 0.10
    assert 0.13 < high < 0.2
    low, high = around([0.6, 0.7], [0.65, 0.01], slimming.Metric(name="PSNR"))
    assert 0.3 < low < 0.6
    assert 0.7 < high < 0.9


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"models": {"dense": nn.Linear(1, 1)}}, "Give two models or more"),
        ({"cut": {"macs-0.5": nn.Linear(1, 1)}}, "cut names 'macs-0.5'"),
        ({"images": [torch.zeros(3, 8, 8, dtype=torch.uint8)]}, "images and predict together"),
        ({"evaluate": lambda model: {"mAP": 1.0}}, r"evaluate returns mAP, and no 'abs rel'"),
    ],
    ids=["one model", "an unknown model", "no predict", "another metric"],
)
def test_what_cannot_be_compared(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"models": models(), "evaluate": lambda model: 1.0, "metric": ERROR, **change}
    with pytest.raises(ConfigError, match=says):
        slimming.compare(given.pop("models"), tmp_path / "new", bench=QUICK, **given)


@pytest.mark.parametrize(
    "prediction",
    [
        BOXES,
        {**BOXES, "masks": torch.rand(2, 1, 32, 32)},
        torch.arange(32).expand(32, 32) // 8,
        torch.rand(32, 32),
        torch.rand(1, 32, 32),
    ],
    ids=["boxes", "masks", "classes", "depth", "image"],
)
def test_predictions_are_drawn(prediction: Any) -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    drawn = draw_prediction(image, prediction, ("a", "cat"))
    assert (drawn.shape, drawn.dtype) == ((3, 32, 32), torch.uint8)
    assert int(drawn.sum()) > 0
    assert int(image.sum()) == 0


@pytest.mark.parametrize("prediction", [torch.rand(8, 8), None, {"scores": 1}], ids=["size", "nothing", "no boxes"])
def test_predictions_that_cannot_be_drawn(prediction: Tensor | None) -> None:
    with pytest.raises(ConfigError, match="A prediction to draw on an image of 32 x 32 pixels must be"):
        draw_prediction(torch.zeros(3, 32, 32, dtype=torch.uint8), prediction)
