"""Entries of structures that say what no cut leaves are refused, before anything is changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

import slimming
from campaign.mutations import mutated_value
from slimming.checkpoints.checkpoint import build
from slimming.core.pruning_plan import Plan
from slimming.core.structure import Structure
from slimming.errors import CheckpointError
from slimming.masks.attachment import prunable

from .token_hosts import hf, of_timm

BIG = 2**40


def _cut(model: nn.Module) -> dict[str, Any]:
    """The structure of ``model`` with head dimensions, hidden units, tokens and, in EVA-02, a branch less."""
    groups = slimming.describe(model)
    kept: dict[str, tuple[int, ...]] = {}
    for group in groups:
        if group.kind == "head_dim" and group.role != "qkv":
            size = group.limits.parts[0]
            kept[group.name] = tuple(unit for unit in range(group.size) if unit % size < size * 3 // 4)
        elif group.kind == "mlp":
            kept[group.name] = tuple(range(group.size // 2))
        elif group.kind == "token":
            kept[group.name] = tuple(range(10))
    kept |= {group.name: () for group in groups if group.name == "blocks.1.mlp.branch"}
    sizes = {group.name: group.size for group in groups if group.name in kept}
    return prunable(slimming.cut(model, Plan(kept=kept, sizes=sizes))).anatomy.structure.to_dict()


@pytest.fixture(scope="module")
def beit() -> dict[str, Any]:
    """BEiT: a table over tokens, and values of another size than queries and keys."""
    return _cut(hf("BeitForImageClassification", "BeitConfig", use_relative_position_bias=True)())


@pytest.fixture(scope="module")
def eva() -> dict[str, Any]:
    """EVA-02: rotary tables, and a switch of the host."""
    return _cut(of_timm("eva02_tiny_patch14_224")())


WRONG: dict[str, tuple[str, tuple[Any, ...], Any]] = {
    "another module": ("eva", ("blocks.9",), {"num_heads": 1}),
    "no mapping": ("eva", ("blocks.0.attn",), 3),
    "the model removed": ("eva", ("",), {"removed": ["one", [["input", 0]]]}),
    "another result": ("eva", ("blocks.1.mlp", "removed"), ["one", [["call", 0]]]),
    "two results as one": ("eva", ("blocks.1.mlp", "removed", 1), [["none"], ["none"]]),
    "a negative argument": ("eva", ("blocks.1.mlp", "removed", 1, 0, 1), -1),
    "a larger size": ("eva", ("blocks.0.attn", "num_heads"), BIG),
    "a size of zero": ("eva", ("blocks.0.attn", "num_heads"), 0),
    "a size that is true": ("eva", ("blocks.0.attn", "num_heads"), True),
    "an infinite scale": ("eva", ("blocks.0.attn", "scale"), float("inf")),
    "a switch turned off": ("eva", ("blocks.0.attn", "qkv_bias_separate"), 0),
    "a method": ("eva", ("blocks.0.attn", "forward"), 1),
    "a private attribute": ("eva", ("blocks.0.attn", "_version"), 1),
    "a class": ("eva", ("blocks.0.attn", "__class__"), 1),
    "no parameter": ("eva", ("blocks.0.attn", "tensors", "num_heads"), [1]),
    "a larger tensor": ("eva", ("blocks.0.mlp.fc2", "tensors", "weight", 0), BIG),
    "another rank": ("eva", ("blocks.0.mlp.fc2", "tensors", "weight"), [1]),
    "a negative length": ("eva", ("blocks.0.mlp.fc2", "tensors", "weight", 0), -32),
    "another spent parameter": ("eva", ("blocks.0.attn", "spent"), ["forward"]),
    "free heads": ("eva", ("blocks.0.attn", "free_heads"), 1),
    "heads of no layer": ("beit", ("beit.layers.0", "separate"), [4, 8, 6]),
    "more heads": ("beit", ("beit.layers.0.attention.v_proj", "separate", 0), 5),
    "a huge grid": ("beit", ("beit.layers.0", "tokens", "grid"), BIG),
    "a huge prefix": ("beit", ("beit.layers.0", "tokens", "prefix"), BIG),
    "repeated tokens": ("beit", ("beit.layers.0", "tokens", "positions", 1), 0),
    "other tokens": ("beit", ("beit.layers.1", "tokens", "positions", 9), 15),
    "tokens outside": ("beit", ("beit.layers.0", "tokens", "incoming", 15), 16),
    "a table outside": ("beit", ("beit.layers.0.relative_position_bias", "token_table", "of"), 3),
    "a table of anything": ("beit", ("beit.layers.0.relative_position_bias", "token_table", "index", 0), "0"),
    "no columns": ("eva", ("blocks.0.attn", "input_columns", 0, "index"), []),
    "columns from the end": ("eva", ("blocks.0.attn", "input_columns", 0, "index", 0), -1),
    "columns of an attribute": ("eva", ("blocks.0.attn", "input_columns", 0, "path"), ["__dict__", "a.b"]),
}


@pytest.mark.parametrize(("host", "place", "value"), WRONG.values(), ids=WRONG)
def test_what_no_cut_leaves_is_refused(
    host: str, place: tuple[Any, ...], value: Any, request: pytest.FixtureRequest
) -> None:
    structure = copy.deepcopy(request.getfixturevalue(host))
    holder = structure["layers"]
    for key in place[:-1]:
        holder = holder.setdefault(key, {}) if isinstance(holder, dict) else holder[key]
    holder[place[-1]] = value
    with pytest.raises(CheckpointError, match=r"^The structure (of .* is damaged: |resizes ).*Take an intact copy\.$"):
        build(Structure.from_dict(structure))


def _mutated(structure: dict[str, Any], dice: random.Random) -> Iterator[Any]:
    while True:
        layers = mutated_value({"layers": structure["layers"]}, dice).get("layers")
        if isinstance(layers, dict):
            yield {**structure, "layers": layers}


@pytest.mark.parametrize("host", ["beit", "eva"], ids=str)
def test_changed_entries_are_read_or_refused_in_a_sentence(host: str, request: pytest.FixtureRequest) -> None:
    structure = request.getfixturevalue(host)
    assert build(Structure.from_dict(structure))
    mutated = _mutated(structure, random.Random(0))
    refusals = []
    for _ in range(60):
        try:
            build(Structure.from_dict(next(mutated)))
        except CheckpointError as error:
            refusals.append(str(error))
    assert len(refusals) > 40
    assert max(map(len, refusals)) < 600
