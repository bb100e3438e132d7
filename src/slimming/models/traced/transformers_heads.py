"""Table of the attention classes of transformers: which layers, tensors and attributes depend on their heads.

Most models share a few layouts. The row of a class that is not in the table is inferred from the names of its layers,
and the verification of the group shows whether it is right.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from slimming.models.traced.free_heads import free_heads_class, has_free_heads
from slimming.models.traced.heads import Heads, Row

COUNTS = ("num_attention_heads", "num_heads", "n_heads")
"""Names of the attribute with the number of heads."""
_PROJECTED = {"q_proj": 1, "k_proj": 1, "v_proj": 1}
_LAYOUTS = (
    Heads(inputs=_PROJECTED, output="o_proj"),
    Heads(inputs=_PROJECTED, output="out_proj"),
    Heads(inputs={"query": 1, "key": 1, "value": 1}, output="proj"),
    # Deformable attention divides its own d_model by the number of heads, so that d_model is a multiple of it.
    Heads(
        inputs={"sampling_offsets": 1, "attention_weights": 1, "value_proj": 1},
        output="output_proj",
        sizes=("d_model",),
    ),
    *(
        Heads(inputs={f"{inner}.{path}": 1 for path in ("query", "key", "value")}, output="output.dense")
        for inner in ("attention", "self")
    ),
)
"""Layers by which a module without a row is recognised; `_completed` adds the other fields."""
_REDUCTIONS = (
    *("sequence_reduction", "spatial_reduction", "layer_norm"),
    *("sequence_reduction.sequence_reduction", "sequence_reduction.layer_norm"),
)
_BIASES = ("relative_position_bias_table", "relative_position_bias.relative_position_bias_table")


def _completed(module: nn.Module, layout: Heads) -> Heads:
    """``layout`` with the number of heads of ``module`` and its other tensors and attributes that depend on them."""
    inner = next(iter(layout.inputs)).rpartition(".")[0]
    owner: Any = module.get_submodule(inner)
    counts = [count for count in COUNTS if type(getattr(owner, count, None)) is int]
    prefix = f"{inner}." if inner else ""
    rows = module.get_submodule(next(iter(layout.inputs))).out_features
    size = getattr(owner, "head_dim", None) or getattr(owner, "attention_head_size", None)
    row = replace(
        layout,
        tied=tuple(f"{prefix}{path}" for path in _REDUCTIONS),
        per_head={f"{prefix}{path}": 1 for path in _BIASES},
        count=f"{prefix}{counts[0]}" if counts else rows // size if size else 1,
        sizes=(*layout.sizes, f"{prefix}all_head_size"),
        free_heads=has_free_heads(module) or free_heads_class(type(module)) is not None,
    )
    key_heads = getattr(owner, "num_key_value_heads", None)
    if type(key_heads) is int and counts and key_heads != getattr(owner, counts[0]):
        # Grouped queries: a unit is a key head with all its query heads.
        return replace(row, count=f"{prefix}num_key_value_heads", sizes=(*row.sizes, f"{prefix}{counts[0]}"))
    return row


def inferred_row(module: nn.Module) -> Heads | None:
    """The row of a transformers module that is not in the table, from the names of its layers; None if unknown."""
    names = {name for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    for layout in _LAYOUTS:
        if {*layout.inputs, layout.output} <= names:
            return _completed(module, layout)
    return None


def _beit_layer(module: Any) -> Heads:
    """A BEiT layer, which holds the position bias of its attention unless all layers of the model share one."""
    return Heads(
        inputs={f"attention.{path}": 1 for path in _PROJECTED},
        output="attention.o_proj",
        per_head={_BIASES[1]: 1},
        count="attention.num_attention_heads",
    )


_BIASED = {"per_head": {"attention_biases": 0}, "sizes": ("out_dim_keys_values", "out_dim_projection")}

_ROWS: dict[str, Row] = {
    "beit.modeling_beit.BeitLayer": _beit_layer,
    "hiera.modeling_hiera.HieraMaskUnitAttention": Heads(inputs={"qkv": 3}, sizes=("hidden_size_output",)),
    "levit.modeling_levit.LevitAttention": Heads(
        inputs={"queries_keys_values": 1}, output="projection", count="num_attention_heads", **_BIASED
    ),
    "levit.modeling_levit.LevitAttentionSubsample": Heads(
        inputs={"keys_values": 1, "queries": 1}, output="projection", count="num_attention_heads", **_BIASED
    ),
    "swinv2.modeling_swinv2.Swinv2Attention": Heads(
        inputs={f"self.{path}": 1 for path in ("query", "key", "value", "continuous_position_bias_mlp.2")},
        other_inputs=("self.continuous_position_bias_mlp.2",),
        output="output.dense",
        per_head={"self.logit_scale": 0},
        count="self.num_attention_heads",
        sizes=("self.all_head_size",),
    ),
    "vitdet.modeling_vitdet.VitDetAttention": Heads(inputs={"qkv": 3}),
}

TRANSFORMERS: dict[str, Row] = {f"transformers.models.{name}": row for name, row in _ROWS.items()}
"""Qualified class name -> row."""
