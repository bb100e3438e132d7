"""Settings that were saved against those that are given: what differs, and how it is said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from slimming.core.same_settings import SHOWN, check_same_settings, differing
from slimming.errors import ConfigError

BEFORE = {"name": "a", "model": {"name": "vit"}, "train": {"lr": 0.1, "workers": 0, "ema": None}}


def message(before: Mapping[str, object], now: Mapping[str, object], again: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check_same_settings(Path("out"), before, now, again=again)
    return str(caught.value)


def test_the_same_settings_pass() -> None:
    now = {"name": "a", "model": {"name": "vit"}, "train": {"lr": 0.1, "workers": 0}}
    assert differing(BEFORE, now) == {}
    check_same_settings(Path("out"), BEFORE, now)


def test_free_settings_may_differ_wherever_they_are_and_free_sections_at_the_top_only() -> None:
    now = {"name": "b", "model": {"name": "resnet"}, "train": {"lr": 0.1, "workers": 4}}
    assert differing(BEFORE, now, free=("workers",), free_sections=("name",)) == {"model.name": ("vit", "resnet")}
    assert set(differing(BEFORE, now)) == {"name", "model.name", "train.workers"}


def test_every_setting_that_differs_is_named_with_both_values_and_no_other() -> None:
    now = {**BEFORE, "train": {"lr": 0.2, "workers": 0, "ema": 0.99}, "new": {"x": 1}}
    assert message(BEFORE, now, "slimming run out/config.yaml") == (
        "out was started with other settings:\n"
        "  new.x: null (now 1)\n"
        "  train.ema: null (now 0.99)\n"
        "  train.lr: 0.1 (now 0.2)\n"
        "Go on with the same settings (slimming run out/config.yaml), or give another directory."
    )


def test_only_what_differs_in_nested_lists_and_mappings_is_listed() -> None:
    penalty = {"head_dim": 0.5, "mlp": 0.25}
    before = {"search": {"penalty": penalty}, "budgets": [{"macs": 0.5, "keep": {"mlp": 0.7}}, {"macs": 0.3}], "s": [1]}
    now = {"search": {"penalty": {**penalty, "mlp": 1}}, "budgets": [{"macs": 0.5, "keep": {"mlp": 0.6}}], "s": (1,)}
    assert message(before, now).splitlines()[1:-1] == [
        "  budgets[0].keep.mlp: 0.7 (now 0.6)",
        "  budgets[1].macs: 0.3 (now null)",
        "  search.penalty.mlp: 0.25 (now 1)",
    ]
    assert differing(before, now, free_sections=("budgets", "search")) == {}


def test_long_values_and_many_settings_are_cut_short() -> None:
    before = {f"s{number}": "x" * 200 for number in range(SHOWN + 3)}
    text = message(before, {})
    assert text.count("(now null)") == SHOWN
    assert "  and 3 more\nGo on" in text
    assert len(text) < SHOWN * 90
