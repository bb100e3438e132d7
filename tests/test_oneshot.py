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
from slimming.core.layout import FREE
from slimming.core.pruning_plan import Plan
from slimming.errors import ConfigError, DataError, NonFiniteLossError, PlanError
from slimming.masks.attachment import prunable
from slimming.models.layers import UnevenAttention
from slimming.scoring import iterative, redundancy
from slimming.scoring.fisher import fisher_scores
from slimming.scoring.iterative import half_later, iterative_scores
from slimming.scoring.one_shot import OneShot
from slimming.scoring.redundancy import redundancy_scores
from slimming.scoring.registry import SCORES
from slimming.scoring.rotation import rotate_
from slimming.training.batches import Batch

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}


def vit(**more: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**VIT, **more}).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images(count: int = 2, batch: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(count)]


# What scores estimate.


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
    from slimming.runs.setup import ModelConfig, open_model

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


# Turns.


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


def test_a_round_halves_a_group_at_most() -> None:
    """All groups but the first are cheap; each loses half of its units before any loses more."""
    groups, costs = 4, {"0": torch.arange(1.0, 9.0)} | {str(i): torch.arange(1.0, 9.0) / 100 for i in range(1, 4)}
    stays = {name: torch.ones(8, dtype=torch.bool) for name in costs}
    stays["1"][:4] = False
    ranked = {name: half_later(costs[name], stays[name], 10.0) for name in costs}
    cheap = [int((scores < 1).sum()) for scores in ranked.values()]
    assert cheap == [0, 4 + 2, 4, 4], "units of 0 and of the cheap half"
    assert len(ranked) == groups
    assert bool((ranked["1"][:4] == 0).all())
    assert [int(scores.argmax()) for scores in ranked.values()] == [7] * 4


@pytest.mark.parametrize("kind", ["token", "block", "width"])
def test_what_goes_later_costs_no_less(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, asked = vit(), [Batch(batch, torch.full((16,), -1), ()) for batch in images()], []
    groups = [group for group in slimming.describe(model) if group.kind == kind]
    alone = {group.name: torch.rand(group.size, generator=torch.Generator().manual_seed(2)) + 1 for group in groups}

    def cheaper(*_: Any, after: Plan, **__: Any) -> dict[str, Tensor]:
        asked.append(sum(len(units) for units in after.kept.values()))
        return {name: score / 1000 for name, score in alone.items()}

    monkeypatch.setattr(iterative, "fisher_scores", cheaper)
    costs = torch.cat(list(iterative_scores(prunable(model), groups, alone, batches).values()))
    assert asked == sorted(set(asked), reverse=True), "each round takes more"
    gone = len(costs) - asked[0]
    first = costs.sort().values[:gone]
    assert gone > 0
    assert bool((first >= 1).all())
    assert bool((costs.sort().values[gone:] == first.max()).all())


def test_slopes_after_a_plan_are_those_of_the_cut_model() -> None:
    model, batches = vit(), [Batch(batch, torch.full((16,), -1), ()) for batch in images()]
    groups = slimming.describe(model)
    groups = [group for group in groups if group.kind in ("token", "width")]
    scored = OneShot(
        prunable=prunable(model), scores=fisher_scores(prunable(model), groups, batches), how="fisher", images=[]
    )
    plan = slimming.plan(scored, slimming.Budget(keep={"token": 0.5, "width": 0.5}), layout=FREE)
    small = slimming.cut(model, plan)
    found = fisher_scores(prunable(model), groups, batches, after=plan)
    expected = fisher_scores(
        prunable(small), [group for group in slimming.describe(small) if group.kind in ("token", "width")], batches
    )
    for name, units in plan.kept.items():
        if name in expected:
            assert torch.allclose(found[name][list(units)], expected[name], rtol=1e-4), name


# Redundancy.


def hidden(model: Any, importance: Tensor) -> Tensor:
    """What `redundancy_scores` makes of an importance of the first MLP's units."""
    group = prunable(model).anatomy.group("blocks.0.mlp.hidden")
    return redundancy_scores(model, [group], {group.name: importance}, images(4, 32))[group.name]


def test_of_twins_one_costs_nothing() -> None:
    model = vit()
    alone = hidden(model, torch.ones(192))
    with torch.no_grad():
        for name in ("weight", "bias"):
            tensor = model.blocks[0].mlp.fc1.get_parameter(name)
            tensor[3] = tensor[2]
    first, second = sorted(hidden(model, torch.ones(192))[2:4].tolist())
    assert first < 0.2 * alone[2]
    assert 0.8 * alone[2] < second < 1.2 * alone[2]


def test_what_is_constant_or_dead_costs_nothing() -> None:
    model = vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[:2] = 0.0
        model.blocks[0].mlp.fc1.bias[0] = 1.7  # constant: the bias of the next layer can hold it
        model.blocks[0].mlp.fc1.bias[1] = -50.0  # never active
    costs = hidden(model, torch.ones(192))
    assert costs[:2].max() < 0.01 * costs[2:].min()


def test_costs_never_exceed_importance_and_keep_what_is_unread() -> None:
    model = vit()
    groups = [group for group in prunable(model).anatomy.groups if group.role in ("mlp", "v", "head", "qk", "token")]
    importance = {group.name: torch.rand(group.size) + 0.5 for group in groups}
    costs = redundancy_scores(model, groups, importance, images())
    for group in groups:
        if group.role in ("qk", "token"):
            assert torch.equal(costs[group.name], importance[group.name])
        else:
            assert bool((costs[group.name] <= importance[group.name].max() * 1.001).all())
            assert bool((costs[group.name] >= 0).all())
            assert not torch.equal(costs[group.name], importance[group.name])


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_downdates_equal_inverses_made_anew(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares after some units went are those of a layer that never had them."""
    model = vit() if kind == "vit" else timm.create_model("test_resnet", num_classes=5).double().eval()
    role = "head" if kind == "vit" else "channel"
    group = [group for group in prunable(model).anatomy.groups if group.role == role][-1]
    (one, *_) = redundancy._readers(model, group)
    name = one.tensor.rpartition(".")[0]
    statistics = redundancy._covariances(model, [name], images(4, 32))[name]
    layer = redundancy._Layer(statistics, one.index)
    layer.remove(torch.tensor([1, 2]))
    layer.remove(torch.tensor([0]))
    gone = {place for unit in (0, 1, 2) for place in one.index[unit]}
    stays = [place for place in range(len(statistics[1])) if place not in gone]
    anew = redundancy._Layer(
        (statistics[0][stays][:, stays], statistics[1][stays], statistics[2]),
        [[stays.index(place) for place in places] for places in one.index[3:]],
    )
    units = torch.arange(3, group.size)
    torch.testing.assert_close(layer.unpredicted(units), anew.unpredicted(units - 3))
    some = units[-3:]
    torch.testing.assert_close(layer.only(some).unpredicted(some), layer.unpredicted(some))


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    groups = [group for group in prunable(model).anatomy.groups if group.role in ("mlp", "v")]
    importance = {group.name: torch.ones(group.size) for group in groups}
    whole = redundancy_scores(model, groups, importance, images())
    monkeypatch.setattr(redundancy, "GIGABYTES", 1e-9)
    parts = redundancy_scores(model, groups, importance, images())
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


# Bases.


@pytest.mark.parametrize("bias", [True, False])
def test_other_bases_change_no_output(bias: bool) -> None:
    model = vit(qkv_bias=bias)
    other = copy.deepcopy(model)
    rotate_(prunable(other), images())
    assert not torch.allclose(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    for x in images(3):
        torch.testing.assert_close(other(x), model(x), rtol=1e-9, atol=1e-9)


def test_heads_of_several_sizes_are_given_bases() -> None:
    model = vit()
    masks = slimming.attach(model)
    with torch.no_grad():
        for mask in masks.values():
            mask.uniform_(0.5, 1.5)
        for group in masks.of_kind("head_dim"):
            masks[group.name][:5] = 0.01
    small = slimming.cut(model, slimming.plan(masks, slimming.Budget(keep={"head_dim": 0.8}), layout=FREE))
    assert any(isinstance(module, UnevenAttention) for module in small.modules())
    other = copy.deepcopy(small)
    rotate_(prunable(other), images())
    torch.testing.assert_close(other(images()[0]), small(images()[0]), rtol=1e-9, atol=1e-9)


def test_dimensions_are_ordered_by_what_they_add() -> None:
    """Afterwards queries and keys (values and their readers) have one diagonal second moment, which falls."""
    model = vit()
    rotate_(prunable(model), images())
    made: list[Tensor] = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: made.append(output.detach()))
    model(torch.cat(images()))
    q, k, _ = made[0].reshape(-1, 17, 3, 4, 12).unbind(2)
    k = k - k.mean(1, keepdim=True)
    for head in range(4):
        of_q, of_k = (x[:, :, head].reshape(-1, 12) for x in (q, k))
        moments = [x.T @ x / len(x) for x in (of_q, of_k)]
        torch.testing.assert_close(moments[0], moments[1], rtol=1e-5, atol=1e-5)
        diagonal = moments[0].diagonal()
        assert bool((diagonal[1:] <= diagonal[:-1] + 1e-9).all())
        assert float((moments[0] - diagonal.diag()).abs().max()) < 1e-5 * float(diagonal[0])


def test_no_choice_of_dimensions_is_better_than_the_first_ones() -> None:
    """Logits of half of the dimensions: the new basis loses less than any half of the old one that was drawn."""
    model, x = vit(), torch.cat(images())
    rotated = copy.deepcopy(model)
    rotate_(prunable(rotated), images())

    def logits(of: Any, units: list[int]) -> Tensor:
        made: list[Tensor] = []
        handle = of.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: made.append(output.detach()))
        of(x)
        handle.remove()
        q, k, _ = made[0].reshape(len(x), 17, 3, 4, 12).unbind(2)
        found = torch.einsum("bihd,bjhd->bhij", q[..., units], k[..., units])
        return found - found.mean(-1, keepdim=True)

    whole = logits(model, list(range(12)))
    ours = float((logits(rotated, list(range(6))) - whole).square().mean())
    dice = torch.Generator().manual_seed(0)
    for _ in range(20):
        drawn = torch.randperm(12, generator=dice)[:6].tolist()
        assert ours < float((logits(model, drawn) - whole).square().mean())


def test_models_without_such_heads_stay_as_they_are() -> None:
    for name in ("test_resnet", "swin_tiny_patch4_window7_224"):
        arguments = (
            {} if name == "test_resnet" else {"img_size": 32, "window_size": 2, "embed_dim": 12, "depths": (1, 1)}
        )
        model = timm.create_model(name, num_classes=5, **arguments).eval()
        before = copy.deepcopy(model.state_dict())
        anatomy = prunable(model).anatomy
        rotate_(prunable(model), [torch.randn(2, *anatomy.input_shape)])
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# What goes in, and what comes out.


@pytest.mark.parametrize("how", [name for name, score in SCORES.items() if score.one_shot])
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
    whole = fisher_scores(prunable(model), groups, [Batch(images, labels, ())], drawn=False)
    pairs = zip(images.split(1), labels.split(1), strict=True)
    single = fisher_scores(prunable(model), groups, [Batch(image, label, ()) for image, label in pairs], drawn=False)
    for name, found in whole.items():
        torch.testing.assert_close(found, single[name])


def test_heads_are_turned_where_sums_have_single_precision_and_images_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("slimming.scoring.rotation", "slimming.models.activations"):
        monkeypatch.setattr(f"{module}.precise", lambda rows: rows.float())
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=5).eval()
    for images in (torch.randn(1, 3, 32, 32), torch.zeros(2, 3, 32, 32), torch.randn(8, 3, 32, 32)):
        turned = copy.deepcopy(model)
        rotate_(prunable(turned), [images])
        with torch.no_grad():
            torch.testing.assert_close(turned(images), model(images), rtol=1e-4, atol=1e-4)
