"""Derive the groups of attention, MLPs and tokens from the sizes of a timm Vision Transformer."""

from __future__ import annotations

from typing import Any

from timm.layers import GluMlp
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import nn

from slimming.core.groups import Group, Limits, Scale, Slices, TokenSite
from slimming.models.timm_vit.sizes import BlockSizes, norm_follows

Index = tuple[tuple[int, ...], ...]

TOKEN_POOLS = ("token", "avg", "map")


def tokens_why_not(vit: VisionTransformer) -> str | None:
    """The reason why token positions cannot be cut; None if they can."""
    if vit.global_pool not in TOKEN_POOLS:
        return f"pooling {vit.global_pool!r} needs every token; pooling by {', '.join(TOKEN_POOLS)} does not"
    if vit.attn_pool is not None and vit.attn_pool.pos_embed is not None:
        return "the pooling attention adds position embeddings"
    if not isinstance(vit.patch_drop, nn.Identity):
        return "patch dropout removes random tokens in training; make the model with patch_drop_rate=0"
    return None


def block_groups(
    vit: VisionTransformer, depth: int, sizes: BlockSizes, *, tokens: bool, uncovered: list[str]
) -> list[Group]:
    """The groups of one block; parts that cannot be cut are added to ``uncovered``."""
    block: Any = vit.get_submodule(sizes.name)
    groups: list[Group] = []
    if sizes.heads:
        inside = _attention_groups(sizes, block.attn, uncovered)
        groups += [
            *inside,
            *_branch(vit, f"{sizes.name}.attn", "norm1" if norm_follows(block) else "attn.proj", inside),
        ]
    if sizes.hidden:
        inside = _mlp_groups(sizes, block.mlp, uncovered)
        groups += [*inside, *_branch(vit, f"{sizes.name}.mlp", "norm2" if norm_follows(block) else "mlp.fc2", inside)]
    # Tokens are removed before a block, and their masks act in its attention.
    return [*groups, _token_group(vit, depth, sizes)] if tokens and sizes.heads else groups


def _branch(vit: VisionTransformer, site: str, last: str, inside: list[Group]) -> list[Group]:
    """The group of a whole attention or MLP as one unit; none if the units inside it cannot be cut.

    Args:
        vit: the model.
        site: name of the attention or MLP.
        last: name in the block of the layer whose output is added to the residual stream.
        inside: the groups of the units inside the module.
    """
    if not inside:
        return []
    owner = f"{site.rpartition('.')[0]}.{last}"
    all_indices: dict[tuple[str, int, str], set[int]] = {}
    for part in (part for group in inside for part in group.slices):
        side = "consumes" if part.side == "consumes" else "produces"  # also for queries and keys
        indices = all_indices.setdefault((part.tensor, part.dim, side), set())
        indices.update(index for unit in part.index for index in unit)
    return [
        Group(
            name=f"{site}.branch",
            kind="block",
            size=1,
            site=site,
            role="branch",
            limits=Limits(minimum=0),
            slices=tuple(
                Slices(tensor=tensor, dim=dim, index=(tuple(sorted(indices)),), side=side)
                for (tensor, dim, side), indices in all_indices.items()
            ),
            scales=tuple(
                Scale(tensor=f"{owner}.{name}", dim=0, index=(tuple(range(len(tensor))),))
                for name, tensor in vit.get_submodule(owner).named_parameters()
            ),
        )
    ]


def _single(count: int, *offsets: int) -> Index:
    """The index of each unit after each offset."""
    return tuple(tuple(offset + unit for offset in offsets) for unit in range(count))


def _runs(lengths: tuple[int, ...]) -> Index:
    """The indices of consecutive runs of the given lengths."""
    starts = [sum(lengths[:part]) for part in range(len(lengths))]
    return tuple(tuple(range(start, start + length)) for start, length in zip(starts, lengths, strict=True))


def _attention_groups(sizes: BlockSizes, attention: nn.Module, uncovered: list[str]) -> list[Group]:
    """The groups of one attention module: QK, V, both coupled, and whole heads."""
    site = f"{sizes.name}.attn"
    if isinstance(attention, Attention) and not isinstance(attention.norm, nn.Identity):
        uncovered.append(f"{site}: a norm over all heads follows the attention, so heads and dimensions cannot be cut")
        return []
    can_cut_qk = isinstance(attention.q_norm, nn.Identity) and isinstance(attention.k_norm, nn.Identity)
    if not can_cut_qk:
        uncovered.append(f"{site} QK: queries and keys are normalised over the head dimension, so QK cannot be cut")
    qkv = [f"{site}.qkv.{name}" for name, _ in attention.qkv.named_parameters()]
    return [*_head_dim_groups(sizes, qkv, can_cut_qk), _head_group(sizes, qkv)]


def _head_dim_groups(sizes: BlockSizes, qkv: list[str], can_cut_qk: bool) -> list[Group]:
    """QK, V and both coupled.

    Args:
        sizes: sizes of the block.
        qkv: names of the parameters of the joint projection.
        can_cut_qk: whether QK dimensions can be cut.
    """
    site, total = f"{sizes.name}.attn", sizes.qk_total
    qk_parts = tuple(qk for qk, _ in sizes.heads)
    v_parts = tuple(v for _, v in sizes.heads)
    queries, keys = _single(total, 0), _single(total, total)
    columns = _single(sizes.v_total, 0)
    qk_slices = tuple(
        Slices(tensor=name, dim=0, index=index, side=side)
        for index, side in ((queries, "query"), (keys, "key"))
        for name in qkv
    )
    v_slices = _value_slices(site, qkv, _single(sizes.v_total, 2 * total), columns)
    qk_scales = tuple(Scale(tensor=name, dim=0, index=queries) for name in qkv)
    coupled_scales = tuple(Scale(tensor=name, dim=0, index=_single(total, 0, total)) for name in qkv)
    v_scale = Scale(tensor=f"{site}.proj.weight", dim=1, index=columns)
    roles = {
        "qk": (can_cut_qk, qk_parts, qk_slices, qk_scales),
        "v": (True, v_parts, v_slices, (v_scale,)),
        "qkv": (can_cut_qk and qk_parts == v_parts, qk_parts, qk_slices + v_slices, (*coupled_scales, v_scale)),
    }
    return [
        Group(
            name=f"{site}.{role}",
            kind="head_dim",
            size=sum(parts),
            site=site,
            role=role,
            limits=Limits(parts=parts),
            slices=slices,
            scales=scales,
            any_basis=role != "qkv",
        )
        for role, (can_cut, parts, slices, scales) in roles.items()
        if can_cut
    ]


def _head_group(sizes: BlockSizes, qkv: list[str]) -> Group:
    site, total = f"{sizes.name}.attn", sizes.qk_total
    heads_qk, heads_v = _runs(tuple(qk for qk, _ in sizes.heads)), _runs(tuple(v for _, v in sizes.heads))
    rows = tuple(
        (*qk, *(total + index for index in qk), *(2 * total + index for index in v))
        for qk, v in zip(heads_qk, heads_v, strict=True)
    )
    return Group(
        name=f"{site}.heads",
        kind="head",
        size=len(sizes.heads),
        site=site,
        role="head",
        slices=_value_slices(site, qkv, rows, heads_v),
        scales=(Scale(tensor=f"{site}.proj.weight", dim=1, index=heads_v),),
    )


def _value_slices(site: str, qkv: list[str], rows: Index, columns: Index) -> tuple[Slices, ...]:
    """``rows`` of the joint projection and ``columns`` of the output projection."""
    produced = tuple(Slices(tensor=name, dim=0, index=rows, side="produces") for name in qkv)
    return (*produced, Slices(tensor=f"{site}.proj.weight", dim=1, index=columns, side="consumes"))


def _mlp_groups(sizes: BlockSizes, mlp: nn.Module, uncovered: list[str]) -> list[Group]:
    site = f"{sizes.name}.mlp"
    if not isinstance(mlp.norm, nn.Identity):
        uncovered.append(f"{site}: a norm over the hidden units follows the activation, so they cannot be cut")
        return []
    # A gated MLP computes both factors with one Linear: unit u has the rows u and hidden + u.
    rows = _single(sizes.hidden, 0, sizes.hidden) if isinstance(mlp, GluMlp) else _single(sizes.hidden, 0)
    columns = _single(sizes.hidden, 0)
    inputs = [f"{site}.fc1.{name}" for name, _ in mlp.fc1.named_parameters()]
    output = f"{site}.fc2.weight"
    return [
        Group(
            name=f"{site}.hidden",
            kind="mlp",
            size=sizes.hidden,
            site=site,
            role="mlp",
            slices=(
                *(Slices(tensor=name, dim=0, index=rows, side="produces") for name in inputs),
                Slices(tensor=output, dim=1, index=columns, side="consumes"),
            ),
            scales=(Scale(tensor=output, dim=1, index=columns),),
        )
    ]


def _token_group(vit: VisionTransformer, depth: int, sizes: BlockSizes) -> Group:
    pooled_by_attention = vit.attn_pool is not None
    return Group(
        name=f"{sizes.name}.tokens",
        kind="token",
        size=len(sizes.positions),
        site=sizes.name,
        role="token",
        token=TokenSite(
            depth=depth,
            block=sizes.name,
            attention=f"{sizes.name}.attn",
            norms=(f"{sizes.name}.norm1", f"{sizes.name}.norm2"),
            prefix=vit.num_prefix_tokens,
            positions=sizes.positions,
            mean_pool="norm" if vit.global_pool == "avg" and not pooled_by_attention else None,
            pool_prefix=vit.pool_include_prefix,
            attention_pool="attn_pool" if pooled_by_attention else None,
        ),
    )
