"""Resize the attention, MLPs and token sequence of a timm Vision Transformer."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.layers import GluMlp
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import nn

from slimming.models.family import linear_like
from slimming.models.layers import PartialBlock, TokenSelect, UnavailableMethod, UnevenAttention
from slimming.models.timm_vit.sizes import BlockSizes, head_sizes, norm_follows

NEEDS_GRID = ("forward_intermediates", "prune_intermediate_layers", "get_intermediate_layers", "set_input_size")


def is_even(heads: Sequence[tuple[int, int]]) -> bool:
    """Whether timm's attention class can hold these heads: all of one size, equal for QK and V, or no heads."""
    return not heads or (len(set(heads)) == 1 and heads[0][0] == heads[0][1])


def query_factor(sizes: BlockSizes) -> float:
    """The factor of the query rows that preserves the scale of the logits.

    timm's fused attention divides the logits by the square root of the current head size. The dense model's factor has
    to be preserved (ViT-Slim, section 3.2), so the queries are multiplied by the quotient.
    """
    return sizes.scale * math.sqrt(sizes.heads[0][0]) if is_even(sizes.heads) else 1.0


def resize_block_(vit: VisionTransformer, sizes: BlockSizes) -> None:
    """Resize the attention and the MLP of a block to ``sizes``; the contents of resized tensors are undefined."""
    block: Any = vit.get_submodule(sizes.name)
    if (bool(sizes.heads), sizes.hidden > 0) != (block.attn is not None, block.mlp is not None):
        block = PartialBlock(block, attention=bool(sizes.heads), mlp=sizes.hidden > 0, post_norm=norm_follows(block))
        vit.blocks.add_module(sizes.name.removeprefix("blocks."), block)
    if head_sizes(block.attn) != sizes.heads:
        resized = _even_attention if is_even(sizes.heads) else _uneven_attention
        block.attn = resized(block.attn, sizes)
    mlp = block.mlp
    if mlp is not None and mlp.fc2.in_features != sizes.hidden:
        rows = 2 * sizes.hidden if isinstance(mlp, GluMlp) else sizes.hidden
        mlp.fc1 = linear_like(mlp.fc1, mlp.fc1.in_features, rows)
        mlp.fc2 = linear_like(mlp.fc2, sizes.hidden, mlp.fc2.out_features)


def _even_attention(old: nn.Module, sizes: BlockSizes) -> Attention:
    """Timm's attention class with fewer or smaller heads."""
    count, (head_dim, _) = len(sizes.heads), sizes.heads[0]
    new = Attention(
        old.proj.in_features,
        num_heads=1,
        attn_drop=old.attn_drop.p,
        proj_drop=old.proj_drop.p,
        device="meta",
    )
    new.num_heads, new.head_dim, new.attn_dim = count, head_dim, count * head_dim
    new.scale = head_dim**-0.5
    new.q_norm, new.k_norm = old.q_norm, old.k_norm
    new.qkv = linear_like(old.qkv, old.qkv.in_features, 3 * new.attn_dim)
    new.proj = linear_like(old.proj, new.attn_dim, old.proj.out_features)
    return new.train(old.training)


def _uneven_attention(old: nn.Module, sizes: BlockSizes) -> UnevenAttention:
    new = UnevenAttention(
        old.qkv.in_features,
        sizes.heads,
        scale=sizes.scale,
        qkv_bias=old.qkv.bias is not None,
        proj_bias=old.proj.bias is not None,
        dim_out=old.proj.out_features,
        q_norm=old.q_norm,
        k_norm=old.k_norm,
        attn_drop=old.attn_drop.p,
        proj_drop=old.proj_drop.p,
        device=old.qkv.weight.device,
        dtype=old.qkv.weight.dtype,
    )
    for name, parameter in old.named_parameters():
        new.get_parameter(name).requires_grad_(parameter.requires_grad)
    return new.train(old.training)


def place_token_selects_(vit: VisionTransformer, blocks: Sequence[BlockSizes]) -> None:
    """Insert a `TokenSelect` before every block where positions are removed, and delete those of earlier cuts.

    Its name (``blocks.3_tokens``) leaves the names of the blocks unchanged.
    """
    rows, columns = vit.patch_embed.grid_size
    present = tuple(range(rows * columns))
    prefix = vit.num_prefix_tokens
    device = next(vit.parameters()).device
    children = OrderedDict((k, m) for k, m in vit.blocks.named_children() if not isinstance(m, TokenSelect))
    wanted = {sizes.name.removeprefix("blocks."): sizes.positions for sizes in blocks}
    placed: OrderedDict[str, nn.Module] = OrderedDict()
    for key, block in children.items():
        if wanted[key] != present:
            index_of = {position: index + prefix for index, position in enumerate(present)}
            index = [*range(prefix), *(index_of[position] for position in wanted[key])]
            select = TokenSelect(index, prefix + len(present))
            placed[f"{key}_tokens"] = select if device.type == "meta" else select.to(device)
            present = wanted[key]
        placed[key] = block
    cut = len(placed) > len(children)
    vit.blocks = nn.Sequential(placed)
    for method in NEEDS_GRID:
        if cut:
            vit.__dict__[method] = UnavailableMethod(
                f"{method} needs the full grid of tokens, but tokens were cut from this model. "
                'Use forward_features, or cut a plan without tokens (keep={"head_dim": …, "mlp": …}).'
            )
        else:
            vit.__dict__.pop(method, None)
