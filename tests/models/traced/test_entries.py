"""What a file says about a slim model is checked before anything is resized."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

import slimming
from slimming.core.pruning_plan import Plan
from slimming.core.structure import Structure
from slimming.errors import CheckpointError
from slimming.models.families import build
from slimming.models.family import STRUCTURE

from .token_hosts import of_timm

BLOCK, ATTENTION, QKV, FC1 = "blocks.0", "blocks.0.attn", "blocks.0.attn.qkv", "blocks.0.mlp.fc1"


@cache
def structure() -> dict[str, Any]:
    """A small EVA-02 without some tokens, rotary pairs, hidden units and its last MLP."""
    model = of_timm("eva02_tiny_patch14_224")()
    kept: dict[str, tuple[int, ...]] = {}
    groups = [group for group in slimming.describe(model) if group.role not in ("head", "qkv")]
    for group in groups:
        if group.token is not None:
            kept[group.name] = tuple(range(2, group.size))
        elif group.role == "branch" and group.name.startswith("blocks.1.mlp"):
            kept[group.name] = ()
        elif group.kind == "head_dim":
            size = group.size // len(group.limits.parts)
            kept[group.name] = tuple(unit for unit in range(group.size) if unit % size < size - 1)
        elif group.kind == "mlp":
            kept[group.name] = tuple(range(group.size // 2))
    sizes = {group.name: group.size for group in groups if group.name in kept}
    return vars(slimming.cut(model, Plan(kept=kept, sizes=sizes)))[STRUCTURE].to_dict()


def huge(layers: Any) -> None:
    layers[FC1]["tensors"]["weight"][0] = 10**9


def other_rank(layers: Any) -> None:
    layers[FC1]["tensors"]["weight"].append(1)


def no_module(layers: Any) -> None:
    layers["blocks.9.mlp"] = {"out_features": 2}


def no_size(layers: Any) -> None:
    layers[FC1]["__class__"] = 1


def larger(layers: Any) -> None:
    layers[FC1]["out_features"] = 10**6


def a_text(layers: Any) -> None:
    layers[FC1]["out_features"] = "8"


def no_number(layers: Any) -> None:
    layers[ATTENTION]["scale"] = float("nan")


def no_tensor(layers: Any) -> None:
    layers[FC1]["tensors"]["forward"] = [2, 2]


def repeated_token(layers: Any) -> None:
    layers[BLOCK]["tokens"]["positions"][1] = layers[BLOCK]["tokens"]["positions"][0]


def token_outside(layers: Any) -> None:
    layers[BLOCK]["tokens"]["positions"][-1] = 10**6


def many_tokens(layers: Any) -> None:
    layers[BLOCK]["tokens"]["prefix"] = 10**12


def repeated_column(layers: Any) -> None:
    layers[ATTENTION]["input_columns"][0]["index"][1] = layers[ATTENTION]["input_columns"][0]["index"][0]


def no_column(layers: Any) -> None:
    layers[ATTENTION]["input_columns"][0]["index"] = []


def no_result(layers: Any) -> None:
    layers["blocks.1.mlp"]["removed"] = ["one", [["call", "__reduce__"]]]


def many_results(layers: Any) -> None:
    layers["blocks.1.mlp"]["removed"][1] *= 2


def no_entry(layers: Any) -> None:
    layers[FC1] = [1]


def parts_of_other_rows(layers: Any) -> None:
    layers[QKV]["separate"] = [2, 8, 8, 8, 3]


CHANGES: list[Callable[[Any], None]] = [
    huge, other_rank, no_module, no_size, larger, a_text, no_number, no_tensor, repeated_token, token_outside,
    many_tokens, repeated_column, no_column, no_result, many_results, no_entry, parts_of_other_rows,
]  # fmt: skip


def test_the_structure_has_all_that_is_changed_below() -> None:
    layers = structure()["layers"]
    assert {"tokens", "input_columns", "removed", "tensors"} <= {key for entry in layers.values() for key in entry}
    build(Structure.from_dict(structure()))


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__.replace("_", " ") for change in CHANGES])
def test_a_damaged_entry_is_refused(change: Callable[[Any], None]) -> None:
    content = copy.deepcopy(structure())
    change(content["layers"])
    with pytest.raises(CheckpointError, match="intact copy"):
        build(Structure.from_dict(content))
