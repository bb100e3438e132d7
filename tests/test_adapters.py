"""Searches inside other trainers: each example runs in a few steps, and what it cuts is smaller and loads."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

import slimming
from slimming.errors import ConfigError

ADAPTERS = Path(__file__).resolve().parent.parent / "examples" / "adapters"


@pytest.mark.filterwarnings("ignore")  # the trainers warn of few workers, of steps, of each other's versions
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raw_loop", []),
        ("hf_trainer", []),
        ("lightning_trainer", []),
        ("timm_train", []),
        ("timm_train", ["--scaler"]),
    ],
    ids=["raw loop", "transformers", "lightning", "timm", "timm with a scaler"],
)
def test_an_adapter(name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "lightning_trainer":
        pytest.importorskip("lightning")
    monkeypatch.syspath_prepend(str(ADAPTERS))
    monkeypatch.chdir(tmp_path)
    dense, cut = [], slimming.cut

    def noted(model: Any, plan: slimming.Plan, **options: Any) -> Any:
        dense.append((slimming.cost(model).macs, {group.name: group.size for group in slimming.describe(model)}))
        return cut(model, plan, **options)

    monkeypatch.setattr(slimming, "cut", noted)
    for module in ("common", name):
        sys.modules.pop(module, None)
    try:
        importlib.import_module(name).main(["--steps", "2", "--images", "32", "--output", "small", *words])
    finally:
        for module in ("common", name):
            sys.modules.pop(module, None)
    small = slimming.load(tmp_path / "small")
    macs, sizes = dense[-1]
    assert slimming.cost(small).macs < 0.9 * macs
    left = {group.name: group.size for group in slimming.describe(small) if group.name in sizes}
    assert sum(left.values()) < sum(sizes[name] for name in left)


def test_before_step_is_the_penalty_in_the_loss() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=3)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    masks = slimming.attach(model, [group for group in slimming.describe(model) if group.kind in ("head_dim", "mlp")])
    (F.cross_entropy(model(images), labels) + masks.penalty()).backward()
    masks.collect()
    wanted = {name: mask.grad.clone() for name, mask in masks.items() if mask.grad is not None}
    scores = masks.scores("taylor")
    model.zero_grad()
    masks.collected["steps"].zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: masks.before_step())
    F.cross_entropy(model(images), labels).backward()
    with torch.no_grad():
        optimizer.step()
    assert len(wanted) == len(masks)
    for name, gradient in wanted.items():
        torch.testing.assert_close(masks[name].grad, gradient)
        torch.testing.assert_close(masks.scores("taylor")[name], scores[name])


def test_fp16_without_clipping_is_refused() -> None:
    from slimming.training.hf_trainer import SearchCallback

    callback = SearchCallback(SimpleNamespace(before_step=lambda: None))
    for clip in (0, 0.0, None):
        with pytest.raises(ConfigError, match="set max_grad_norm"):
            callback.on_train_begin(SimpleNamespace(fp16=True, max_grad_norm=clip), None, None)
    callback.on_train_begin(SimpleNamespace(fp16=True, max_grad_norm=1.0), None, None)
    callback.on_train_begin(SimpleNamespace(fp16=False, max_grad_norm=0), None, None)
