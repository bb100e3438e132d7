"""What `slimming.check` promises: it passes models that work, and fails those whose reading is wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

import slimming
from slimming.core.groups import Group
from slimming.errors import ConfigError, UnsupportedModelError
from slimming.masks.attachment import prunable
from slimming.models.traced import channels
from slimming.pruning.checks import covered, distance


def small(name: str, **arguments: Any) -> nn.Module:
    overlay = {"input_size": (3, 64, 64)}
    return timm.create_model(name, num_classes=10, pretrained_cfg_overlay=overlay, **arguments)


MODELS = ["test_vit", "test_resnet", "test_efficientnet", "test_convnext", "vit_tiny_r_s16_p8_224"]


@pytest.mark.parametrize("name", MODELS, ids=str)
def test_models_that_work_pass(name: str) -> None:
    model = small(name, **({"img_size": 64, "depth": 6} if "_r_" in name else {}))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = slimming.check(model)
    assert found.ok, str(found)
    assert [step.name for step in found.steps] == [
        "masked equals cut, forward and backward",
        "costs by formula are the counted ones",
        "saves and loads",
    ]
    assert 0.3 < found.covered_macs <= 1
    assert 0.3 < found.covered_params <= 1
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_pwee_patch16_reg1_gap_256", {}),
        ("vit_pwee_patch16_reg1_gap_256", {"qkv_bias": True}),
        ("vit_pwee_patch16_reg1_gap_256", {"block_fn": partial(ParallelScalingBlock, fuse_out_proj=True)}),
        ("vit_dpwee_patch16_reg1_gap_256", {}),
    ],
    ids=["parallel", "with a bias", "one output", "differential"],
)
def test_blocks_with_attention_and_mlp_from_one_projection(name: str, arguments: dict[str, Any]) -> None:
    model = small(name, depth=2, img_size=64, embed_dim=48, num_heads=3, **arguments)
    found = slimming.check(model)
    assert found.ok, str(found)
    sizes = {"branch": 1, "heads": 3, "hidden": 240, "tokens": 16}
    if name.startswith("vit_pwee"):  # in differential attention, two heads of queries and keys share one of values
        sizes |= {"qk": 48, "v": 48}
    assert {group.name: group.size for group in slimming.describe(model)} == {
        f"blocks.{depth}.{part}": size for depth in range(2) for part, size in sizes.items()
    }
    assert found.covered_macs > 0.6


def test_a_wrong_reading_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = channels.group_from

    def shifted(found: Any, model: nn.Module) -> Any:
        """Every group reads its units one place too far."""
        group = real(found, model)
        if not isinstance(group, Group):
            return group
        slices = tuple(
            replace(one, index=one.index[1:] + one.index[:1]) if one.side == "consumes" else one for one in group.slices
        )
        return replace(group, slices=slices)

    monkeypatch.setattr(channels, "group_from", shifted)
    model = small("test_resnet", stem_width=24)  # a size of its own, so that no earlier reading is remembered
    with pytest.raises(slimming.errors.UnsupportedModelError, match="cut and masked differ"):
        slimming.describe(model)


class Mixed(nn.Module):
    """Two convolutions with a mean over channels in between, which no unit survives unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = 16
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.second(x / (1 + x.mean(1, keepdim=True))).relu()
        return self.head(self.third(x).relu().mean((2, 3)))


def test_channels_that_something_else_reads_stay() -> None:
    groups = {group.site for group in slimming.describe(Mixed())}
    assert groups == {"second", "third"}
    (reason,) = [
        one for one in slimming.masks.attachment.prunable(Mixed()).anatomy.uncovered if one.startswith("first")
    ]
    assert "something else reads these units" in reason
    found = slimming.check(Mixed())
    assert [step.held for step in found.steps] == [True, True, True], str(found)


def test_a_model_that_does_not_pass_says_where() -> None:
    found = slimming.check(nn.Linear(3, 4))
    assert not found.ok
    assert "does not take one image" in str(found)
    assert (found.covered_params, found.covered_macs) == (0, 0)
    assert str(found).startswith("no groups; covers 0% of MACs, 0% of params\n")


def test_joins_that_torch_pruning_cannot_follow_are_passed_over() -> None:
    groups = slimming.describe(small("cs3darknet_s").eval())
    assert len(groups) >= 15
    assert {group.kind for group in groups} == {"channel", "block"}


def test_a_model_without_values_is_named_not_read() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    with pytest.raises(slimming.errors.UnsupportedModelError, match="make it on the CPU"):
        slimming.describe(model)


def test_what_stays_is_named_where_attention_has_no_heads() -> None:
    from timm.models.focalnet import FocalNet

    model = FocalNet(depths=(1, 1), embed_dim=16, num_classes=10)
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    found = slimming.check(model)
    assert found.ok, str(found)
    assert {group.kind for group in slimming.describe(model)} == {"mlp", "block"}
    assert "layers.0.blocks.0.modulation heads: focal modulation has no heads" in str(found)


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = (nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16))
        self.c3.weight = self.c2.weight
        self.fc = nn.Linear(16, 4)
        self.input_size = (3, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c3(self.c2(self.c1(x).relu()).relu()).mean((2, 3)))


def test_shared_weights_are_cut_together_and_stay_shared(tmp_path: Path) -> None:
    found = slimming.check(Tied())
    assert found.ok, str(found)
    (group,) = slimming.describe(Tied())
    assert (group.kind, group.size) == ("channel", 16)

    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=3, depth=3).eval()
    model.__dict__.pop("_model_args", None)  # what timm notes of a model from 1.0.31 on, and no loading needs
    model.blocks[1].mlp.fc2.weight = model.blocks[0].mlp.fc2.weight
    tied = ("blocks.0.mlp.fc2.weight", "blocks.1.mlp.fc2.weight")
    assert not any(one.tensor in tied for group in slimming.describe(model) for one in group.slices)
    masks = slimming.attach(model)
    plan = slimming.plan(masks, slimming.Budget(macs=0.8))
    small = slimming.cut(model, plan)
    masks.apply_(plan)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(small(image), model(image), rtol=1e-4, atol=1e-4)
    first, second, _ = (block.mlp for block in small.blocks if hasattr(block, "mlp"))
    assert second.fc2.weight is first.fc2.weight

    slimming.save(small, tmp_path / "slim")
    with torch.no_grad():
        torch.testing.assert_close(slimming.load(tmp_path / "slim")(image), small(image))


def test_wrappers_are_named() -> None:
    model = timm.create_model("test_vit", img_size=32)
    with pytest.raises(UnsupportedModelError, match="DataParallel around a model: give its attribute module"):
        slimming.describe(nn.DataParallel(model))
    with pytest.raises(UnsupportedModelError, match="OptimizedModule around a model: give its attribute _orig_mod"):
        slimming.describe(torch.compile(model))
    with pytest.raises(ConfigError, match=r"(?s)source is VisionTransformer.*it must be a HasScores"):
        slimming.plan(model, slimming.Budget(macs=0.5))  # pyright: ignore


def test_outputs_of_other_shapes_are_infinitely_far() -> None:
    one, other = torch.ones(2, 3), torch.ones(2, 4)
    assert distance([one], [other]) == float("inf")
    assert distance([one, one], [one, other]) == float("inf")
    assert distance([], []) == float("inf")
    assert distance([2 * one], [one]) == 0.5
    assert distance([one, one], [one, 1.25 * one]) == 0.25


def test_outputs_are_compared_with_as_many() -> None:
    one = torch.ones(2, 3)
    with pytest.raises(ValueError, match="shorter"):
        distance([one, one], [one])


def test_what_can_be_removed_is_a_share() -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=5, depth=1)
    params, macs = covered(prunable(model).anatomy)
    assert 0.5 < params <= 1
    assert 0.5 < macs <= 1
