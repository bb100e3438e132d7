"""The tables of models that the contract holds for, and plans drawn at random for any of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import slimming
from slimming.core.groups import Anatomy, Group
from slimming.core.pruning_plan import Plan
from slimming.masks.attachment import prunable
from slimming.models.traced import verification

NOTED = pytest.mark.skipif(
    not hasattr(timm.create_model("test_vit"), "_model_args"),
    reason=f"timm {timm.__version__} does not note what a model was made with, as 1.0.31 does",
)
"""For tests of models that timm can only make again with the arguments that its user gave it."""
FOLLOWED = pytest.mark.xfail(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
    reason=f"PyTorch {torch.__version__} does not trace these modules of transformers, which stay whole",
)
"""For models that the oldest PyTorch reads only in part."""
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8, "img_size": 32}


STYLES = (
    "free", "equal", "coupled", "heads", "heads and dimensions", "joint", "token", "mlp", "qk", "v", "qkv", "head",
    "branch", "width",
)  # fmt: skip
"""Ways to cut a ViT of timm."""
TRACED_STYLES = ("free", "joint", "mlp", "qkv", "head", "heads and dimensions", "channel", "width")
"""Ways to cut a model that is read by tracing."""


@dataclass(frozen=True)
class Variant:
    """A ViT of timm, small.

    Attributes:
        stays: styles of plan that find nothing to cut, for want of such groups.
    """

    id: str
    architecture: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    stays: frozenset[str] = frozenset()
    styles = STYLES
    counted = ("free", "equal", "coupled", "heads", "joint", "v", "branch", "width")

    def make(self, seed: int = 0) -> nn.Module:
        """The model in float64 with every parameter and buffer random, in evaluation mode."""
        model = timm.create_model(self.architecture, **{**SMALL, **self.arguments}).double().eval()
        randomise_(model, seed)
        return model

    def output(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the model says of images."""
        return model(x)

    def load(self, path: Path) -> nn.Module:
        """The model that was saved at ``path``."""
        return slimming.load(path)


@dataclass(frozen=True)
class Traced(Variant):
    """A small model of any host that is read by tracing.

    Attributes:
        maker: makes it in the sizes that the test has in mind.
        known: whether its host makes it by name, so that a checkpoint needs no dense model to be loaded.
    """

    architecture: str = ""
    maker: Callable[[], nn.Module] = nn.Module
    known: bool = True
    styles = TRACED_STYLES
    counted = ("free", "joint")

    def make(self, seed: int = 0) -> nn.Module:
        """The model in float64 with every parameter and statistic random, in evaluation mode."""
        model = self.maker().double().eval()
        verification.randomise_(model, seed)
        return model

    def output(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the model says of images, whatever its host wraps that in."""
        return verification.outputs(model, x)[0]

    def load(self, path: Path) -> nn.Module:
        """The model that was saved at ``path``."""
        return slimming.load(path, dense=None if self.known else self.make(seed=9))


NO_WIDTH = frozenset({"width"})
"""Something reads the width without a LayerNorm."""
VARIANTS = (
    Variant("plain", "vit_tiny_patch16_224"),
    Variant("test_vit", "test_vit", {"depth": 3, "patch_size": 16, "img_size": 48}),
    Variant("test_vit2", "test_vit2"),
    Variant("map pooling with register", "test_vit3", stays=NO_WIDTH),
    Variant("rms norm", "test_vit4", stays=NO_WIDTH),
    Variant("deit", "deit_tiny_patch16_224"),
    Variant("deit distilled", "deit_tiny_distilled_patch16_224"),
    Variant("deit3 layer scale", "deit3_small_patch16_224"),
    Variant("registers", "vit_small_patch14_reg4_dinov2", stays=NO_WIDTH),
    Variant("average, no class token", "vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    Variant("average beside class token", "vit_tiny_patch16_224", {"global_pool": "avg"}),
    Variant("average with class token", "vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    Variant("no qkv bias", "vit_tiny_patch16_224", {"qkv_bias": False}),
    Variant("no proj bias", "vit_tiny_patch16_224", {"proj_bias": False}),
    Variant("qk norm", "vit_tiny_patch16_224", {"qk_norm": True}, stays=frozenset({"qk", "qkv"})),
    Variant("drop path", "vit_tiny_patch16_224", {"drop_path_rate": 0.2, "proj_drop_rate": 0.1, "drop_rate": 0.1}),
    Variant("siglip", "vit_base_patch16_siglip_224", stays=NO_WIDTH),
    Variant("swiglu", "vit_giant_patch14_dinov2", stays=NO_WIDTH),
    Variant("clip pre norm", "vit_base_patch16_clip_224"),
    Variant("clip quick gelu", "vit_base_patch16_clip_quickgelu_224"),
    Variant("wide image", "vit_tiny_patch16_224", {"img_size": (16, 40)}),
    Variant("one channel", "vit_tiny_patch16_224", {"in_chans": 1, "num_classes": 7}),
    Variant("four channels", "vit_tiny_patch16_224", {"in_chans": 4, "num_classes": 2}),
    Variant("no classifier", "vit_tiny_patch16_224", {"num_classes": 0}, stays=NO_WIDTH),
    Variant("dynamic size", "vit_tiny_patch16_224", {"dynamic_img_size": True}),
    Variant("norm after residual", "vit_base_patch16_rpn_224", stays=NO_WIDTH),
)


def _of_timm(name: str, size: int = 32) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, pretrained_cfg_overlay={"input_size": (3, size, size)})


def _swin() -> nn.Module:
    sizes = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "img_size": 32, "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes, num_classes=5)


def _vit_of_torchvision() -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 96}
    return torchvision.models.VisionTransformer(**sizes, num_classes=5)


def _squeezenet_of_torchvision() -> nn.Module:
    model: Any = torchvision.models.get_model("squeezenet1_1", num_classes=5)
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    return model


def _vit_of_transformers() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config)


_ATTENTION = frozenset({"head", "qkv", "heads and dimensions"})
_NO_CONVS, _ONLY_CONVS = frozenset({"channel"}), _ATTENTION | {"mlp", "width"}
TRACED = (
    Traced("CNN", maker=_of_timm("test_resnet"), stays=_ONLY_CONVS),
    Traced("ConvNeXt", maker=_of_timm("test_convnext"), stays=_ATTENTION | {"channel"}),
    Traced("MobileViT", maker=_of_timm("mobilevit_xxs", 96)),
    Traced("Swin", maker=_swin, stays=_NO_CONVS),
    Traced("ViT of torchvision", maker=_vit_of_torchvision, stays=_NO_CONVS, known=False),
    Traced("SqueezeNet of torchvision", maker=_squeezenet_of_torchvision, stays=_ONLY_CONVS),
    Traced("ViT of transformers", maker=_vit_of_transformers, stays=_NO_CONVS),
)
"""Models of every host and kind of groups, read by tracing."""


def randomise_(model: nn.Module, seed: int) -> None:
    """Give every parameter and buffer random values of a size that keeps the signal alive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_floating_point():
                continue
            scale = 1.5 / max(tensor[0].numel(), 1) ** 0.5 if tensor.dim() == 2 else 0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * scale)


def image(model: nn.Module, batch: int = 2, seed: int = 1) -> Tensor:
    """Random images of the size that the model takes, shape (batch, channels, height, width)."""
    shape = (batch, *prunable(model).anatomy.input_shape)
    dtype = next(model.parameters()).dtype
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest value."""
    assert one.shape == other.shape
    assert bool(torch.isfinite(other).all())
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / other.abs().max())


def roles_of(style: str) -> set[str]:
    """The roles of the groups that a style of plan cuts."""
    return {
        "free": {"qk", "v", "mlp", "token", "channel"},
        "equal": {"qk", "v", "mlp", "token"},
        "coupled": {"qkv", "mlp"},
        "heads": {"head", "mlp"},
        "heads and dimensions": {"head", "qk", "v", "token"},
        "joint": {"qk", "v", "mlp", "token", "branch", "width", "channel"},
    }.get(style, {style})


def draw(anatomy: Anatomy, style: str, seed: int = 0) -> tuple[list[Group], Plan]:
    """The groups that ``style`` cuts and a random plan for them."""
    dice = random.Random(seed)
    groups = [group for group in anatomy.groups if group.role in roles_of(style)]
    sites: dict[str, list[Group]] = {}
    for group in groups:
        sites.setdefault(group.site, []).append(group)
    kept: dict[str, Sequence[int]] = {}
    for members in sites.values():
        if any(group.limits.equal for group in members):
            kept |= _equal_heads(members, dice)
        elif style == "equal" and members[0].limits.parts:
            count = dice.randrange(1, members[0].limits.parts[0])
            kept |= {group.name: _per_head(group, [count] * len(group.limits.parts), dice) for group in members}
        else:
            kept |= _any_units(members, dice)
    return groups, Plan(
        kept={name: tuple(sorted(units)) for name, units in kept.items()},
        sizes={group.name: group.size for group in groups},
    )


def _equal_heads(members: list[Group], dice: random.Random) -> dict[str, Sequence[int]]:
    """As many units in every head as the model's attention module holds; other groups of the module as they come."""
    tied = any(group.limits.same_as for group in members)
    kept: dict[str, Sequence[int]] = {}
    count = dice.randrange(1, min(size for group in members for size in group.limits.parts))
    for group in members:
        if not group.limits.parts:
            kept |= _any_units([group], dice)
            continue
        if not tied:
            count = dice.randrange(1, group.limits.parts[0])
        kept[group.name] = _per_head(group, [count] * len(group.limits.parts), dice)
    return kept


def _any_units(members: list[Group], dice: random.Random) -> dict[str, Sequence[int]]:
    kept: dict[str, Sequence[int]] = {}
    for group in members:
        parts = group.limits.parts
        if group.role == "branch":
            # The first block keeps its MLP, the second one its attention, so that something reads every token.
            kept[group.name] = (0,) if group.name in ("blocks.0.mlp.branch", "blocks.1.attn.branch") else ()
            continue
        if not parts:
            # The first unit stays everywhere: positions must have one that no block loses.
            others = dice.randrange(group.size // 2 - 1, group.size - 1)
            kept[group.name] = [0, *dice.sample(range(1, group.size), others)]
            continue
        least = 1 if group.role == "qk" else 0
        sizes = [dice.randrange(least, size + 1) for size in parts]
        if group.role != "qk":
            # One head goes whole, and the first stays: there `head` keeps its first unit, too.
            sizes[0], sizes[-1] = parts[0], 0 if len(parts) > 1 else parts[-1]
        kept[group.name] = _per_head(group, sizes, dice)
    return kept


def _per_head(group: Group, sizes: Sequence[int], dice: random.Random) -> list[int]:
    starts = [sum(group.limits.parts[:head]) for head in range(len(group.limits.parts))]
    heads = zip(starts, group.limits.parts, sizes, strict=True)
    return [unit for start, size, count in heads for unit in dice.sample(range(start, start + size), count)]
