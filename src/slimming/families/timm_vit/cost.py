"""What the forward pass of a timm Vision Transformer costs, as operations over group sizes.

MACs follow the matrix products; live tensors follow what eager PyTorch holds at batch 1 in inference: a
module's caller keeps the module's input until the call returns.
"""

from __future__ import annotations

import copy
from collections.abc import Set

import torch
from timm.layers import GluMlp, HybridEmbed, QuickGELU
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimming.families.timm_vit.base import input_channels
from slimming.families.timm_vit.sizes import BlockSizes
from slimming.groups import Dim, Operation, Product


def operations(vit: VisionTransformer, blocks: list[BlockSizes], groups: Set[str]) -> tuple[Operation, ...]:
    """The operations of the whole model.

    Args:
        vit: the model.
        blocks: its sizes.
        groups: names of the groups that exist; a size that no group names is fixed.
    """
    width = Dim(fixed=vit.embed_dim)
    sequence = Dim(fixed=vit.num_prefix_tokens + vit.patch_embed.num_patches)
    result = [_stem(vit, width, sequence)]
    first, incoming = sequence, sequence
    for sizes in blocks:
        tokens = _tokens(vit, sizes, groups)
        result += _block_operations(vit.get_submodule(sizes.name), sizes, groups, width, first, incoming, tokens)
        incoming = tokens
    return (*result, _head(vit, width, first, incoming))


def _numel(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


def _tokens(vit: VisionTransformer, sizes: BlockSizes, groups: Set[str]) -> Dim:
    name = f"{sizes.name}.tokens"
    if name in groups:
        return Dim(fixed=vit.num_prefix_tokens, groups=((name, 1),))
    return Dim(fixed=vit.num_prefix_tokens + len(sizes.positions))


def _stem(vit: VisionTransformer, width: Dim, sequence: Dim) -> Operation:
    patches = Dim(fixed=vit.patch_embed.num_patches)
    kernel = Dim(fixed=vit.patch_embed.proj.weight[0].numel())
    macs: list[Product] = [(patches, kernel, width)]
    own = [vit.cls_token, vit.reg_token, vit.pos_embed, getattr(vit, "dist_token", None)]
    params = _numel(vit.patch_embed, vit.norm_pre) + sum(p.numel() for p in own if p is not None)
    copies = 1 if vit.pos_embed is None else 2
    live: tuple[Product, ...] = ((patches, width), *((sequence, width),) * copies)
    if isinstance(vit.patch_embed, HybridEmbed):
        macs.append((Dim(fixed=_macs_in_front(vit)),))
        live = ()
    return Operation(name="patch_embed", macs=tuple(macs), params=((Dim(fixed=params),),), live=live)


def _macs_in_front(vit: VisionTransformer) -> int:
    """What the layers multiply that a hybrid has in front of its patch projection."""
    layers = copy.deepcopy(vit.patch_embed.backbone).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        layers(torch.empty(1, input_channels(vit), *vit.patch_embed.img_size, device="meta"))
    return counter.get_total_flops() // 2


def _block_operations(
    block: nn.Module, sizes: BlockSizes, groups: Set[str], width: Dim, first: Dim, incoming: Dim, tokens: Dim
) -> list[Operation]:
    site = sizes.name
    qk = _qk_dim(sizes, groups)
    v = _dim(f"{site}.attn.v", sizes.v_total, groups)
    hidden = _dim(f"{site}.mlp.hidden", sizes.hidden, groups)
    attention, mlp = block.attn, block.mlp
    projected = qk + qk + v
    one = Dim(fixed=1)
    # Where the norm comes after, attention and MLP read the residual stream itself instead of a normed copy.
    normed: tuple[Product, ...] = () if isinstance(block, ResPostBlock) else ((tokens, width),)
    # The caller of the blocks holds the first block's input until the last one returns. It is one tensor with
    # the input of block 0, unless tokens leave in front of that.
    held: tuple[Product, ...] = ((tokens, width),)
    held_if_fewer: tuple[tuple[str, int, Product], ...] = ()
    if sizes.name != "blocks.0":
        held = ((first, width), *held)
    elif tokens.groups:
        held_if_fewer = ((tokens.groups[0][0], first.fixed - tokens.fixed, (first, width)),)
    qkv_params: list[Product] = [(width, projected), (v, width)]
    qkv_params += [(projected, one)] if attention.qkv.bias is not None else []
    qkv_params += [(width, one)] if attention.proj.bias is not None else []
    attention_macs: list[Product] = [(tokens, width, projected), (tokens, tokens, qk + v), (tokens, v, width)]
    attention_live = [*held, *normed, (tokens, projected), (tokens, v), (tokens, width)]
    norms = _numel(block.norm1, getattr(block, "ls1", None), attention.q_norm, attention.k_norm)
    mlp_norms = _numel(block.norm2, getattr(block, "ls2", None), mlp.norm)
    gated = isinstance(mlp, GluMlp)
    rows = hidden + hidden if gated else hidden
    mlp_params: list[Product] = [(width, rows), (hidden, width)]
    mlp_params += [(rows, one)] if mlp.fc1.bias is not None else []
    mlp_params += [(width, one)] if mlp.fc2.bias is not None else []
    attended: Product = (tokens, width)
    mlp_live = [*held, attended, *normed, (tokens, rows), (tokens, hidden)]
    if gated or isinstance(mlp.act, QuickGELU):
        # One more than the input and the output of the activation: the gate's product, or x * sigmoid(1.702 x).
        mlp_live.append((tokens, hidden))
    return [
        Operation(name=f"{site}.tokens", live=((first, width), (incoming, width), (tokens, width))),
        Operation(
            name=f"{site}.attn",
            macs=tuple(attention_macs),
            params=(*qkv_params, (Dim(fixed=norms),)),
            live=tuple(attention_live),
            live_if_fewer=held_if_fewer,
        ),
        Operation(
            name=f"{site}.mlp",
            macs=((tokens, width, rows), (tokens, hidden, width)),
            params=(*mlp_params, (Dim(fixed=mlp_norms),)),
            live=tuple(mlp_live),
            live_if_fewer=held_if_fewer,
        ),
    ]


def _qk_dim(sizes: BlockSizes, groups: Set[str]) -> Dim:
    """QK dimensions of all heads; where QK stays whole they go with their heads, which are then of one size."""
    name, heads = f"{sizes.name}.attn.qk", f"{sizes.name}.attn.heads"
    if name not in groups and heads in groups:
        return Dim(groups=((heads, sizes.heads[0][0]),))
    return _dim(name, sizes.qk_total, groups)


def _dim(name: str, size: int, groups: Set[str]) -> Dim:
    return Dim(groups=((name, 1),)) if name in groups else Dim(fixed=size)


def _head(vit: VisionTransformer, width: Dim, first: Dim, tokens: Dim) -> Operation:
    heads = [vit.head, getattr(vit, "head_dist", None)]
    classes = sum(head.out_features for head in heads if isinstance(head, nn.Linear))
    macs: list[Product] = [(Dim(fixed=classes), width)]
    if vit.attn_pool is not None:
        macs += _pool_macs(vit, width, tokens)
    return Operation(
        name="head",
        macs=tuple(macs),
        params=((Dim(fixed=_numel(vit.norm, vit.attn_pool, vit.fc_norm, *heads)),),),
        live=((first, width), (tokens, width), (tokens, width)),
    )


def _pool_macs(vit: VisionTransformer, width: Dim, tokens: Dim) -> list[Product]:
    """Attention pooling: keys and values of every token, one query per latent."""
    pool = vit.attn_pool
    prefix = 0 if vit.pool_include_prefix else -vit.num_prefix_tokens
    pooled = tokens + Dim(fixed=prefix)
    latents = Dim(fixed=pool.latent_len)
    macs: list[Product] = [(latents, width, width), (pooled, width, width + width)]
    macs += [(latents, pooled, width + width), (latents, width, width)]
    if pool.mlp is not None:
        hidden = Dim(fixed=pool.mlp.fc2.in_features)
        macs += [(latents, width, hidden), (latents, hidden, width)]
    return macs
