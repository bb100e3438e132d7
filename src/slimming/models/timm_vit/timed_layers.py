"""Divide a timm Vision Transformer into timed layers, and make a module to time for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from slimming.core.copies import copied
from slimming.core.formulas import Dim
from slimming.core.groups import TimedLayer
from slimming.models.family import TimedModule
from slimming.models.layers import TokenSelect
from slimming.models.timm_vit.operations import alive_of, dim_of, qk_of, tokens_of
from slimming.models.timm_vit.resize import resize_block_
from slimming.models.timm_vit.sizes import BlockSizes, norm_follows
from slimming.models.timm_vit.width import WIDTH, resize_width_


def timed_layers(vit: VisionTransformer, blocks: list[BlockSizes], groups: Set[str]) -> tuple[TimedLayer, ...]:
    """The timed layers of ``vit``; empty for hybrids without a patch projection.

    Args:
        vit: the model.
        blocks: its sizes.
        groups: names of the model's groups; sizes without a group are fixed.
    """
    if not isinstance(vit.patch_embed.proj, nn.Conv2d):
        return ()
    width = dim_of(WIDTH, vit.embed_dim, groups)
    images = "x".join(map(str, (vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)))
    patch = "x".join(map(str, vit.patch_embed.patch_size))
    layers = [
        TimedLayer(name="patch_embed", kind="patch_embed", like=f"{images} in {patch}", axes=(("width", width),)),
    ]
    incoming = Dim(fixed=vit.num_prefix_tokens + vit.patch_embed.num_patches)
    for sizes in blocks:
        block: Any = vit.get_submodule(sizes.name)
        tokens = tokens_of(vit, sizes, groups, incoming)
        axes = (("tokens", tokens), ("width", width))
        order = "post-norm" if norm_follows(block) else "pre-norm"
        scaled = "" if isinstance(getattr(block, "ls1", None), (nn.Identity, type(None))) else ", layer scale"
        if tokens != incoming:
            layers.append(
                TimedLayer(name=f"{sizes.name}.tokens", kind="select", like="", axes=axes, unless_same=incoming)
            )
        if sizes.heads:
            normed = "" if isinstance(block.attn.q_norm, nn.Identity) else ", QK norm"
            layers.append(
                TimedLayer(
                    name=f"{sizes.name}.attn",
                    kind="attention",
                    like=f"{len(sizes.heads)} heads, {order}{scaled}{normed}",
                    # Queries, keys and values of all heads together.
                    axes=(*axes, ("qkv", _qkv(sizes, groups))),
                    alive=alive_of(f"{sizes.name}.attn", groups),
                )
            )
        if sizes.hidden:
            mlp = block.mlp
            layers.append(
                TimedLayer(
                    name=f"{sizes.name}.mlp",
                    kind="mlp",
                    like=f"{type(mlp).__name__} {type(mlp.act).__name__}, {order}{scaled}",
                    axes=(*axes, ("hidden", dim_of(f"{sizes.name}.mlp.hidden", sizes.hidden, groups))),
                    alive=alive_of(f"{sizes.name}.mlp", groups),
                )
            )
        incoming = tokens
    head = f"{vit.num_classes} classes, pooling {vit.global_pool or 'none'}"
    layers.append(TimedLayer(name="head", kind="head", like=head, axes=(("tokens", incoming), ("width", width))))
    return tuple(layers)


def _qkv(sizes: BlockSizes, groups: Set[str]) -> Dim:
    qk = qk_of(sizes, groups)
    return qk + qk + dim_of(f"{sizes.name}.attn.v", sizes.v_total, groups)


@torch.no_grad()
def timed_module(
    vit: VisionTransformer, layer: TimedLayer, sizes: Mapping[str, int], *, uneven_heads: bool = False
) -> TimedModule:
    """A module that computes what ``layer`` does at ``sizes``.

    Attention and MLPs are timed in as many copies as the model has blocks. Otherwise their weights would be in the
    processor's cache, in which those of the model are not.
    """
    depth = len([block for block in vit.blocks if not isinstance(block, TokenSelect)])
    module = vit.get_submodule(layer.name) if layer.kind in ("attention", "mlp") else None
    blocks = nn.Sequential() if module is None else nn.Sequential(copied(_block_of(vit, layer)))
    small: Any = copied(vit, {id(vit.blocks): blocks})
    if layer.kind == "patch_embed":
        resize_width_(small, sizes["width"])
        return TimedModule(_Stem(small), (small.patch_embed.proj.in_channels, *small.patch_embed.img_size))
    shape = (sizes["tokens"], sizes["width"])
    if layer.kind == "select":
        incoming = vit.num_prefix_tokens + vit.patch_embed.num_patches
        select = TokenSelect(range(sizes["tokens"]), incoming).to(vit.patch_embed.proj.weight.device)
        return TimedModule(select, (incoming, sizes["width"]))
    if layer.kind == "head":
        resize_width_(small, sizes["width"])
        return TimedModule(_Head(small), shape)
    wanted = BlockSizes(name="blocks.0", heads=(), scale=1.0, hidden=sizes.get("hidden", 0), positions=(0,))
    if layer.kind == "attention":
        count = int(layer.like.partition(" ")[0])
        mean = sizes["qkv"] // (3 * count)
        heads = _uneven_sizes(mean, count, module.qkv.out_features // (3 * count)) if uneven_heads else [mean] * count
        wanted = replace(wanted, heads=tuple((size, size) for size in heads), scale=mean**-0.5)
    resize_block_(small, wanted)
    resize_width_(small, sizes["width"])
    return TimedModule(nn.Sequential(*(copied(small.blocks[0]) for _ in range(depth))), shape, depth)


def _uneven_sizes(mean: int, count: int, full: int) -> list[int]:
    """Sizes of ``count`` heads in multiples of 8 with the given ``mean``, the largest about 1.5 times as large.

    Plans without equal heads have similar sizes.
    """
    if mean % 8 or mean >= full:
        return [mean] * count
    span = min(full, 1.5 * mean) - mean
    half = [round(span * (count - 1 - 2 * head) / (8 * max(count - 1, 1))) * 8 for head in range(count // 2)]
    middle = [0] * (count % 2)
    return sorted(mean + offset for offset in (*half, *middle, *(-offset for offset in half)))


def _block_of(vit: VisionTransformer, layer: TimedLayer) -> nn.Module:
    return vit.get_submodule(layer.name.rpartition(".")[0])


class _Stem(nn.Module):
    """Patch embedding and position embedding: images (B, C, H, W) to tokens (B, N, D)."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, image: Tensor) -> Tensor:
        return self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(image)))


class _Head(nn.Module):
    """Final norm, pooling and classifier: tokens (B, N, D) to logits (B, classes)."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        return self.vit.forward_head(self.vit.norm(x))
