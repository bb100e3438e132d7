"""Other bases of heads: no output changes, and the first dimensions hold the most."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import slimming
from slimming.core.layout import FREE
from slimming.masks.attachment import prunable
from slimming.models.layers import UnevenAttention
from slimming.models.traced.verification import outputs
from slimming.scoring.rotation import rotate_
from variants import TRACED

from .small import images, vit


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_other_bases_change_no_output(bias: bool) -> None:
    model = vit(qkv_bias=bias)
    other = copy.deepcopy(model)
    rotate_(prunable(other), images())
    assert not torch.allclose(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    for x in images(3):
        torch.testing.assert_close(other(x), model(x), rtol=1e-9, atol=1e-9)


def test_heads_of_several_sizes_are_given_bases() -> None:
    model = vit()
    masks = slimming.attach(model)
    with torch.no_grad():
        for mask in masks.values():
            mask.uniform_(0.5, 1.5)
        for group in masks.of_kind("head_dim"):
            masks[group.name][:5] = 0.01
    small = slimming.cut(model, slimming.plan(masks, slimming.Budget(keep={"head_dim": 0.8}), layout=FREE))
    assert any(isinstance(module, UnevenAttention) for module in small.modules())
    other = copy.deepcopy(small)
    rotate_(prunable(other), images())
    torch.testing.assert_close(other(images()[0]), small(images()[0]), rtol=1e-9, atol=1e-9)


def test_dimensions_are_ordered_by_what_they_add() -> None:
    """Afterwards queries and keys (values and their readers) have one diagonal second moment, which falls."""
    model = vit()
    rotate_(prunable(model), images())
    made: list[Tensor] = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: made.append(output.detach()))
    model(torch.cat(images()))
    q, k, _ = made[0].reshape(-1, 17, 3, 4, 12).unbind(2)
    k = k - k.mean(1, keepdim=True)
    for head in range(4):
        of_q, of_k = (x[:, :, head].reshape(-1, 12) for x in (q, k))
        moments = [x.T @ x / len(x) for x in (of_q, of_k)]
        torch.testing.assert_close(moments[0], moments[1], rtol=1e-5, atol=1e-5)
        diagonal = moments[0].diagonal()
        assert bool((diagonal[1:] <= diagonal[:-1] + 1e-9).all())
        assert float((moments[0] - diagonal.diag()).abs().max()) < 1e-5 * float(diagonal[0])


def test_no_choice_of_dimensions_is_better_than_the_first_ones() -> None:
    """Logits of half of the dimensions: the new basis loses less than any half of the old one that was drawn."""
    model, x = vit(), torch.cat(images())
    rotated = copy.deepcopy(model)
    rotate_(prunable(rotated), images())

    def logits(of: Any, units: list[int]) -> Tensor:
        made: list[Tensor] = []
        handle = of.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: made.append(output.detach()))
        of(x)
        handle.remove()
        q, k, _ = made[0].reshape(len(x), 17, 3, 4, 12).unbind(2)
        found = torch.einsum("bihd,bjhd->bhij", q[..., units], k[..., units])
        return found - found.mean(-1, keepdim=True)

    whole = logits(model, list(range(12)))
    ours = float((logits(rotated, list(range(6))) - whole).square().mean())
    dice = torch.Generator().manual_seed(0)
    for _ in range(20):
        drawn = torch.randperm(12, generator=dice)[:6].tolist()
        assert ours < float((logits(model, drawn) - whole).square().mean())


@pytest.mark.parametrize("name", ["Swin", "ViT of transformers"], ids=str)
def test_heads_of_traced_models_are_turned_too(name: str) -> None:
    model = next(variant for variant in TRACED if variant.id == name).make()
    x = torch.randn(4, *prunable(model).anatomy.input_shape, dtype=torch.float64)
    before, state = outputs(model, x)[0].detach(), copy.deepcopy(model.state_dict())
    rotate_(prunable(model), [x])
    torch.testing.assert_close(outputs(model, x)[0].detach(), before, rtol=1e-9, atol=1e-9)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(state[key], value)}
    assert len(changed) > 4


def test_models_without_such_heads_stay_as_they_are() -> None:
    model = timm.create_model("test_resnet", num_classes=5).eval()
    before = copy.deepcopy(model.state_dict())
    rotate_(prunable(model), [torch.randn(2, *prunable(model).anatomy.input_shape)])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_heads_are_turned_where_sums_have_single_precision_and_images_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("slimming.scoring.rotation", "slimming.models.activations"):
        monkeypatch.setattr(f"{module}.precise", lambda rows: rows.float())
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=5).eval()
    for given in (torch.randn(1, 3, 32, 32), torch.zeros(2, 3, 32, 32), torch.randn(8, 3, 32, 32)):
        turned = copy.deepcopy(model)
        rotate_(prunable(turned), [given])
        with torch.no_grad():
            torch.testing.assert_close(turned(given), model(given), rtol=1e-4, atol=1e-4)
