"""The table of models that the contract holds for, and plans drawn at random for any of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from slimming.core.groups import Anatomy, Group
from slimming.core.pruning_plan import Plan

NOTED = pytest.mark.skipif(
    not hasattr(timm.create_model("test_vit"), "_model_args"),
    reason=f"timm {timm.__version__} does not note what a model was made with, as 1.0.31 does",
)
"""For tests of models that timm can only make again with the arguments that its user gave it."""
READS_SAFELY = pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 26),
    reason=f"timm {timm.__version__} opens what is in a directory as a pickle",
)
"""For tests of directories that timm itself is to load."""
SCALES_AS_ASKED = pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 24),
    reason=f"timm {timm.__version__} scales images bilinearly for inputs that are not square",
)
FOLLOWED = pytest.mark.xfail(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
    reason=f"PyTorch {torch.__version__} does not trace these modules of transformers, which stay whole",
)
"""For models that the oldest PyTorch reads only in part."""
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8, "img_size": 32}


@dataclass(frozen=True)
class Variant:
    """A timm model, small."""

    id: str
    architecture: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def make(self, seed: int = 0) -> nn.Module:
        """The model in float64 with every parameter and buffer random, in evaluation mode."""
        model = timm.create_model(self.architecture, **{**SMALL, **self.arguments}).double().eval()
        randomise_(model, seed)
        return model


VARIANTS = (
    Variant("plain", "vit_tiny_patch16_224"),
    Variant("test_vit", "test_vit", {"depth": 3, "patch_size": 16, "img_size": 48}),
    Variant("test_vit2", "test_vit2"),
    Variant("map pooling with register", "test_vit3"),
    Variant("rms norm", "test_vit4"),
    Variant("deit", "deit_tiny_patch16_224"),
    Variant("deit distilled", "deit_tiny_distilled_patch16_224"),
    Variant("deit3 layer scale", "deit3_small_patch16_224"),
    Variant("registers", "vit_small_patch14_reg4_dinov2"),
    Variant("average, no class token", "vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    Variant("average beside class token", "vit_tiny_patch16_224", {"global_pool": "avg"}),
    Variant("average with class token", "vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    Variant("no qkv bias", "vit_tiny_patch16_224", {"qkv_bias": False}),
    Variant("no proj bias", "vit_tiny_patch16_224", {"proj_bias": False}),
    Variant("qk norm", "vit_tiny_patch16_224", {"qk_norm": True}),
    Variant("drop path", "vit_tiny_patch16_224", {"drop_path_rate": 0.2, "proj_drop_rate": 0.1, "drop_rate": 0.1}),
    Variant("siglip", "vit_base_patch16_siglip_224"),
    Variant("swiglu", "vit_giant_patch14_dinov2"),
    Variant("clip pre norm", "vit_base_patch16_clip_224"),
    Variant("clip quick gelu", "vit_base_patch16_clip_quickgelu_224"),
    Variant("wide image", "vit_tiny_patch16_224", {"img_size": (16, 40)}),
    Variant("one channel", "vit_tiny_patch16_224", {"in_chans": 1, "num_classes": 7}),
    Variant("four channels", "vit_tiny_patch16_224", {"in_chans": 4, "num_classes": 2}),
    Variant("no classifier", "vit_tiny_patch16_224", {"num_classes": 0}),
    Variant("dynamic size", "vit_tiny_patch16_224", {"dynamic_img_size": True}),
    Variant("norm after residual", "vit_base_patch16_rpn_224"),
)


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
    shape = (batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
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
        "free": {"qk", "v", "mlp", "token"},
        "equal": {"qk", "v", "mlp", "token"},
        "coupled": {"qkv", "mlp"},
        "heads": {"head", "mlp"},
        "heads and dimensions": {"head", "qk", "v", "token"},
        "joint": {"qk", "v", "mlp", "token", "branch", "width"},
    }.get(style, {style})


STYLES = (
    "free", "equal", "coupled", "heads", "heads and dimensions", "joint", "token", "mlp", "qk", "v", "qkv", "head",
    "branch", "width",
)  # fmt: skip


def draw(anatomy: Anatomy, style: str, seed: int = 0) -> tuple[list[Group], Plan]:
    """The groups that ``style`` cuts and a random plan for them."""
    dice = random.Random(seed)
    groups = [group for group in anatomy.groups if group.role in roles_of(style)]
    sites: dict[str, list[Group]] = {}
    for group in groups:
        sites.setdefault(group.site, []).append(group)
    kept: dict[str, Sequence[int]] = {}
    for members in sites.values():
        if style == "equal" and members[0].limits.parts:
            count = dice.randrange(1, members[0].limits.parts[0])
            kept |= {group.name: _per_head(group, [count] * len(group.limits.parts), dice) for group in members}
        else:
            kept |= _any_units(members, dice)
    return groups, Plan(
        kept={name: tuple(sorted(units)) for name, units in kept.items()},
        sizes={group.name: group.size for group in groups},
    )


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
