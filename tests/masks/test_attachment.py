"""Which groups get masks, and what masks of few groups and few blocks do."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import slimming
from slimming.errors import PlanError
from slimming.masks import tokens
from slimming.masks.attachment import independent, joint, prunable
from slimming.masks.soft_masks import SoftMasks
from variants import SMALL

COUPLED, QUERIES, VALUES = "blocks.0.attn.qkv", "blocks.0.attn.qk", "blocks.0.attn.v"


def vit(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **{**SMALL, **arguments}).eval()


def test_queries_and_values_are_one_group_or_two() -> None:
    model = vit(depth=1)
    apart, coupled = ([group.name for group in slimming.describe(model, coupled=one)] for one in (False, True))
    assert {QUERIES, VALUES} <= set(apart)
    assert COUPLED not in apart
    assert COUPLED in coupled
    assert not {QUERIES, VALUES} & set(coupled)
    others = [name for name in apart if name not in (QUERIES, VALUES)]
    assert [name for name in coupled if name != COUPLED] == others
    assert len(others) >= 3


def test_attentions_without_a_coupled_group_keep_two() -> None:
    groups = prunable(vit(depth=2)).anatomy.groups
    some = [group for group in groups if group.name != "blocks.1.attn.qkv"]
    names = {group.name for group in joint(some)}
    assert names == {group.name for group in some} - {QUERIES, VALUES}
    assert {group.name for group in independent(some)} == {group.name for group in some} - {COUPLED}


def attached(model: nn.Module, *kinds: str) -> SoftMasks:
    return slimming.attach(model, [group for group in slimming.describe(model) if group.kind in kinds])


def test_scores_are_collected_where_a_kind_has_one_group() -> None:
    model = vit(depth=1)
    masks = attached(model, "mlp", "token")
    assert len(masks) == 2
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    masks.before_step()
    scores = masks.scores("taylor")
    assert set(scores) == {"blocks.0.mlp.hidden", "blocks.0.tokens"}
    assert all(bool((score > 0).any()) for score in scores.values())


def test_a_plan_may_name_groups_without_masks_that_it_leaves_whole() -> None:
    model = vit(depth=1)
    masks = attached(model, "mlp")
    hidden = {"blocks.0.mlp.hidden": tuple(range(0, 192, 2))}
    heads = {"blocks.0.attn.heads": 3}
    masks.apply_(
        slimming.Plan(kept={**hidden, "blocks.0.attn.heads": (0, 1, 2)}, sizes=heads | dict.fromkeys(hidden, 192))
    )
    assert int((masks["blocks.0.mlp.hidden"] == 0).sum()) == 96
    with pytest.raises(PlanError, match=r"'blocks\.0\.attn\.heads', which has no mask"):
        masks.apply_(slimming.Plan(kept={"blocks.0.attn.heads": (0, 1)}, sizes=heads))


@pytest.mark.parametrize("depth", [1, 2, 3], ids=str)
def test_the_mean_over_tokens_leaves_out_those_that_any_block_lost(depth: int) -> None:
    model = vit(depth=depth, global_pool="avg", class_token=False)
    masks = attached(model, "token")
    kept = {f"blocks.{at}.tokens": tuple(range(at + 1, 16)) for at in range(depth)}
    plan = slimming.Plan(kept=kept, sizes=dict.fromkeys(kept, 16))
    masks.apply_(plan)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(image), slimming.cut(model, plan)(image), rtol=1e-4, atol=1e-4)


def test_private_operators_are_used_only_where_a_mask_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = tokens.KeyBiased.apply
    monkeypatch.setattr(tokens.KeyBiased, "apply", lambda *given: calls.append(1) or real(*given))
    model = vit(depth=1)
    masks = attached(model, "token")
    image = torch.randn(1, 3, 32, 32)
    learns = model(image)
    assert calls == [1]
    with torch.no_grad():
        torch.testing.assert_close(model(image), learns)
    masks["blocks.0.tokens"].requires_grad_(False)
    torch.testing.assert_close(model(image), learns)
    assert calls == [1]
