"""Formulas against hand counts and explicit references: costs, penalties, scores, the paper's masks, tokens.

Masks are float32, so that a factor that is neither 0 nor 1 is right to 1e-6 only, also in a float64 model.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import slimming
from slimming.core.budget import Budget
from slimming.core.layout import FREE
from slimming.core.pruning_plan import Plan
from slimming.counting.measured import count
from slimming.errors import ConfigError
from slimming.masks.attachment import prunable
from slimming.masks.parametrization import original
from variants import VARIANTS, distance, draw, image

BY_ID = {variant.id: variant for variant in VARIANTS}


def groups_of(model: nn.Module, *roles: str) -> list[Any]:
    return [group for group in prunable(model).anatomy.groups if group.role in roles]


def test_deit_small_by_hand() -> None:
    """Width 384, 12 blocks of 6 heads of 64 and 1536 hidden units, 197 tokens, 1000 classes."""
    model = timm.create_model("deit_small_patch16_224")
    cost = slimming.cost(model)
    width, hidden, tokens, patches = 384, 1536, 197, 196
    attention = width * 3 * width + 3 * width + width * width + width
    mlp = width * hidden + hidden + hidden * width + width
    block = attention + mlp + 4 * width
    stem = 3 * 16 * 16 * width + width + width + tokens * width
    assert cost.params == stem + 12 * block + 2 * width + width * 1000 + 1000 == 22_050_664
    per_block = tokens * (4 * width * width + 2 * width * hidden) + 2 * tokens * tokens * width
    macs = patches * 3 * 16 * 16 * width + 12 * per_block + width * 1000
    assert cost.macs == macs
    assert round(macs / 1e9, 1) == 4.6
    # The widest moment is an MLP of a deeper block: the first block's input, its own, the sum after attention,
    # the normed copy, and the hidden units before and after the activation.
    assert cost.memory_bytes == 4 * (cost.params + tokens * (4 * width + 2 * hidden))
    assert cost.groups["blocks.3.mlp.hidden"].params == 2 * width * hidden + hidden
    assert cost.groups["blocks.3.mlp.hidden"].macs == 2 * tokens * width * hidden
    assert cost.groups["blocks.3.attn.qk"].params == 2 * (width + 1) * width
    assert cost.groups["blocks.3.attn.qk"].macs == tokens * width * (2 * width + tokens)
    assert cost.groups["blocks.3.attn.v"].params == (width + 1) * width + width * width
    assert cost.groups["blocks.3.attn.heads"].params == cost.groups["blocks.3.attn.qkv"].params == attention - width


def test_a_plan_of_deit_small_by_hand() -> None:
    model = timm.create_model("deit_small_patch16_224")
    kept = {"blocks.0.mlp.hidden": tuple(range(100)), "blocks.11.tokens": tuple(range(50))}
    cost = slimming.cost(model, Plan(kept=kept, sizes={"blocks.0.mlp.hidden": 1536, "blocks.11.tokens": 196}))
    dense = slimming.cost(model)
    assert dense.params - cost.params == 1436 * (2 * 384 + 1)
    fewer = 197 - 51
    last = fewer * (4 * 384 * 384 + 2 * 384 * 1536) + 2 * (197 * 197 - 51 * 51) * 384
    assert dense.macs - cost.macs == 1436 * 2 * 384 * 197 + last
    half = slimming.cost(copy.deepcopy(model).half())
    assert half.memory_bytes * 2 == dense.memory_bytes


def test_the_papers_penalty_is_a_sum_with_tanh_on_tokens() -> None:
    model = BY_ID["plain"].make()
    weights = {"head_dim": 2e-4, "mlp": 5e-5, "token": 1e-4}
    masks = slimming.attach(model, groups_of(model, "qkv", "mlp", "token"), tokens="multiply", penalty=weights)
    masks.penalty_sum = True
    assert all(bool((mask == 3.0).all()) for name, mask in masks.items() if name.endswith("tokens"))
    with torch.no_grad():
        for mask in masks.values():
            mask.copy_(torch.randn(mask.shape, generator=torch.Generator().manual_seed(len(mask))))
    by_hand = sum(
        weights["token"] * math.tanh(abs(value))
        if name.endswith("tokens")
        else weights["mlp" if name.endswith("hidden") else "head_dim"] * abs(value)
        for name, mask in masks.items()
        for value in mask.tolist()
    )
    assert masks.penalty().item() == pytest.approx(by_hand, rel=1e-5)


def test_the_default_penalty_is_a_mean_per_kind() -> None:
    model = BY_ID["plain"].make()
    masks = slimming.attach(model, penalty={"head_dim": 2.0, "mlp": 3.0, "token": 0.5})
    assert masks.penalty().item() == pytest.approx(5.5)
    assert {kind: value.item() for kind, value in masks.penalties().items()} == pytest.approx(
        {"head_dim": 2.0, "mlp": 3.0, "token": 0.5}
    )
    with torch.no_grad():
        masks["blocks.0.mlp.hidden"].fill_(-0.5)
        masks["blocks.0.tokens"].fill_(-1.0)  # the same as 0 for a token
    assert {kind: value.item() for kind, value in masks.penalties().items()} == pytest.approx(
        {"head_dim": 2.0, "mlp": 2.25, "token": 0.25}
    )
    masks.penalty().backward()
    gradient = masks["blocks.0.mlp.hidden"].grad
    assert gradient is not None
    assert torch.allclose(gradient, torch.full_like(gradient, -3.0 / 384))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), torch.tensor([3, 1]))


@pytest.mark.parametrize("tokens", ["bias", "multiply"], ids=str)
def test_taylor_scores_are_the_change_of_the_loss(tokens: str) -> None:
    """collect() must give (factor x d loss / d factor) of the task's loss alone, here by finite differences."""
    model = BY_ID["plain"].make()
    x = image(model)
    masks = slimming.attach(model, tokens=tokens)
    with torch.no_grad():
        for name, mask in masks.items():
            low, high = (0.5, 2.0) if name.endswith("tokens") else (0.4, 1.3)
            mask.copy_(torch.linspace(low, high, len(mask)))
    (loss_of(model, x) + masks.penalty()).backward()
    masks.collect()
    scores = masks.scores("taylor")
    for group in masks.groups:
        mask = masks[group.name]
        for unit in (0, group.size // 2, group.size - 1):
            raw = float(mask[unit].item())
            factor = math.tanh(raw) if tokens == "multiply" and group.token is not None else raw
            step = 1e-3 * factor
            values = []
            for moved in (factor + step, factor - step):
                with torch.no_grad():
                    mask[unit] = math.atanh(moved) if factor != raw else moved
                    # The steps that float32 holds, which are not quite those asked for.
                    real = math.tanh(mask[unit].item()) if factor != raw else mask[unit].item()
                    values.append((real, loss_of(model, x).item()))
            with torch.no_grad():
                mask[unit] = raw
            slope = (values[0][1] - values[1][1]) / (values[0][0] - values[1][0])
            found = float(scores[group.name][unit])
            assert found == pytest.approx(abs(factor * slope), rel=2e-3, abs=2e-6), (group.name, unit)


def test_taylor_scores_average_squares_and_restart_exactly() -> None:
    model = BY_ID["plain"].make()
    masks = slimming.attach(model, groups_of(model, "mlp"), penalty={"mlp": 0.0})
    squares = []
    for seed in range(3):
        model.zero_grad()
        loss_of(model, image(model, seed=seed)).backward()
        masks.collect()
        gradient = masks["blocks.0.mlp.hidden"].grad
        assert gradient is not None
        squares.append(gradient.square())
    average = squares[0]
    for square in squares[1:]:
        average = 0.99 * average + 0.01 * square
    assert distance(masks.scores()["blocks.0.mlp.hidden"], average.sqrt()) < 1e-5


@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=["infinite", "no number"])
def test_taylor_scores_pass_over_gradients_that_are_not_finite(bad: float) -> None:
    """fp16 overflows in its first steps, before its scale is found, and now and then later."""
    model = BY_ID["plain"].make()
    masks = slimming.attach(model, groups_of(model, "mlp"), penalty={"mlp": 0.0})
    mask, squares = masks["blocks.0.mlp.hidden"], []
    for seed, broken in enumerate((True, False, True, False)):
        model.zero_grad()
        loss_of(model, image(model, seed=seed)).backward()
        assert mask.grad is not None
        if broken:
            mask.grad[1] = bad
        else:
            squares.append(mask.grad.square())
        masks.collect()
    assert int(masks.collected["steps"]) == 2
    wanted = (0.99 * squares[0] + 0.01 * squares[1]).sqrt()
    assert distance(masks.scores()["blocks.0.mlp.hidden"], wanted) < 1e-5


def test_contribution_and_mask_scores_by_hand() -> None:
    model: Any = BY_ID["plain"].make().float()
    masks = slimming.attach(model, groups_of(model, "qk", "v", "mlp"))
    with torch.no_grad():
        for mask in masks.values():
            mask.copy_(torch.linspace(-1.0, 1.0, len(mask)))
    scores = masks.scores()
    raw = []
    for depth in range(2):
        made = original(model, f"blocks.{depth}.mlp.fc1.weight")
        bias = original(model, f"blocks.{depth}.mlp.fc1.bias")
        read = original(model, f"blocks.{depth}.mlp.fc2.weight")
        factor = masks[f"blocks.{depth}.mlp.hidden"].abs()
        raw.append(factor * (made.square().sum(1) + bias.square()).sqrt() * read.square().sum(0).sqrt())
    mean = torch.cat(raw).mean()
    for depth in range(2):
        assert distance(scores[f"blocks.{depth}.mlp.hidden"], raw[depth] / mean) < 1e-5
    qkv, bias = (original(model, f"blocks.1.attn.qkv.{name}") for name in ("weight", "bias"))
    norms = (qkv.square().sum(1) + bias.square()).sqrt()
    ratio = scores["blocks.1.attn.qk"] / (masks["blocks.1.attn.qk"].abs() * norms[:48] * norms[48:96]).detach()
    assert distance(ratio, ratio[:1].expand(48)) < 1e-4
    proj = original(model, "blocks.1.attn.proj.weight").square().sum(0).sqrt()
    other = scores["blocks.1.attn.v"] / (masks["blocks.1.attn.v"].abs() * norms[96:] * proj).detach()
    assert distance(other, ratio) < 1e-4, "QK and V are one kind with one mean"
    signed = masks.scores("mask")["blocks.1.attn.v"]
    assert torch.equal(signed, masks["blocks.1.attn.v"].detach())
    assert bool((signed < 0).any())
    with pytest.raises(ConfigError, match="needs gradients"):
        masks.scores("taylor")
    with pytest.raises(ConfigError, match="no score 'tailor'; scores are taylor, contribution, mask"):
        masks.scores("tailor")


def test_coupled_masks_multiply_queries_keys_and_values() -> None:
    """ViT-Slim: one factor for q, k and v of a head dimension, after the bias, so that a logit sees its square."""
    model: Any = BY_ID["plain"].make()
    x = image(model)
    reference = copy.deepcopy(model)
    masks = slimming.attach(model, groups_of(model, "qkv", "mlp"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mask in masks.values():
            mask.copy_(torch.rand(mask.shape, generator=generator) + 0.2)
    for depth, block in enumerate(reference.blocks):
        factor = masks[f"blocks.{depth}.attn.qkv"].double()
        hidden = masks[f"blocks.{depth}.mlp.hidden"].double()
        block.attn.qkv.register_forward_hook(lambda m, a, out, factor=factor: out * factor.repeat(3))
        block.mlp.act.register_forward_hook(lambda m, a, out, hidden=hidden: out * hidden)
    assert distance(model(x), reference(x)) <= 1e-12


def test_multiplied_tokens_follow_the_authors() -> None:
    """The paper's variant: tanh of the mask times the output of both norms of the block, prefix untouched."""
    model: Any = BY_ID["deit distilled"].make()
    x = image(model)
    reference = copy.deepcopy(model)
    masks = slimming.attach(model, groups_of(model, "token"), tokens="multiply")
    with torch.no_grad():
        for mask in masks.values():
            mask.copy_(torch.linspace(-1, 2, len(mask)))
    for depth, block in enumerate(reference.blocks):
        mask = masks[f"blocks.{depth}.tokens"].double()
        factor = torch.cat([torch.ones(2, dtype=torch.float64), mask.tanh()]).view(1, -1, 1)
        for norm in (block.norm1, block.norm2):
            norm.register_forward_hook(lambda m, a, out, factor=factor: out * factor)
    assert distance(model(x), reference(x)) <= 1e-6


@pytest.mark.parametrize(("tokens", "exact"), [("bias", True), ("multiply", False)], ids=["bias", "multiply"])
def test_only_the_key_bias_is_the_same_as_removal(tokens: str, exact: bool) -> None:
    """The paper's zeroing leaves k = b_k and v = b_v in the softmax; the key bias leaves nothing."""
    model = BY_ID["plain"].make()
    groups, plan = draw(prunable(model).anatomy, "token", seed=4)
    masks = slimming.attach(model, groups, tokens=tokens)
    masks.apply_(plan)
    small = slimming.cut(model, plan)
    x = image(model)
    apart = distance(model(x), small(x))
    assert apart <= 1e-9 if exact else apart > 1e-3


def test_a_token_bias_weighs_keys_by_the_factor() -> None:
    """Bias log m multiplies a token's share of every softmax by m: a factor of 2 counts the token twice."""
    model: Any = BY_ID["plain"].make()
    x = image(model)
    doubled = copy.deepcopy(model)
    masks = slimming.attach(model, groups_of(model, "token")[1:])
    with torch.no_grad():
        masks["blocks.1.tokens"][5] = 2.0

    def twice(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        return (torch.cat([args[0], args[0][:, 6:7]], dim=1),), kwargs

    attention = doubled.blocks[1].attn
    attention.register_forward_pre_hook(twice, with_kwargs=True)
    attention.register_forward_hook(lambda m, a, out: out[:, :-1])
    assert distance(model(x), doubled(x)) <= 1e-6


def test_a_cut_keeps_the_softmax_scale_of_the_dense_model() -> None:
    model: Any = BY_ID["plain"].make()
    plan = slimming.plan(slimming.attach(copy.deepcopy(model)), Budget(keep={"head_dim": 0.5}))
    small: Any = slimming.cut(model, plan)
    attention = small.blocks[0].attn
    assert attention.head_dim == 8
    assert attention.scale == 8**-0.5
    rows = list(plan.kept["blocks.0.attn.qk"])
    dense = model.blocks[0].attn.qkv.weight[rows]
    assert distance(attention.qkv.weight[:24] * attention.scale, dense * 16**-0.5) <= 1e-12


def test_the_signed_mask_decides_in_the_papers_ranking() -> None:
    model = BY_ID["plain"].make()
    masks = slimming.attach(model, groups_of(model, "mlp"))
    with torch.no_grad():
        masks["blocks.0.mlp.hidden"].copy_(torch.linspace(-2, 1, 192))
        masks["blocks.1.mlp.hidden"].copy_(torch.linspace(0.4, 0.6, 192))
    plan = slimming.plan(masks, Budget(keep={"mlp": 0.6}), layout=FREE, score="mask", fold=False)
    merged = sorted(torch.cat([mask.detach() for mask in masks.values()]).tolist(), reverse=True)
    line = merged[int(0.6 * 384) - 1]
    for name, mask in masks.items():
        assert plan.kept[name] == tuple(i for i, value in enumerate(mask.tolist()) if value >= line)
    assert not plan.fold


def test_the_counter_counts_transposed_convolutions_and_vectors() -> None:
    for groups in (1, 2):
        layer = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=groups)
        assert count(layer, (8, 5, 5)).macs == 8 * 5 * 5 * 6 // groups * 9

    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).flatten(1).lgamma() @ torch.ones(200)

    assert count(Vector(), (8, 5, 5)).macs == 200 + 8 * 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_counter_counts_both_directions_of_an_lstm(dtype: torch.dtype) -> None:
    layers = nn.LSTM(25, 7, num_layers=2, batch_first=True, bidirectional=True)
    model = nn.Sequential(nn.Flatten(2), layers).to(dtype)
    assert count(model, (8, 5, 5)).macs == 8 * 2 * 4 * 7 * ((25 + 7) + (14 + 7))


def test_a_product_without_a_formula_is_an_error() -> None:
    class Integers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x).flatten(1).to(torch.int8)
            return torch._int_mm(x, torch.ones(200, 8, dtype=torch.int8))

    with pytest.raises(ConfigError, match="The multiply-adds of the operation _int_mm are not known"):
        count(Integers(), (8, 5, 5))
