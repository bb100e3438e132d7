"""The search as a whole: it trains masks, survives kills, means the same in several processes."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import slimming
from slimming.errors import ConfigError, DataError
from slimming.masks.soft_masks import attached
from slimming.searching.mask_search import SearchResult, load_search
from slimming.training.images import ImageSpec
from slimming.training.samples import Data, ImageDataset

JOB = Path(__file__).resolve().parents[1] / "search_job.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise around two colours, as class folders."""
    root = tmp_path_factory.mktemp("images")
    draw = random.Random(0)
    for part, count in (("train", 24), ("val", 8)):
        for label, colour in (("blue", (30, 30, 200)), ("red", (200, 30, 30))):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = bytes(min(255, max(0, c + draw.randint(-30, 30))) for _ in range(32 * 32) for c in colour)
                buffer = io.BytesIO()
                Image.frombytes("RGB", (32, 32), pixels).save(buffer, format="PNG")
                (root / part / label / f"{number}.png").write_bytes(buffer.getvalue())
    return root


def start(folder: Path, out: Path, *flags: str, processes: int = 1) -> list[str]:
    """The command that runs the job."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    return [sys.executable, *launcher, str(JOB), str(folder), str(out), *flags]


def finish(folder: Path, out: Path, *flags: str, processes: int = 1) -> dict[str, Any]:
    """Run the job to its end and read what its plans keep, and its sensitivity."""
    command = start(folder, out, *flags, processes=processes)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / "plans.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    finish(folder, out)
    return out


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_bits(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(start(folder, tmp_path), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "state.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "plans.json").exists()
    finish(folder, tmp_path, "--resume")
    for name in ("weights", "masks", "scores"):
        ours, theirs = load_file(tmp_path / f"{name}.safetensors"), load_file(undisturbed / f"{name}.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_two_processes_make_the_plan_of_one(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    ours, theirs = finish(folder, tmp_path, processes=2), json.loads((undisturbed / "plans.json").read_text())
    assert ours["kept"] == theirs["kept"]
    assert ours["sensitivity"].keys() == theirs["sensitivity"].keys()
    for kind, curve in ours["sensitivity"].items():
        for (kept, loss), (same, other) in zip(curve, theirs["sensitivity"][kind], strict=True):
            assert kept == same
            assert loss == pytest.approx(other, rel=0.02, abs=1e-6)


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_vit", img_size=32, num_classes=2)


def config(preset: str = "default", **training: Any) -> slimming.SearchConfig:
    base = slimming.preset(preset)
    scale = {"epochs": 1, "steps": 3, "batch_size": 8, "mixup": 0.0, "cutmix": 0.0, "eval_every": 0}
    return dataclasses.replace(base, train=dataclasses.replace(base.train, **{**scale, **training}))


@pytest.fixture(scope="module")
def data(folder: Path) -> Data:
    return slimming.open_data(slimming.DataConfig(source=str(folder), augment="none"), make())


@pytest.mark.parametrize(
    ("preset", "training"),
    [
        ("default", {}),
        ("default", {"precision": "bf16"}),
        ("default", {"accumulate": 2, "clip_grad": 0.5}),
        ("default", {"ema": 0.5}),
        ("paper", {}),
    ],
    ids=str,
)
def test_trains_weights_and_masks_and_serves_budgets(data: Data, preset: str, training: dict[str, Any]) -> None:
    model = make()
    before = model.blocks[0].mlp.fc1.weight.detach().clone()
    result = slimming.search(model, data, config(preset, lr=1e-2, **training))
    assert all(mask.dtype == torch.float32 for mask in result.masks.values())
    start_value = 3.0 if preset == "paper" else 1.0
    token = next(mask for name, mask in result.masks.items() if name.endswith("tokens"))
    assert not torch.equal(token, torch.full_like(token, start_value))
    assert not torch.equal(result.model.blocks[0].mlp.fc1.weight, before)
    keep = {"head_dim": 0.6, "mlp": 0.6, "token": 0.6}
    budget = slimming.Budget(keep=keep) if preset == "paper" else slimming.Budget(macs=0.5)
    plan = slimming.plan(result, budget)
    assert plan.fold == (preset != "paper")
    small = slimming.cut(result.model, plan)
    assert slimming.cost(small).macs < 0.75 * slimming.cost(result.model).macs
    assert small(torch.zeros(2, 3, 32, 32)).shape == (2, 2)


def test_masks_have_no_weight_decay_and_their_own_rate(data: Data) -> None:
    result = slimming.search(make(), data, dataclasses.replace(config(lr=1e-9, weight_decay=0.5), mask_lr=1e7))
    moved = max(float((mask.detach() - 1).abs().max()) for mask in result.masks.values())
    assert 0.005 < moved < 0.1


def test_saved_and_loaded_gives_the_same_model_and_plan(data: Data, tmp_path: Path) -> None:
    result = slimming.search(make(), data, config(lr=1e-2))
    result.save(tmp_path)
    again = slimming.load_search(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(result.model(x), again.model(x))
    budget = slimming.Budget(params=0.6)
    assert slimming.plan(again, budget) == slimming.plan(result, budget)
    assert slimming.plan(tmp_path / "scores.safetensors", budget) == slimming.plan(result, budget)
    assert again.config == result.config
    spoilt = dataclasses.replace(result, metrics={"top1": float("nan")})
    with pytest.raises(ConfigError, match=r"metrics\.top1 is nan"):
        spoilt.save(tmp_path / "spoilt")
    assert not (tmp_path / "spoilt").exists()


def test_a_kind_that_the_model_does_not_have_is_named(data: Data) -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=2, class_token=False, global_pool="max")
    with pytest.raises(ConfigError, match="token"):
        slimming.search(model, data, dataclasses.replace(config(), kinds=("mlp", "token")))
    assert not hasattr(model, "slimming_masks")


def test_mean_and_std_of_the_data_take_the_place_of_the_models_own(folder: Path) -> None:
    config = slimming.DataConfig(source=str(folder), augment="none", mean=(0.0, 0.0, 0.0), std=(0.5, 0.5, 0.5))
    plain = dataclasses.replace(config, mean=None, std=None)
    theirs, own = slimming.open_data(config, make()).val, slimming.open_data(plain, make()).val
    assert isinstance(theirs, ImageDataset)
    assert isinstance(own, ImageDataset)
    spec = ImageSpec.of_model(make())
    pixels = own.sample(0, 0).image * torch.tensor(spec.std)[:, None, None] + torch.tensor(spec.mean)[:, None, None]
    assert torch.allclose(theirs.sample(0, 0).image, pixels / 0.5, atol=1e-5)
    grey = timm.create_model("test_vit", img_size=32, in_chans=1, num_classes=2)
    dataset = slimming.open_data(plain, grey).val
    assert isinstance(dataset, ImageDataset)
    assert dataset.sample(0, 0).image.shape == (1, 32, 32)
    with pytest.raises(DataError, match=r"data\.mean has 2 numbers, the model's images have 3 channels"):
        slimming.open_data(dataclasses.replace(config, mean=(0.5, 0.5)), make())
    with pytest.raises(ConfigError, match="std is"):
        slimming.DataConfig(source=str(folder), std=(0.5, 0.0, 0.5))


# Scores of the trained model.


def test_units_are_scored_anew_after_the_training(data: Data) -> None:
    """As `slimming.score` does it for the model with its factors in its weights."""
    result = slimming.search(make(), data, config())
    folded = copy.deepcopy(result.model)
    masks = attached(folded)
    assert masks is not None
    masks.fold_()
    masks.detach_()
    images = slimming.calibration_images(data, result.config.images)
    expected = slimming.score(folded, images, rotate=False)
    assert result.scores.keys() == expected.scores.keys()
    for name, score in result.scores.items():
        torch.testing.assert_close(score, expected.scores[name], rtol=1e-3, atol=1e-7)
    alone = slimming.search(make(), data, dataclasses.replace(config(), score="fisher"))
    made_up_for = [group.name for group in result.masks.groups if group.kind in ("head_dim", "mlp")]
    assert all(bool((alone.scores[name] >= result.scores[name] - 1e-7).all()) for name in made_up_for)
    assert any(bool((alone.scores[name] > 1.01 * score).any()) for name, score in result.scores.items())


def test_a_search_gives_heads_other_bases_first(data: Data) -> None:
    model = make()
    still = dataclasses.replace(config(), train=dataclasses.replace(config().train, lr=1e-12))
    result = slimming.search(copy.deepcopy(model), data, still)
    as_they_are = slimming.search(copy.deepcopy(model), data, dataclasses.replace(still, rotate=False))
    (x, *_) = slimming.calibration_images(data, 8)
    expected = model.eval()(x)
    name = "blocks.0.attn.qkv.weight"
    before = model.state_dict()[name]
    for searched, moved in ((result, True), (as_they_are, False)):
        torch.testing.assert_close(searched.model.eval()(x), expected, rtol=1e-3, atol=1e-3)
        weights = searched.masks.weights()[name]
        assert bool((weights - before).norm() > 0.1 * before.norm()) == moved
    coupled = slimming.search(copy.deepcopy(model), data, dataclasses.replace(still, coupled=True))
    assert slimming.plan(coupled, slimming.Budget(macs=0.5)).kept


def test_a_loss_of_ones_own_scores_by_its_own_derivatives(data: Data) -> None:
    def own(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0]).square().mean()

    result = slimming.search(make(), data, dataclasses.replace(config(), score="fisher"), loss=own)
    collected = result.masks.scores("taylor")
    for name, score in result.scores.items():
        torch.testing.assert_close(score, collected[name].square() / 2)
    less = slimming.search(make(), data, config(), loss=own)
    assert any(bool((less.scores[name] < 0.99 * score).any()) for name, score in result.scores.items())


def test_settings_of_scores_are_checked() -> None:
    with pytest.raises(ConfigError, match="compensated"):
        slimming.SearchConfig(score="compensate")
    with pytest.raises(ConfigError, match="at least 1"):
        slimming.SearchConfig(images=0)
    assert not slimming.preset("paper").rotate
    assert slimming.preset("paper").score == "mask"


def test_a_search_of_a_model_that_asks_for_versions_is_read_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.mnasnet0_5(num_classes=3).eval()
    masks = slimming.attach(model, [group for group in slimming.describe(model) if group.kind == "channel"][:1])
    result = SearchResult(model=model, masks=masks, scores=masks.scores("mask"), config=slimming.preset("default"))
    result.save(tmp_path / "search")
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load_search(tmp_path / "search").model(image), model(image))
