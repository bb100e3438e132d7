"""Attention in classes of the user's own is read by what it computes, cut exactly, and its row is said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import slimming
from models.traced.own_attention import (
    Grouped,
    Inferred,
    KeysAndValues,
    Packed,
    Rotary,
    Separate,
    TalkingHeads,
    Vit,
    WithAdapters,
)
from slimming.cli import entry
from slimming.core.budget import Budget
from slimming.masks.attachment import prunable

READ: dict[str, tuple[type[nn.Module], int, str]] = {
    "packed": (Packed, 4, "Heads(inputs={'to_qkv': 3}, output='to_out.0', count='heads')"),
    "keys and values": (KeysAndValues, 4, "Heads(inputs={'to_q': 1, 'to_kv': 2}, output='to_out', count='heads')"),
    "separate": (Separate, 4, "Heads(inputs={'query': 1, 'key': 1, 'value': 1}, output='out', count='n_head')"),
    "head size inferred from the width": (
        Inferred,
        4,
        "Heads(inputs={'qkv': 3}, per_head={'temperature': 0}, free_heads=True, output='proj')",
    ),
    "rotary": (Rotary, 4, "Heads(inputs={'mix': 1}, output='back', count='count')"),
    "grouped queries": (
        Grouped,
        2,
        (
            "Heads(inputs={'q_proj': 1, 'k_proj': 1, 'v_proj': 1}, output='o_proj', count='num_kv_heads', "
            "sizes=('num_heads',))"
        ),
    ),
    "adapters": (
        WithAdapters,
        4,
        (
            "Heads(inputs={'to_q.base_layer': 1, 'to_q.lora_B.default': 1, 'to_kv.base_layer': 2, "
            "'to_kv.lora_B.default': 2}, output='to_out.base_layer', other_outputs=('to_out.lora_A.default',), "
            "count='heads')"
        ),
    ),
}
"""Name -> attention, number of units, and the row that is inferred."""


@pytest.mark.parametrize(("attention", "units", "row"), READ.values(), ids=READ)
def test_heads_are_read_and_cut_exactly_and_the_row_is_said(attention: type[nn.Module], units: int, row: str):
    torch.manual_seed(0)
    model = Vit(attention)
    heads = [group for group in slimming.describe(model) if group.kind == "head"]
    assert [(group.name, group.size) for group in heads] == [(f"blocks.{n}.mixer.heads", units) for n in (0, 1)]
    found = slimming.check(model)
    # A model of the user's own is loaded with a dense one, which `check` does not have.
    assert all(step.held for step in found.steps[:2]), str(found)
    assert found.covered_macs > 0.9, str(found)
    (sentence,) = [line for line in str(found).splitlines() if line.startswith("read by what it computes")]
    expected = f"heads of blocks.0.mixer and 1 more as with register({attention.__name__}, {row})"
    assert fields(sentence) == fields(f"read by what it computes: {expected}")


def fields(sentence: str) -> set[str]:
    """The parts of a row, whose order does not matter."""
    return set(re.split(r"[(){}, ]+", sentence))


def test_check_and_inspect_say_the_row(monkeypatch: pytest.MonkeyPatch, capsys):
    sentence = "read by what it computes: heads of blocks.0.mixer and 1 more as with register(Packed, Heads("
    assert sentence in str(slimming.check(Vit(Packed)))
    monkeypatch.setattr("slimming.cli.models.open_named", lambda *_, **__: Vit(Packed))
    entry.main(["inspect", "own"])
    assert sentence in capsys.readouterr().out


def test_heads_that_talk_are_named():
    uncovered = "\n".join(prunable(Vit(TalkingHeads)).anatomy.uncovered)
    assert "talking heads" in uncovered
    assert "add-a-model.md" in uncovered


def test_a_slim_model_is_saved_and_loaded_with_a_dense_one(tmp_path: Path):
    torch.manual_seed(0)
    model = Vit(WithAdapters).eval()
    images = torch.rand(2, 3, 16, 16)
    scored = slimming.score(model, [images])
    plan = slimming.plan(scored, Budget(macs=0.5))
    slim = slimming.cut(scored.model, plan, images=[images]).eval()
    slimming.save(slim, tmp_path / "slim")
    again = slimming.load(tmp_path / "slim", dense=Vit(WithAdapters)).eval()
    assert torch.equal(again(images), slim(images))
