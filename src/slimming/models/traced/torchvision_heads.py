"""Where the attention modules of torchvision and of torch itself keep their heads."""

from __future__ import annotations

from typing import Any

from slimming.models.traced.heads import Heads, Row


def _multihead(module: Any) -> Heads:
    """Torch's own attention: one projection, or three if keys and values have widths of their own."""
    packed = {"in_proj_weight": 3}
    apart = {"q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}
    inputs = {**(apart if module.in_proj_weight is None else packed), "in_proj_bias": 3}
    odd = module.bias_k is not None or module.add_zero_attn
    why = "it adds a key and a value of its own to all heads" if odd else None
    return Heads(inputs=inputs, output="out_proj", free_heads=True, why_not=why)


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
        inputs={"qkv": 3, "cpb_mlp.2": 1}, apart=("cpb_mlp.2",), per_head={"logit_scale": 0}, free_heads=True
    ),
}
"""Full class name -> where its heads are."""
