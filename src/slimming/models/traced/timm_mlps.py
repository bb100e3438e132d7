"""Table of timm's gated MLPs and parallel blocks: which layers and attributes depend on their hidden units."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimming.models.traced.mlp import Hidden, HiddenRow


def _gated(module: Any) -> Hidden:
    if isinstance(module.gate, nn.Identity):
        return Hidden(inputs={"fc1": 1}, norms=("norm",))
    # The gate mixes tokens, and multiplies one half of the units by the other.
    return Hidden(inputs={"fc1": 2}, norms=("gate.norm", "norm"))


def _gated_conv(module: Any) -> tuple[Hidden, Hidden]:
    """MambaOut: each unit has a gate; the last ones pass a depthwise convolution, the first ones do not."""
    hidden, plain, _ = module.split_indices
    first = Hidden(
        inputs={f"fc1[:{plain}]": 1, f"fc1[{hidden}:{hidden + plain}]": 1},
        output=f"fc2[:{plain}]",
        sums=("split_indices[0]", "split_indices[1]"),
    )
    second = Hidden(
        inputs={f"fc1[{plain}:{hidden}]": 1, f"fc1[{hidden + plain}:]": 1, "conv": 1},
        output=f"fc2[{plain}:]",
        sums=("split_indices[0]", "split_indices[2]"),
        name="channels",
    )
    return (first, second)


def _parallel(module: Any) -> Hidden:
    hidden, width = module.in_split[0], module.in_split[-1]
    output = "mlp_out_proj" if module.out_proj is None else f"out_proj[{width}:]"
    return Hidden(inputs={f"in_proj[:{hidden}]": 1, "mlp_bias": 1}, output=output, sizes=("in_split[0]",))


TIMM_MLPS: dict[str, HiddenRow] = {
    "timm.layers.attention_pool.AttentionPoolLatent": Hidden(inputs={"mlp.fc1": 1}, output="mlp.fc2"),
    "timm.layers.mlp.GatedMlp": _gated,
    "timm.layers.mlp.GluMlp": Hidden(inputs={"fc1": 2}, norms=("norm",)),
    "timm.models.mambaout.GatedConvBlock": _gated_conv,
    "timm.models.vision_transformer.DiffParallelScalingBlock": _parallel,
    "timm.models.vision_transformer.ParallelScalingBlock": _parallel,
}
"""Qualified class name -> row."""
