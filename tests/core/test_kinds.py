"""The kinds of units: what is cut unless it is named, and what a wrong name is answered."""

from __future__ import annotations

import pytest
import timm

import slimming
from slimming.core.kinds import KINDS, check_kinds
from slimming.errors import ConfigError
from variants import SMALL


def test_whole_blocks_and_widths_are_left_alone_unless_they_are_named() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    there = {group.kind for group in slimming.describe(model)}
    masked = {group.kind for group in slimming.attach(model).groups}
    assert there - masked >= {"block", "width"}
    assert {name for name, kind in KINDS.items() if kind.on_request} == {"block", "width"}


def test_tokens_are_penalised_a_quarter_as_much_as_other_units() -> None:
    assert {name: kind.penalty for name, kind in KINDS.items() if kind.penalty != 1} == {"token": 0.25}


def test_a_wrong_kind_is_named() -> None:
    check_kinds(KINDS, ConfigError)
    with pytest.raises(ConfigError, match=r"no kind 'tokn'; kinds are head_dim.*Did you mean 'token'"):
        check_kinds(["mlp", "tokn"], ConfigError)
