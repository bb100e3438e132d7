"""Table of timm's gated MLPs and parallel blocks: which layers and attributes depend on their hidden units."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimming.models.traced.mlp import Hidden, HiddenRow


def _glu(module: Any) -> Hidden:
    norm = None if isinstance(module.norm, nn.Identity) else "a norm over all hidden units mixes them"
    return Hidden(inputs={"fc1": 2}, why_not=norm)


def _gated(module: Any) -> Hidden:
    gate = (
        None if isinstance(module.gate, nn.Identity) else "its gate mixes them across tokens and normalises over them"
    )
    return Hidden(inputs={"fc1": 1}, why_not=gate)


def _parallel(module: Any) -> Hidden:
    hidden, width = module.in_split[0], module.in_split[-1]
    output = "mlp_out_proj" if module.out_proj is None else f"out_proj[{width}:]"
    return Hidden(inputs={f"in_proj[:{hidden}]": 1, "mlp_bias": 1}, output=output, sizes=("in_split[0]",))


TIMM_MLPS: dict[str, HiddenRow] = {
    "timm.layers.attention_pool.AttentionPoolLatent": Hidden(inputs={"mlp.fc1": 1}, output="mlp.fc2"),
    "timm.layers.mlp.GatedMlp": _gated,
    "timm.layers.mlp.GluMlp": _glu,
    "timm.models.vision_transformer.DiffParallelScalingBlock": _parallel,
    "timm.models.vision_transformer.ParallelScalingBlock": _parallel,
}
"""Qualified class name -> row."""
