"""Table of the attention classes of torchvision and torch: which layers and tensors depend on their heads."""

from __future__ import annotations

from typing import Any

from slimming.models.traced.heads import Heads, Row


def _multihead(module: Any) -> Heads:
    """``nn.MultiheadAttention``: one joint projection, or three if keys and values have other widths than queries."""
    packed = {"in_proj_weight": 3}
    separate = {"q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}
    inputs = {**(separate if module.in_proj_weight is None else packed), "in_proj_bias": 3}
    extra_key = module.bias_k is not None or module.add_zero_attn
    why_not = "it adds a key and a value to all heads (add_bias_kv or add_zero_attn)" if extra_key else None
    return Heads(inputs=inputs, output="out_proj", free_heads=True, why_not=why_not)


_SWIN = {"inputs": {"qkv": 3}, "per_head": {"relative_position_bias_table": 1}}

TORCHVISION: dict[str, Row] = {
    "slimming.models.layers.SomeHeadsAttention": _multihead,
    "torch.nn.modules.activation.MultiheadAttention": _multihead,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": Heads(
        inputs={"to_qkv": 3},
        output="merge",
        per_head={"relative_position_bias_table": 1},
        count="n_heads",
        free_heads=True,
    ),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": Heads(**_SWIN, free_heads=True),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": Heads(
        inputs={"qkv": 3, "cpb_mlp.2": 1}, other_inputs=("cpb_mlp.2",), per_head={"logit_scale": 0}, free_heads=True
    ),
}
"""Qualified class name -> row."""
