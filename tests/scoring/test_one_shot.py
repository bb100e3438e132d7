"""One-shot scores: what they estimate, what redundancy takes off, bases that change nothing, and what goes wrong."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimming
from slimming.core.calibration import labelled
from slimming.errors import ConfigError, DataError, NonFiniteLossError, PlanError
from slimming.masks.attachment import prunable
from slimming.scoring.fisher import fisher_scores
from slimming.scoring.registry import SCORES

from .small import images, vit


def test_fisher_is_the_divergence_of_a_small_step() -> None:
    """KL(outputs || outputs with one factor 1 + e) / e^2 goes to the score as e goes to 0."""
    model, batches = vit(), images(4, 64)
    scored = slimming.score(model, batches, how="fisher", rotate=False)
    x = torch.cat(batches)
    whole = model(x).log_softmax(1)
    masks = slimming.attach(model)
    step, ratios = 1e-3, []
    for name in ("blocks.0.mlp.hidden", "blocks.1.attn.v", "blocks.0.attn.qk", "blocks.1.tokens"):
        scores = scored.scores[name].double()
        for unit in scores.topk(3).indices.tolist():
            with torch.no_grad():
                masks[name][unit] = 1 + step
                divergence = F.kl_div(model(x).log_softmax(1), whole, reduction="batchmean", log_target=True)
                masks[name][unit] = 1.0
            ratios.append(float(divergence) / step**2 / float(scores[unit]))
    # 64 passes with drawn labels: each ratio is off by some ten percent, their mean by less.
    assert 0.9 < sum(ratios) / len(ratios) < 1.1
    assert all(0.5 < ratio < 2 for ratio in ratios)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Tensor], Tensor]:
    """The demo's model, some of its images, and others to judge cuts on."""
    from slimming.demo import settings
    from slimming.runs.config import ModelConfig
    from slimming.runs.setup import open_model

    demo = settings()
    model = open_model(ModelConfig(**demo["model"]))[0].eval()
    seen = slimming.load_images(demo["data"]["source"], model, 128, seed=0)
    return model, seen, torch.cat(slimming.load_images(demo["data"]["source"], model, 128, seed=5))


@torch.no_grad()
def divergence(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    whole = model(x).log_softmax(1)
    return float(F.kl_div(small.eval()(x).log_softmax(1), whole, reduction="batchmean", log_target=True))


def test_more_of_what_matters_stays_than_by_chance(trained: tuple[nn.Module, list[Tensor], Tensor]) -> None:
    """The outputs of the cut model are closer to the dense ones."""
    model, seen, other = trained

    def lost(scored: Any, batches: list[Tensor]) -> float:
        small = slimming.cut(scored.model, slimming.plan(scored, slimming.Budget(macs=0.4)), images=batches)
        return divergence(model, small, other)

    with torch.no_grad():
        best = slimming.score(model, seen)
        plain = slimming.score(model, seen, rotate=False)
        chance = {name: torch.rand(len(score)) for name, score in best.scores.items()}
        drawn = slimming.OneShot(prunable=best.prunable, scores=chance, how="fisher", images=seen)
        losses = {
            "ours": lost(best, seen),
            "without compensation": lost(best, []),
            "without rotation": lost(plain, seen),
            "by chance": lost(drawn, seen),
        }
    assert losses["ours"] == min(losses.values()), losses
    assert losses["ours"] < 0.2 * losses["by chance"], losses


def test_tokens_by_turns_lose_less_than_by_slopes_of_the_whole_model(
    trained: tuple[nn.Module, list[Tensor], Tensor],
) -> None:
    model, seen, other = trained
    lost = {}
    for how in ("compensated", "fisher"):
        scored = slimming.score(model, seen, how=how, kinds=["token"], rotate=False)
        for keep in (0.7, 0.5, 0.3):
            plan = slimming.plan(scored, slimming.Budget(keep={"token": keep}))
            lost[how, keep] = divergence(model, slimming.cut(model, plan), other)
    assert lost["compensated", 0.7] < lost["fisher", 0.7], lost
    assert all(lost["compensated", keep] < 0.7 * lost["fisher", keep] for keep in (0.5, 0.3)), lost


@pytest.mark.parametrize("how", [name for name, score in SCORES.items() if score.one_shot], ids=str)
def test_the_same_for_the_same_seed_and_the_model_as_it_was(how: str, tmp_path: Path) -> None:
    from slimming.demo import settings

    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=10).train()
    before = copy.deepcopy(model.state_dict())
    source = slimming.DataConfig(source=settings()["data"]["source"], train_limit=24, val_limit=8)
    data = slimming.open_data(source, model)
    first, again, other = (slimming.score(model, data, how=how, images=16, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first.scores[name], again.scores[name]) for name in first.scores)
    if how != "contribution":
        assert any(not torch.equal(first.scores[name], other.scores[name]) for name in first.scores)
    assert model.training
    assert not first.model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert sum(len(batch) for batch in first.images) == 16


def test_features_without_a_classifier() -> None:
    model = vit(num_classes=0)
    scored = slimming.score(model, images())
    small = slimming.cut(scored.model, slimming.plan(scored, slimming.Budget(macs=0.6)), images=scored.images)
    assert small(images()[0]).shape == (16, 48)
    with pytest.raises(DataError, match="needs labels"):
        slimming.score(model, images(), how="taylor")


def test_kinds_can_be_chosen() -> None:
    assert {name.rpartition(".")[2] for name in slimming.score(vit(), images(), kinds=["mlp"]).scores} == {"hidden"}
    every = slimming.score(vit(), images(), kinds=["head_dim", "mlp", "token", "block", "width"]).scores
    assert {"embedding", "blocks.0.attn.branch", "blocks.1.tokens"} <= every.keys()


def test_bad_input_is_refused() -> None:
    model = vit()
    with pytest.raises(ConfigError, match="There is no score 'fischer'"):
        slimming.score(model, images(), how="fischer")
    with pytest.raises(ConfigError, match="no groups of kind 'channel'"):
        slimming.score(model, images(), kinds=["channel"])
    wrong: Any
    for wrong in ([], [torch.randn(3, 32, 32)], "photos/"):
        with pytest.raises(DataError, match="batches of images"):
            slimming.score(model, wrong)
    broken = vit()
    with torch.no_grad():
        broken.head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="not finite"):
        slimming.score(broken, images())
    slimming.attach(model)
    with pytest.raises(PlanError, match="has masks"):
        slimming.score(model, images())


JOB = """
import sys, timm, torch, slimming
torch.set_num_threads(1)
if "--many" in sys.argv:
    torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
model = timm.create_model("test_vit", img_size=32, num_classes=5).double()
dice = torch.Generator().manual_seed(1)
batches = [torch.randn(12, 3, 32, 32, generator=dice, dtype=torch.float64) for _ in range(3)]
scored = slimming.score(model, batches)
small = slimming.cut(scored.model, slimming.plan(scored, slimming.Budget(keep={"mlp": 0.5})), images=scored.images)
if "--many" not in sys.argv or torch.distributed.get_rank() == 1:
    torch.save({"scores": scored.scores, "state": small.state_dict()}, sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB)
    alone = [sys.executable, str(job), str(tmp_path / "one.pt")]
    both = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for words in (alone, [*both, str(job), str(tmp_path / "two.pt"), "--many"]):
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    for part in ("scores", "state"):
        for name, tensor in one[part].items():
            torch.testing.assert_close(two[part][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_model_of_one_output_has_scores() -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=1)
    scored = slimming.score(model, [torch.randn(8, 3, 32, 32)])
    assert all(float(scores.max()) > 0 for scores in scored.scores.values())


def test_slopes_with_labels_do_not_depend_on_how_images_are_batched() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=5).eval()
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    groups = [group for group in slimming.describe(model) if group.kind == "mlp"]
    whole = fisher_scores(prunable(model), groups, [labelled(images, labels)], drawn=False)
    pairs = zip(images.split(1), labels.split(1), strict=True)
    single = fisher_scores(prunable(model), groups, [labelled(*pair) for pair in pairs], drawn=False)
    for name, found in whole.items():
        torch.testing.assert_close(found, single[name])
