"""Cost formulas of the forward pass of a timm Vision Transformer, as operations over group sizes.

MACs are those of the matrix products. Live tensors are those that eager PyTorch keeps in inference at batch size 1,
where the caller of a module holds its input until the call returns.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

import torch
from timm.layers import GluMlp, HybridEmbed, QuickGELU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from slimming.core.copies import copied
from slimming.core.formulas import Dim, Operation, Product
from slimming.counting.operations import MacCounter
from slimming.models.timm_vit.rebuild import input_channels
from slimming.models.timm_vit.sizes import BlockSizes, norm_follows
from slimming.models.timm_vit.width import WIDTH


def operations(vit: VisionTransformer, blocks: list[BlockSizes], groups: Set[str]) -> tuple[Operation, ...]:
    """The operations of the whole model.

    Args:
        vit: the model.
        blocks: its sizes.
        groups: names of the model's groups; sizes without a group are fixed.
    """
    width = dim_of(WIDTH, vit.embed_dim, groups)
    sequence = Dim(fixed=vit.num_prefix_tokens + vit.patch_embed.num_patches)
    result = [_stem(vit, width, sequence)]
    first, incoming = sequence, sequence
    for sizes in blocks:
        tokens = tokens_of(vit, sizes, groups, incoming)
        result += _block_operations(vit.get_submodule(sizes.name), sizes, groups, width, first, incoming, tokens)
        incoming = tokens
    return (*result, _head(vit, width, first, incoming), _logits(vit, width, incoming))


def _numel(*modules: nn.Module | None) -> int:
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


def _multiple(numel: int, vit: VisionTransformer, width: Dim) -> Product:
    """``numel`` elements of tensors with the embedding width, as a product."""
    return (Dim(fixed=numel // vit.embed_dim), width)


def tokens_of(vit: VisionTransformer, sizes: BlockSizes, groups: Set[str], incoming: Dim) -> Dim:
    """The number of tokens in a block with the prefix tokens, given that of the block before."""
    name = f"{sizes.name}.tokens"
    if name in groups:
        return Dim(fixed=vit.num_prefix_tokens, groups=((name, 1),))
    # A block without attention has no token group, and keeps the tokens of the block before.
    return incoming if incoming.groups else Dim(fixed=vit.num_prefix_tokens + len(sizes.positions))


def _stem(vit: VisionTransformer, width: Dim, sequence: Dim) -> Operation:
    patches = Dim(fixed=vit.patch_embed.num_patches)
    macs: list[Product] = []
    if isinstance(vit.patch_embed.proj, nn.Conv2d):  # some hybrids have no projection
        macs.append((patches, Dim(fixed=vit.patch_embed.proj.weight[0].numel()), width))
    # All parameters of the stem except the backbone of a hybrid have the embedding width as a dimension.
    per_width = _numel(vit.patch_embed.proj, vit.norm_pre) + sum(p.numel() for p in vit.parameters(recurse=False))
    fixed = _numel(vit.patch_embed) - _numel(vit.patch_embed.proj)
    copies = 1 if vit.pos_embed is None else 2
    live: tuple[Product, ...] = ((patches, width), *((sequence, width),) * copies)
    if isinstance(vit.patch_embed, HybridEmbed):
        macs.append((Dim(fixed=_backbone_macs(vit)),))
        live = ()
    return Operation(
        name="patch_embed", macs=tuple(macs), params=(_multiple(per_width, vit, width), (Dim(fixed=fixed),)), live=live
    )


def _backbone_macs(vit: VisionTransformer) -> int:
    """The MACs of the backbone of a hybrid, whose output is divided into patches."""
    layers = copied(vit.patch_embed.backbone).to("meta").eval()
    counter, like = MacCounter(), next(layers.parameters())
    with counter, torch.no_grad():
        layers(torch.empty(1, input_channels(vit), *vit.patch_embed.img_size, device="meta", dtype=like.dtype))
    return counter.total


def _block_operations(
    block: Any, sizes: BlockSizes, groups: Set[str], width: Dim, first: Dim, incoming: Dim, tokens: Dim
) -> list[Operation]:
    """Token selection, attention and MLP of one block, if it has them."""
    # The caller of the blocks holds the input of the first block until the last one returns. The first block has the
    # same tensor as input, unless tokens are removed before it.
    held: tuple[Product, ...] = ((tokens, width),)
    held_if_fewer: tuple[tuple[str, int, Product], ...] = ()
    if sizes.name != "blocks.0" or (not tokens.groups and tokens.fixed < first.fixed):
        held = ((first, width), *held)
    elif tokens.groups:
        held_if_fewer = ((tokens.groups[0][0], first.fixed - tokens.fixed, (first, width)),)
    # In blocks with post-norm, attention and MLP read the residual stream itself instead of a normalised copy.
    normed: tuple[Product, ...] = () if norm_follows(block) else ((tokens, width),)
    result = [Operation(name=f"{sizes.name}.tokens", live=((first, width), (incoming, width), (tokens, width)))]
    attends = alive_of(f"{sizes.name}.attn", groups)
    if sizes.heads:
        operation = _attention(block, sizes, groups, width, tokens)
        result.append(_if_alive(operation, attends, (*held, *normed), held_if_fewer))
    if sizes.hidden:
        # The sum of the block's input and the attention's output is alive in addition to the block's input.
        attended: tuple[Product, ...] = ((tokens, width, *attends),) if sizes.heads else ()
        operation = _mlp(block, sizes, groups, width, tokens)
        alive = alive_of(f"{sizes.name}.mlp", groups)
        result.append(_if_alive(operation, alive, (*held, *attended, *normed), held_if_fewer))
    return result


def alive_of(site: str, groups: Set[str]) -> Product:
    """A factor that is 0 once the whole attention or MLP is removed; empty if it cannot be removed."""
    return (Dim(groups=((f"{site}.branch", 1),)),) if f"{site}.branch" in groups else ()


def _if_alive(
    operation: Operation,
    alive: Product,
    around: tuple[Product, ...],
    around_if_fewer: tuple[tuple[str, int, Product], ...],
) -> Operation:
    """``operation`` with the tensors that are alive around it, all multiplied by ``alive``."""
    return replace(
        operation,
        macs=tuple((*product, *alive) for product in operation.macs),
        params=tuple((*product, *alive) for product in operation.params),
        live=tuple((*product, *alive) for product in (*around, *operation.live)),
        live_if_fewer=tuple((group, units, (*product, *alive)) for group, units, product in around_if_fewer),
    )


def _attention(block: Any, sizes: BlockSizes, groups: Set[str], width: Dim, tokens: Dim) -> Operation:
    site, attention, one = f"{sizes.name}.attn", block.attn, Dim(fixed=1)
    qk = qk_of(sizes, groups)
    v = dim_of(f"{site}.v", sizes.v_total, groups)
    projected = qk + qk + v
    params: list[Product] = [(width, projected), (v, width)]
    params += [(projected, one)] if attention.qkv.bias is not None else []
    params += [(width, one)] if attention.proj.bias is not None else []
    params += [(Dim(fixed=_numel(attention.q_norm, attention.k_norm, getattr(attention, "norm", None))),)]
    return Operation(
        name=site,
        macs=((tokens, width, projected), (tokens, tokens, qk + v), (tokens, v, width)),
        params=(*params, _params_per_feature(width, block, "norm1", "ls1")),
        live=((tokens, projected), (tokens, v), (tokens, width)),
    )


def _mlp(block: Any, sizes: BlockSizes, groups: Set[str], width: Dim, tokens: Dim) -> Operation:
    site, mlp, one = f"{sizes.name}.mlp", block.mlp, Dim(fixed=1)
    hidden = dim_of(f"{site}.hidden", sizes.hidden, groups)
    gated = isinstance(mlp, GluMlp)
    rows = hidden + hidden if gated else hidden
    params: list[Product] = [(width, rows), (hidden, width), (Dim(fixed=_numel(mlp.norm)),)]
    params += [(rows, one)] if mlp.fc1.bias is not None else []
    params += [(width, one)] if mlp.fc2.bias is not None else []
    live: list[Product] = [(tokens, rows), (tokens, hidden)]
    if gated or isinstance(mlp.act, QuickGELU):
        # In addition to input and output of the activation: the product with the gate, or a factor of x *
        # sigmoid(1.702 x).
        live.append((tokens, hidden))
    return Operation(
        name=site,
        macs=((tokens, width, rows), (tokens, hidden, width)),
        params=(*params, _params_per_feature(width, block, "norm2", "ls2")),
        live=tuple(live),
    )


def _params_per_feature(width: Dim, block: Any, *names: str) -> Product:
    """The parameters of modules of a block that have one element per feature of the embedding."""
    tensors = [p for name in names for p in block._modules.get(name, nn.Identity()).parameters()]
    return (Dim(fixed=len(tensors)), width)


def qk_of(sizes: BlockSizes, groups: Set[str]) -> Dim:
    """QK dimensions of all heads. If QK cannot be cut, they depend on the number of heads, which have equal sizes."""
    name, heads = f"{sizes.name}.attn.qk", f"{sizes.name}.attn.heads"
    if name not in groups and heads in groups:
        return Dim(groups=((heads, sizes.heads[0][0]),))
    return dim_of(name, sizes.qk_total, groups)


def dim_of(name: str, size: int, groups: Set[str]) -> Dim:
    """The kept units of the group ``name`` if it exists, else ``size``."""
    return Dim(groups=((name, 1),)) if name in groups else Dim(fixed=size)


def _head(vit: VisionTransformer, width: Dim, first: Dim, tokens: Dim) -> Operation:
    heads = [vit.head, getattr(vit, "head_dist", None)]
    linears = [head for head in heads if isinstance(head, nn.Linear)]
    classes = sum(head.out_features for head in linears)
    macs: list[Product] = [(Dim(fixed=classes), width)]
    if vit.attn_pool is not None:
        macs += _pool_macs(vit, width, tokens)
    return Operation(
        name="head",
        macs=tuple(macs),
        params=(
            (Dim(fixed=classes), width),
            (Dim(fixed=sum(head.bias.numel() for head in linears if head.bias is not None)),),
            _multiple(_numel(vit.norm, vit.fc_norm), vit, width),
            (Dim(fixed=_numel(vit.attn_pool)),),
        ),
        live=((first, width), (tokens, width), (tokens, width)),
    )


def _logits(vit: VisionTransformer, width: Dim, tokens: Dim) -> Operation:
    """The tensors that are alive after the classifier, which exceed its input if there are many classes."""
    # With two classifiers: both outputs, their sum, and their mean.
    outputs = 4 if isinstance(vit, VisionTransformerDistilled) else 1
    classes = Dim(fixed=outputs * vit.num_classes)
    return Operation(name="logits", live=((tokens, width), (classes,)))


def _pool_macs(vit: VisionTransformer, width: Dim, tokens: Dim) -> list[Product]:
    """MACs of attention pooling: keys and values of every token, one query per latent."""
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
