"""Tokens of models that are read by tracing: found, masked, removed exactly, saved, slimmed again, exported."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimming
from slimming.core.groups import Group
from slimming.errors import UnsupportedModelError
from slimming.masks.attachment import prunable
from slimming.models.token_masks import MaskedTokens, TokenGate, plain_mask
from slimming.models.traced.tokens import fixed_ends
from slimming.models.traced.verification import outputs
from slimming.pruning.checks import Trial, distance

from .token_hosts import OFFERED, REFUSED, OwnViT


def token_groups(model: nn.Module) -> list[Group]:
    return [group for group in slimming.describe(model) if group.kind == "token"]


@pytest.mark.parametrize("name", OFFERED, ids=list(OFFERED))
def test_tokens_are_removed_exactly_and_the_slim_model_loads(name: str) -> None:
    make, (prefix, size, suffix) = OFFERED[name]
    model = make()
    groups = token_groups(model)
    sites = [group.token for group in groups if group.token is not None]
    assert [(site.prefix, group.size, site.suffix) for site, group in zip(sites, groups, strict=True)] == [
        (prefix, size, suffix)
    ] * 2
    trial = Trial(prunable(model), keep=0.6)
    trial.exact()
    assert len(trial.plan.kept[groups[-1].name]) < size
    trial.costs()
    trial.reload()


@pytest.mark.parametrize("name", REFUSED, ids=list(REFUSED))
def test_models_that_need_the_grid_say_why(name: str) -> None:
    make, reason = REFUSED[name]
    anatomy = prunable(make()).anatomy
    assert not any(group.kind == "token" for group in anatomy.groups)
    assert any("token positions" in line and reason in line for line in anatomy.uncovered), anatomy.uncovered


def removed(model: nn.Module, *counts: int) -> slimming.Plan:
    """A plan that keeps every unit but the first ``counts`` tokens of each block."""
    groups = token_groups(model)
    kept = {group.name: tuple(range(count, group.size)) for group, count in zip(groups, counts, strict=True)}
    return slimming.Plan(kept=kept, sizes={group.name: group.size for group in groups})


def test_a_slim_model_is_a_plain_module_that_copies_pickles_and_is_slimmed_again() -> None:
    model = OFFERED["timm BEiT"][0]().double()
    small = slimming.cut(model, removed(model, 3, 5))
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = small(image)
    assert list(small.state_dict()) == list(model.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    assert torch.equal(copy.deepcopy(small)(image), expected)
    assert torch.equal(pickle.loads(pickle.dumps(small))(image), expected)
    groups = token_groups(small)
    assert [group.size for group in groups] == [13, 11]
    assert groups[1].token is not None
    assert groups[1].token.positions == tuple(range(5, 16))
    again = slimming.cut(small, removed(small, 2, 0))
    at_once = slimming.cut(model, removed(model, 5, 5))
    assert torch.equal(again(image), at_once(image))


def test_models_without_other_tokens_at_other_places_are_read_anew() -> None:
    model = OFFERED["transformers ViT"][0]()
    groups = token_groups(model)
    sizes = {group.name: group.size for group in groups}
    for place in (0, 7):
        left = tuple(unit for unit in range(16) if unit != place)
        small = slimming.cut(model, slimming.Plan(kept={groups[0].name: left}, sizes={groups[0].name: 16}))
        again = token_groups(small)[0]
        assert again.token is not None
        assert again.token.positions == left
    assert sizes == {group.name: 16 for group in groups}


def test_another_image_size_and_methods_over_the_grid_say_why() -> None:
    model: Any = OFFERED["timm EVA02, rotary"][0]()
    small: Any = slimming.cut(model, removed(model, 0, 4))
    with pytest.raises(UnsupportedModelError, match="needs the full grid of tokens"):
        small.forward_intermediates(torch.zeros(1, 3, 32, 32))
    model = OFFERED["transformers ViT"][0]()
    small = slimming.cut(model, removed(model, 2, 4))
    with pytest.raises(UnsupportedModelError, match="sequences of 17 tokens here, but this image has 65"):
        small(torch.zeros(1, 3, 64, 64), interpolate_pos_encoding=True)


def test_masks_do_not_pass_over_images_of_another_size() -> None:
    model: Any = OFFERED["transformers BEiT, relative bias per block"][0]()  # takes images of any size
    images = [torch.zeros(1, 3, 64, 64)]
    with pytest.raises(UnsupportedModelError, match="masked for sequences of 17"):
        slimming.score(model, images)
    assert slimming.score(model, images, kinds=["head_dim"])


def test_tokens_that_the_model_returns_are_removed_on_request_only() -> None:
    model = OFFERED["transformers DeiT with its tokens returned"][0]()
    masks = slimming.attach(model)
    assert not any(group.kind == "token" for group in masks.groups)
    masks.detach_()
    image = torch.randn(1, 3, 32, 32)
    small: Any = slimming.cut(model, removed(model, 0, 6))
    assert small(image).last_hidden_state.shape == (1, 12, 32)


def test_tokens_are_scored_and_planned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OwnViT()
    images = [torch.randn(8, 3, 32, 32)]
    scores = slimming.score(model, images)
    plan = slimming.plan(scores, slimming.Budget(keep={"token": 0.5}))
    small = slimming.cut(model, plan)
    assert sum(group.size for group in token_groups(small)) == 16
    slimming.save(small, tmp_path / "slim")
    loaded = slimming.load(tmp_path / "slim", dense=OwnViT())
    assert torch.equal(loaded(images[0]), small(images[0]))


def test_a_slim_model_is_exported() -> None:
    model = OFFERED["transformers DINOv3, rotary"][0]()
    small = slimming.cut(model, removed(model, 3, 5))
    image = torch.randn(1, 3, 32, 32)
    program = torch.export.export(small, (image,))
    assert distance(outputs(program.module(), image), outputs(small, image)) < 1e-5


def test_a_masked_model_compiles() -> None:
    model = OFFERED["own ViT"][0]()
    masks = slimming.attach(model, token_groups(model))
    with torch.no_grad():
        masks["layers.1.tokens"][:4] = 0
    image = torch.randn(2, 3, 32, 32)
    expected = model(image)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(image), expected, atol=1e-6)


def attention(q: Tensor, k: Tensor, v: Tensor, how: str) -> Tensor:
    if how == "fused":
        return F.scaled_dot_product_attention(q, k, v)
    if how == "fused with a mask":
        return F.scaled_dot_product_attention(q, k, v, torch.ones(1, k.shape[-2], dtype=torch.bool))
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (torch.softmax(logits, -1) if how == "torch.softmax" else logits.softmax(dim=-1)) @ v


HOW = ("fused", "fused with a mask", "torch.softmax", "method")


@pytest.mark.parametrize("how", HOW, ids=HOW)
def test_masked_keys_equal_removed_keys(how: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 7, 4, dtype=torch.float64)
    gate = TokenGate([(torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64), None)], 1, 2)
    left = [0, 1, 3, 5, 6]
    with MaskedTokens(gate, plain_mask, pools=True) as mode:
        masked = attention(q, k, v, how)
    assert mode.used
    torch.testing.assert_close(masked, attention(q, k[..., left, :], v[..., left, :], how))


@pytest.mark.parametrize("packed", [True, False], ids=["without weights", "with weights"])
def test_masked_keys_of_multihead_attention_equal_removed_keys(packed: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    gate = TokenGate([(torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64), None)], 1)
    with MaskedTokens(gate, plain_mask, pools=False):
        masked, _ = layer(x, x, x, need_weights=not packed)
    kept = x[:, [0, 2, 3]]
    torch.testing.assert_close(masked, layer(x, kept, kept, need_weights=False)[0])


def test_masked_means_equal_means_of_the_rest() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    gate = TokenGate([(torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64), None)], 1)
    with MaskedTokens(gate, plain_mask, pools=True):
        found = [x.mean(1), x[:, 1:].mean(dim=1), F.adaptive_avg_pool1d(x.transpose(1, 2), 1).squeeze(-1)]
    wanted = [x[:, [0, 1, 3, 5]].mean(1), x[:, [1, 3, 5]].mean(1), x[:, [0, 1, 3, 5]].mean(1)]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("differs", "ends"),
    [
        ([0, 1, 1, 1], (1, 0, 3)),
        ([0, 0, 1, 1, 0], (2, 1, 2)),
        ([1, 1, 1], (0, 0, 3)),
        ([0, 0], (2, 0, 0)),
        ([0, 1, 0, 1], (1, 0, None)),
    ],
    ids=["class token", "both ends", "patches only", "no patches", "in the middle"],
)
def test_tokens_that_do_not_depend_on_the_image_are_fixed(differs: list[int], ends: tuple[int, ...]) -> None:
    sequence = torch.zeros(2, len(differs), 3)
    sequence[1] = torch.tensor(differs)[:, None]
    assert fixed_ends(sequence) == ends
