"""Find the architecture and arguments from which timm builds a dense Vision Transformer, and build it from them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import nn

from slimming.errors import CheckpointError, UnsupportedModelError
from slimming.models.allowed import check_timm, image_settings_of
from slimming.models.family import difference
from slimming.models.hosts import classes_of, give_image_settings_, image_settings, unplain
from slimming.models.replaced_layers import Blueprint, replaced_layers

CLASSES = {cls.__name__: cls for cls in (VisionTransformer, VisionTransformerDistilled)}
UNNAMED = "vit_tiny_patch16_224"
UNFILLED = {"weight_init": "skip"}
"""Argument that skips the initialisation, which takes most of timm's time and has no effect on the meta device."""


def find_base(vit: VisionTransformer) -> dict[str, Any]:
    """The base of ``vit``: class, architecture, arguments that differ from its defaults, and image settings.

    Raises:
        UnsupportedModelError: timm builds other modules from this base.
    """
    config = getattr(vit, "pretrained_cfg", None) or {}
    name = config.get("architecture")
    if name is not None and config.get("tag"):
        name = f"{name}.{config['tag']}"
    base: dict[str, Any] = {"class": type(vit).__name__, "architecture": name, "arguments": {}}
    base["config"] = image_settings(vit)
    defaults, arguments = _defaults(type(vit).__name__, name), _arguments(vit)
    base["arguments"] = {key: value for key, value in arguments.items() if value != defaults[key]}
    reason = difference(vit, build(base))
    if reason is not None and not _replaced_only(vit, base):
        raise UnsupportedModelError(
            f"timm cannot make this {type(vit).__name__} again: {reason}. Slimming needs a model made by "
            "timm.create_model, or a VisionTransformer whose layers are of timm's default classes."
        )
    return base


def _replaced_only(vit: VisionTransformer, base: Mapping[str, Any]) -> bool:
    """Whether only layers differ that a structure can record."""
    try:
        return bool(replaced_layers(vit, Blueprint.of(build(base))))
    except UnsupportedModelError:
        return False


def rebased(base: Mapping[str, Any], vit: VisionTransformer) -> dict[str, Any]:
    """``base`` with the changes that its user made since the cut, for example by ``reset_classifier``."""
    base, changeable = {**base, "config": image_settings(vit)}, _changeable(vit)
    if changeable == _changeable(build(base)):
        return base
    # All changeable arguments are given, because timm's default of one (the final norm) depends on another.
    return {**base, "arguments": {**base["arguments"], **changeable}}


def build(base: Mapping[str, Any]) -> VisionTransformer:
    """Build the dense model on the meta device.

    Raises:
        CheckpointError: timm does not have the architecture or rejects an argument.
    """
    # A ViT without a name in the registry is made by its class, which takes the same arguments.
    check_timm(base["architecture"] if base["architecture"] is not None else UNNAMED, base["arguments"])
    arguments, settings = unplain(base["arguments"]), image_settings_of(base["config"])
    try:
        with torch.device("meta"):
            if base["architecture"] is None:
                model = CLASSES[base["class"]](**arguments, **UNFILLED)
            else:
                model = timm.create_model(base["architecture"], pretrained=False, **arguments, **UNFILLED)
    except (KeyError, TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise CheckpointError(
            f"timm {timm.__version__} cannot make {base.get('architecture') or base.get('class')!r} "
            f"with {arguments}: {error}. Install the timm version named in provenance.json."
        ) from error
    if type(model).__name__ != base["class"]:
        raise CheckpointError(
            f"timm {timm.__version__} makes a {type(model).__name__} for {base['architecture']!r}, "
            f"the checkpoint holds a {base['class']}. Install the timm version named in provenance.json."
        )
    give_image_settings_(model, settings)
    return model


def input_channels(vit: VisionTransformer) -> int:
    """Channels of the images that ``vit`` takes: the inputs of its first convolution, in hybrids of the backbone."""
    return next(module.in_channels for module in vit.patch_embed.modules() if isinstance(module, nn.Conv2d))


@cache
def _defaults(class_name: str, architecture: str | None) -> Mapping[str, Any]:
    """The default arguments of an architecture."""
    return _arguments(build({"class": class_name, "architecture": architecture, "arguments": {}, "config": {}}))


def _arguments(vit: VisionTransformer) -> dict[str, Any]:
    """The arguments of timm's constructor, read from a model."""
    block = vit.blocks[0]
    attention = block.attn if isinstance(block.attn, Attention) else None
    last = vit.blocks[-1].drop_path1
    width = vit.embed_dim
    return {
        **_changeable(vit),
        "in_chans": input_channels(vit),
        "embed_dim": width,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        # timm truncates width * ratio to an integer; adding a quarter of a unit prevents rounding down.
        "mlp_ratio": (block.mlp.fc1.out_features + 0.25) / width,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "scale_attn_norm": attention is not None and not isinstance(attention.norm, nn.Identity),
        "scale_mlp_norm": not isinstance(block.mlp.norm, nn.Identity),
        "proj_bias": block.attn.proj.bias is not None,
        "init_values": None if isinstance(_scale(block), nn.Identity) else 1e-5,
        "class_token": vit.has_class_token,
        "pos_embed": "none" if vit.pos_embed is None else "learn",
        "no_embed_class": vit.no_embed_class,
        "reg_tokens": vit.num_reg_tokens,
        "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
        "pool_include_prefix": vit.pool_include_prefix,
        "dynamic_img_size": vit.dynamic_img_size,
        "dynamic_img_pad": vit.patch_embed.dynamic_img_pad,
        "patch_drop_rate": 0.0 if isinstance(vit.patch_drop, nn.Identity) else vit.patch_drop.prob,
        "drop_rate": vit.head_drop.p,
        "pos_drop_rate": vit.pos_drop.p,
        "proj_drop_rate": block.attn.proj_drop.p,
        "attn_drop_rate": block.attn.attn_drop.p,
        "drop_path_rate": 0.0 if isinstance(last, nn.Identity) else last.drop_prob,
    }


def _changeable(vit: VisionTransformer) -> dict[str, Any]:
    """The arguments that users can change in a model: classifier, pooling, image and patch size."""
    return {
        "img_size": list(vit.patch_embed.img_size),
        "patch_size": list(vit.patch_embed.patch_size),
        "num_classes": classes_of(vit),
        "global_pool": vit.global_pool,
        "final_norm": not (isinstance(vit.norm, nn.Identity) and isinstance(vit.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(vit.fc_norm, nn.Identity),
    }


def _scale(block: nn.Module) -> nn.Module:
    return getattr(block, "ls1", nn.Identity())
