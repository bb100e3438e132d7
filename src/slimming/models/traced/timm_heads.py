"""Table of timm's attention classes: which layers, tensors and attributes depend on their heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from slimming.models.traced.heads import Heads, Row

_NORM = "a norm over all heads mixes them"
_BIASES: dict[str, dict[str, Any]] = {
    "RelPosBias": {"per_head": {"rel_pos.relative_position_bias_table": 1}, "sizes": ("rel_pos.bias_shape[2]",)},
    "RelPosBiasTf": {
        "per_head": {"rel_pos.relative_position_bias_table": 0},
        "sizes": ("rel_pos.num_heads", "rel_pos.bias_shape[0]"),
    },
    "RelPosMlp": {"inputs": {"rel_pos.mlp.fc2": 1}, "sizes": ("rel_pos.num_heads", "rel_pos.bias_shape[2]")},
}
"""Class of a relative position bias -> fields of the row that depend on its heads."""


def _unless(why_not: Callable[[Any], str | None], row: Heads) -> Row:
    """``row``, unless ``why_not`` returns a reason why the heads of a module cannot be removed."""
    return lambda module: replace(row, why_not=why_not(module))


def _norm(module: Any) -> str | None:
    return None if isinstance(module.norm, nn.Identity) else _NORM


def _relative(row: Heads, module: Any) -> Heads:
    """``row`` with the tensors of the module's relative position bias."""
    if module.rel_pos is None:
        return row
    kind = type(module.rel_pos).__name__
    if kind not in _BIASES:
        return replace(row, why_not=f"slimming does not read its {kind}")
    bias = _BIASES[kind]
    return replace(
        row,
        inputs={**row.inputs, **bias.get("inputs", {})},
        per_head={**row.per_head, **bias.get("per_head", {})},
        sizes=(*row.sizes, *bias["sizes"]),
    )


def _relpos_vit(module: Any) -> Heads:
    if module.rel_pos is None:
        return Heads(inputs=_QKV, why_not="its position bias is shared by all blocks")
    return _relative(Heads(inputs=_QKV, free_heads=True), module)


def _maxxvit(module: Any) -> Heads:
    return _relative(Heads(inputs={"qkv": 1 if module.head_first else 3}), module)


def _gcvit(module: Any) -> Heads:
    if module.use_global:
        return Heads(inputs={"qkv": 2}, why_not="its queries are an input with all heads")
    return _relative(Heads(inputs=_QKV, free_heads=True), module)


def _mvit(module: Any) -> Heads:
    if module.unshared:
        return Heads(inputs=_QKV, why_not="its pooling has one weight for all heads")
    return Heads(inputs=_QKV, sizes=("dim_out",))


def _lite(module: Any) -> Heads:
    scales = {f"aggreg.{scale}.{layer}": 1 for scale in range(len(module.aggreg)) for layer in range(2)}
    rows = module.qkv.conv.out_channels
    return Heads(inputs={"qkv": 1, **scales}, output_blocks=1 + len(module.aggreg), count=rows // (3 * module.dim))


def _pool(module: Any) -> str | None:
    return "no layer of the module reads its heads" if isinstance(module.proj, nn.Identity) else None


def _latent(module: Any) -> str | None:
    return "its latent is the query of all heads" if isinstance(module.q, nn.Identity) else _pool(module)


def _low(module: Any) -> str | None:
    return "an upsampling layer reads its heads" if isinstance(module.o_proj, nn.Identity) else None


def _parallel(module: Any) -> Heads:
    hidden, width = module.in_split[0], module.in_split[-1]
    output = "attn_out_proj" if module.out_proj is None else f"out_proj[:{width}]"
    sizes = tuple(f"in_split[{index}]" for index in (1, 2, 3))
    return Heads(inputs={f"in_proj[{hidden}:]": 3}, output=output, sizes=sizes, free_heads=True)


_QKV = {"qkv": 3}
_APART = {"q": 1, "k": 1, "v": 1}
_Q_AND_KV = {"q": 1, "kv": 2}
_BIASED = {**_QKV, "q_bias": 1, "k_bias": 1, "v_bias": 1}
_PROJECTED = {"q_proj": 1, "k_proj": 1, "v_proj": 1}
_PLAIN = Heads(inputs=_QKV)
_FREE_HEADS = Heads(inputs=_QKV, free_heads=True)
_KEYED = {"per_head": {"attention_biases": 0}, "sizes": ("out_dim", "key_attn_dim", "val_attn_dim", "dh")}
_CROSS = Heads(inputs=_QKV, per_head={"temperature": 0}, free_heads=True)
_LOW = _unless(_low, Heads(inputs={"pwise": 1}, output="o_proj", sizes=("o_proj_inpdim",)))
_POOL = _unless(_pool, Heads(inputs={**_QKV, **_APART}))

_ROWS: dict[str, Row] = {
    "layers.attention.Attention": _unless(_norm, Heads(inputs={**_QKV, "gate": 1}, sizes=("attn_dim",))),
    "layers.attention.AttentionRope": _unless(
        _norm,
        # Grouped queries: a unit is a key head with all its query heads.
        Heads(
            inputs={**_QKV, **_PROJECTED, "gate": 1},
            count="num_kv_heads",
            sizes=("num_heads", "attn_dim", "kv_dim"),
        ),
    ),
    "layers.attention2d.Attention2d": lambda module: Heads(inputs={"qkv": 1 if module.head_first else 3}),
    "layers.attention2d.MultiQueryAttention2d": Heads(inputs={"query.proj": 1}, output="output.proj"),
    "layers.attention_pool.AttentionPoolLatent": _unless(_latent, Heads(inputs=_Q_AND_KV, free_heads=True)),
    "layers.attention_pool2d.AttentionPool2d": _POOL,
    "layers.attention_pool2d.RotAttentionPool2d": _POOL,
    "layers.diff_attention.DiffAttention": _unless(_norm, _FREE_HEADS),
    "models.beit.Attention": Heads(inputs=_BIASED, per_head={"relative_position_bias_table": 1}, free_heads=True),
    "models.cait.ClassAttn": Heads(inputs=_APART, free_heads=True),
    "models.cait.TalkingHeadAttn": Heads(inputs=_QKV, mixers=("proj_l", "proj_w"), free_heads=True),
    "models.coat.FactorAttnConvRelPosEnc": Heads(
        inputs=_QKV, why_not="blocks share convolutions over all heads as position encodings"
    ),
    "models.convit.GPSA": Heads(inputs={"qk": 2, "v": 1, "pos_proj": 1}, per_head={"gating_param": 0}, free_heads=True),
    "models.convit.MHSA": _FREE_HEADS,
    "models.cpubone.ConvAttention": _LOW,
    "models.crossvit.CrossAttention": Heads(inputs={"wq": 1, "wk": 1, "wv": 1}, free_heads=True),
    "models.davit.ChannelAttention": _FREE_HEADS,
    "models.davit.ChannelAttentionV2": Heads(inputs=_QKV, count="groups", free_heads=True),
    "models.davit.WindowAttention": _FREE_HEADS,
    "models.edgenext.CrossCovarianceAttn": _CROSS,
    "models.efficientformer.Attention": Heads(inputs={"qkv": 1}, **_KEYED),
    "models.efficientformer_v2.Attention2d": Heads(
        inputs={**_APART, "v_local": 1}, mixers=("talking_head1", "talking_head2"), **_KEYED
    ),
    "models.efficientformer_v2.Attention2dDownsample": Heads(
        inputs={"q.proj": 1, "k": 1, "v": 1, "v_local": 1}, **_KEYED
    ),
    "models.efficientvit_mit.LiteMLA": _lite,
    "models.efficientvit_msra.CascadedGroupAttention": Heads(
        inputs={"qkvs": 1, "dws": 1}, why_not="each head has its own channels of the input and feeds the next"
    ),
    "models.eva.EvaAttention": _unless(_norm, Heads(inputs={**_BIASED, **_PROJECTED, "gate": 1}, free_heads=True)),
    "models.fastvit.Attention": _FREE_HEADS,
    # Opaque, because torch-pruning does not terminate on its many splits into gates and contexts.
    "models.focalnet.FocalModulation": Heads(inputs={}, why_not="focal modulation has no heads"),
    "models.gcvit.WindowAttentionGlobal": _gcvit,
    "models.gemma4_vit.Gemma4Attention": Heads(
        inputs=_PROJECTED, output="o_proj", count="num_kv_heads", sizes=("num_heads",)
    ),
    "models.hiera.MaskUnitAttention": Heads(inputs=_QKV, count="heads", sizes=("dim_out",)),
    "models.hieradet_sam2.MultiScaleAttention": _PLAIN,
    "models.levit.Attention": Heads(inputs={"qkv": 1}, **_KEYED),
    "models.levit.AttentionDownsample": Heads(inputs={"kv": 1, "q.ln": 1}, **_KEYED),
    "models.lowformer.ConvAttention": _LOW,
    "models.maxxvit.Attention2d": _maxxvit,
    "models.maxxvit.AttentionCl": _maxxvit,
    "models.metaformer.Attention": Heads(inputs=_QKV, sizes=("attention_dim",), free_heads=True),
    "models.mobilevit.LinearSelfAttention": Heads(inputs={"qkv_proj": 1}, output="out_proj", why_not="it has one head"),
    "models.mvitv2.MultiScaleAttention": _mvit,
    "models.nest.Attention": Heads(inputs=_QKV, heads_last=True, free_heads=True),
    "models.nextvit.EfficientAttention": Heads(inputs=_APART, free_heads=True),
    "models.pvt_v2.Attention": Heads(inputs=_Q_AND_KV, tied=("sr", "norm"), free_heads=True),
    "models.swiftformer.EfficientAdditiveAttention": Heads(
        inputs={"to_query": 1}, output="final", why_not="it has one head"
    ),
    "models.swin_transformer.WindowAttention": Heads(
        inputs=_QKV, per_head={"relative_position_bias_table": 1}, sizes=("attn_dim",)
    ),
    "models.swin_transformer_v2.WindowAttention": Heads(
        inputs={**_BIASED, "cpb_mlp.2": 1}, other_inputs=("cpb_mlp.2",), per_head={"logit_scale": 0}, free_heads=True
    ),
    "models.swin_transformer_v2_cr.WindowMultiHeadAttention": Heads(
        inputs={**_QKV, "meta_mlp.fc2": 1}, other_inputs=("meta_mlp.fc2",), per_head={"logit_scale": 0}, free_heads=True
    ),
    "models.tiny_vit.Attention": Heads(inputs={"qkv": 1}, **_KEYED),
    "models.tnt.Attention": Heads(inputs={"qk": 2, "v": 1}),
    "models.twins.GlobalSubSampleAttn": Heads(inputs=_Q_AND_KV, tied=("sr", "norm"), free_heads=True),
    "models.twins.LocallyGroupedAttn": _FREE_HEADS,
    "models.vision_transformer.DiffParallelScalingBlock": _parallel,
    "models.vision_transformer.ParallelScalingBlock": _parallel,
    "models.vision_transformer_relpos.RelPosAttention": _relpos_vit,
    "models.vision_transformer_sam.Attention": _PLAIN,
    "models.visformer.Attention": _PLAIN,
    "models.volo.Attention": _FREE_HEADS,
    "models.volo.ClassAttention": Heads(inputs=_Q_AND_KV),
    "models.volo.OutlookAttention": Heads(inputs={"v": 1, "attn": 1}, free_heads=True),
    "models.xcit.XCA": _CROSS,
}

TIMM: dict[str, Row] = {f"timm.{name}": row for name, row in _ROWS.items()}
"""Qualified class name -> row."""
