"""Units behind norms over all units, in groups of a norm, and behind standardised weights: each goes the whole way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers.evo_norm import EvoNorm2dB0, EvoNorm2dS0
from timm.layers.mlp import GatedMlp, SwiGLU
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
from timm.models.mlp_mixer import MlpMixer, SpatialGatingBlock
from torch import Tensor, nn

import slimming
from slimming.core.groups import Group, Slices
from slimming.core.layout import FREE
from slimming.models.masked_norms import MaskedNorm, mask_norms
from slimming.models.traced.normalisers import Normaliser, norm_layers
from slimming.models.traced.verification import randomise_
from slimming.pruning.checks import EXACT, distance

transformers = pytest.importorskip("transformers")


class ResponseNorm(nn.Module):
    """A global response normalisation as a user writes it, over channels in front."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        spread = x.norm(p=2, dim=(2, 3), keepdim=True)
        return self.gamma * (x * spread / (spread.mean(1, keepdim=True) + 1e-6)) + self.beta + x


class Convolutions(nn.Module):
    """Two layers with a norm between them, and a residual block."""

    image_size = 16

    def __init__(self, norm: Callable[[int], nn.Module], conv: Any = nn.Conv2d) -> None:
        super().__init__()
        self.stem = conv(3, 24, 3, padding=1)
        first, second = conv(24, 16, 3, padding=1), conv(16, 24, 3, padding=1)
        self.block = nn.Sequential(norm(24), nn.ReLU(), first, norm(16), nn.ReLU(), second)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((x + self.block(x)).mean((2, 3)))


class NormedMlp(nn.Module):
    """An MLP with two first layers and a norm over its hidden units."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 12, 4, stride=4), nn.Linear(12, 5)
        self.mlp = SwiGLU(12, 20, norm_layer=nn.LayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.mlp(x)).mean(1))


def convnext_v2_of_transformers() -> nn.Module:
    sizes = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "image_size": 32}
    return transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**sizes))


def gmlp() -> nn.Module:
    return MlpMixer(
        num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=16, mlp_ratio=4,
        mlp_layer=GatedMlp, block_layer=SpatialGatingBlock,
    )  # fmt: skip


def mamba_out() -> nn.Module:
    return timm.create_model("mambaout_femto", depths=(1, 1), dims=(8, 12), num_classes=5)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, list[int]]]] = {
    "ConvNeXt V2": (
        lambda: timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=5),
        {"mlp": [32, 48, 64, 80], "width": [8, 12, 16, 20]},
    ),
    "ConvNeXt V2 of transformers": (convnext_v2_of_transformers, {"mlp": [32, 48], "width": [8, 12]}),
    "response norm of one's own": (lambda: Convolutions(ResponseNorm), {"channel": [16], "width": [24]}),
    "GroupNorm": (lambda: Convolutions(lambda channels: nn.GroupNorm(8, channels)), {"channel": [8, 8]}),
    "GroupNorm over all channels": (
        lambda: Convolutions(lambda channels: nn.GroupNorm(1, channels)),
        {"channel": [16], "width": [24]},
    ),
    "GroupNorm of each channel": (
        lambda: Convolutions(lambda channels: nn.GroupNorm(channels, channels)),
        {"channel": [24, 16]},
    ),
    "EvoNorm S0": (
        lambda: Convolutions(lambda channels: EvoNorm2dS0(channels, groups=4)),
        {"channel": [4, 4]},
    ),
    "EvoNorm B0": (lambda: Convolutions(EvoNorm2dB0), {"channel": [24, 16]}),
    "BiT": (
        lambda: Convolutions(lambda channels: nn.GroupNorm(8, channels), StdConv2d),
        {"channel": [8, 8]},
    ),
    "NF-ResNet": (lambda: Convolutions(lambda _: nn.Identity(), ScaledStdConv2d), {"channel": [24, 16]}),
    "MLP with a gate and a norm": (NormedMlp, {"mlp": [20], "channel": [12]}),
    "gMLP": (gmlp, {"mlp": [32, 32], "width": [16]}),
    "MambaOut": (mamba_out, {"mlp": [8, 13, 12, 20, 48], "channel": [4]}),
}
"""By name: how it is made, and the sizes of its groups."""
models = pytest.mark.parametrize("name", MODELS, ids=str)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    if not hasattr(model, "image_size"):
        model.image_size = 32  # pyright: ignore
    return model


@models
def test_units_are_found_and_go_exactly(name: str) -> None:
    model = make(name)
    sizes: dict[str, list[int]] = {}
    for group in slimming.describe(model):
        if group.kind in ("block", "token"):
            continue
        sizes.setdefault(group.kind, []).append(group.size)
    assert sizes == MODELS[name][1]
    found = slimming.check(model)
    assert found.ok, found


@torch.no_grad()
@pytest.mark.parametrize("name", ["ConvNeXt V2", "BiT", "gMLP"], ids=str)
def test_compensation_sees_the_statistics_of_what_stays(name: str) -> None:
    model = make(name).double()
    randomise_(model)
    groups = [group for group in slimming.describe(model) if group.kind in ("channel", "mlp")]
    keep = {group.kind: 0.7 for group in groups}
    size = 64 if name == "ConvNeXt V2" else getattr(model, "image_size", 32)
    images = [torch.randn(16, 3, size, size, dtype=torch.float64) for _ in range(4)]
    masks = slimming.attach(make(name).double(), groups)
    plan = slimming.plan(masks, slimming.Budget(keep=keep), layout=FREE)
    expected = torch.cat([model(x) for x in images])
    plain, refitted = slimming.cut(model, plan), slimming.cut(model, plan, images=images)
    errors = [float((torch.cat([each(x) for x in images]) - expected).norm()) for each in (plain, refitted)]
    if name == "BiT":  # what reads these channels standardises its weights, and is not refitted
        assert errors[1] == errors[0]
    else:
        assert errors[1] < 0.9 * errors[0]


@torch.no_grad()
def test_two_groups_mask_one_norm() -> None:
    norm = nn.LayerNorm(6)
    randomise_(norm)
    holder = nn.ModuleDict({"norm": norm})
    first, second = ((0, 1, 2), (3, 4, 5))
    undo: list[Callable[[], None]] = []
    for name, indices, kept in (("a", first, (0, 2)), ("b", second, (1, 2))):
        slices = tuple(
            Slices(tensor=f"norm.{t}", dim=0, index=tuple((i,) for i in indices), side="produces")
            for t in ("weight", "bias")
        )
        group = Group(name=name, kind="width", size=3, site="norm", role="width", slices=slices, norms=("norm",))
        undo += mask_norms(holder, group, kept)
    x = torch.randn(2, 6)
    chosen = torch.tensor([0, 2, 4, 5])
    wanted = torch.zeros(2, 6)
    wanted[:, chosen] = nn.functional.layer_norm(x[:, chosen], (4,), norm.weight[chosen], norm.bias[chosen])
    assert distance([wanted], [norm(x)]) < 1e-6
    for remove in undo:
        remove()
    assert not any(isinstance(hook, MaskedNorm) for hook in norm._forward_hooks.values())


class Reversed(nn.Module):
    """Multiplies by the channels in the opposite order, which fewer channels would not do in the same way."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + x.flip(1)


@pytest.mark.parametrize(
    ("module", "block"),
    [
        (nn.GroupNorm(2, 8), 4),
        (nn.GroupNorm(1, 8), 8),
        (ResponseNorm(8), 8),
        (nn.RMSNorm(8), 8),
        (Reversed(8), None),
        (nn.Linear(8, 8), None),
    ],
    ids=["groups", "all", "response norm", "RMSNorm", "reversed", "Linear"],
)
def test_normalisers_are_known_by_what_they_compute(module: nn.Module, block: int | None) -> None:
    holder = nn.Sequential(module).double()
    randomise_(holder)
    found: Normaliser | None = norm_layers(holder).normalisers.get("0")
    assert (None if found is None else found.block) == block


def test_an_exact_cut_of_a_standardised_layer_is_not_one_with_zeros() -> None:
    """Columns of zeros take part in the statistics, so that masks have to take the layer as it is after the cut."""
    model = make("NF-ResNet").double()
    randomise_(model)
    group = next(group for group in slimming.describe(model) if group.size == 16)
    assert group.norms == ("block.5",)
    masks = slimming.attach(model, [group])
    plan = slimming.plan(masks, slimming.Budget(keep={"channel": 0.5}), layout=FREE)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    masks.apply_(plan)
    with torch.no_grad():
        small = slimming.cut(model, plan)
        assert distance([model(x)], [small(x)]) < EXACT
