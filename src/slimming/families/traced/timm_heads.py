"""Where timm's attention modules keep their heads."""

from __future__ import annotations

from slimming.families.traced.heads import Heads

_QKV = Heads(inputs={"qkv": 3})
_MODELS = "timm.models"

TIMM: dict[str, Heads] = {
    f"{_MODELS}.swin_transformer.WindowAttention": Heads(
        inputs={"qkv": 3}, per_head={"relative_position_bias_table": 1}, sizes=("attn_dim",)
    ),
}
"""Full class name -> where its heads are."""
