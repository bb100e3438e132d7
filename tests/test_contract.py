"""One contract over a table of models: what every family promises, with every parameter random.

What a slim model can do besides, and how it fails, is in models/test_slim_models.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

import slimming
from slimming.core.groups import Group
from slimming.core.layout import FREE
from slimming.core.pruning_plan import Plan
from slimming.counting.measured import count
from slimming.masks.attachment import prunable
from slimming.masks.soft_masks import ATTRIBUTE, SoftMasks
from slimming.models.layers import UnevenAttention
from variants import TRACED, VARIANTS, Variant, distance, draw, image

EXACT = 1e-9
HOSTS = ("timm", "torch", "torchvision", "transformers", "slimming")

variants = pytest.mark.parametrize("variant", [*VARIANTS, *TRACED], ids=lambda variant: variant.id)
vits = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.id)


def test_every_variant_has_a_name_of_its_own() -> None:
    names = [variant.id for variant in (*VARIANTS, *TRACED)]
    assert sorted(set(names)) == sorted(names)


def mask_(model: nn.Module, groups: Sequence[Group], plan: Plan, seed: int = 0) -> SoftMasks:
    """Attach masks, give them random values and apply a plan."""
    masks = slimming.attach(model, groups)
    scramble_(masks, seed)
    masks.apply_(plan)
    return masks


def scramble_(masks: Mapping[str, Tensor], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mask in masks.values():
            mask.copy_(0.3 + 1.2 * torch.rand(mask.shape, generator=generator))


@variants
def test_attaching_changes_nothing_and_masks_change_the_output(variant: Variant) -> None:
    model = variant.make()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = image(model)
    before = variant.output(model, x)
    masks = slimming.attach(model)
    assert distance(variant.output(model, x), before) <= EXACT
    for name, mask in masks.items():
        with torch.no_grad():
            mask[: max(1, len(mask) // 2)] = 0.5
        assert distance(variant.output(model, x), before) > 1e-6, name
        with torch.no_grad():
            mask.fill_(1.0)
    scramble_(masks)
    masks.detach_()
    assert torch.equal(variant.output(model, x), before)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


@variants
def test_masked_equals_cut(variant: Variant) -> None:
    dense = variant.make()
    x = image(dense)
    before = variant.output(dense, x)
    anatomy = prunable(dense).anatomy
    off, larger, stays = {}, set(), set()
    for style in variant.styles:
        groups, plan = draw(anatomy, style)
        if not groups:
            stays.add(style)
            continue
        model = copy.deepcopy(dense)
        mask_(model, groups, plan)
        small = slimming.cut(model, plan)
        expected = variant.output(model, x)
        assert distance(expected, before) > 1e-4, f"{style}: the plan does nothing"
        off[style] = distance(variant.output(small, x), expected)
        sizes = [sum(p.numel() for p in each.parameters()) for each in (small, dense)]
        if sizes[0] >= sizes[1]:
            larger.add(style)
        _is_plain(small)
    assert {style: found for style, found in off.items() if found > EXACT} == {}
    assert larger <= {"token"}
    assert stays == variant.stays


def _is_plain(model: nn.Module) -> None:
    """Nothing of the search is left: no parametrisation, no hook, no mask."""
    assert ATTRIBUTE not in model.__dict__
    for name, module in model.named_modules():
        assert "parametrizations" not in dict(module.named_children()), name
        assert type(module).__module__.split(".")[0] in HOSTS, name
        assert not type(module).__name__.startswith("Parametrized"), name
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
    assert not any("mask" in name for name, _ in (*model.named_parameters(), *model.named_buffers()))


@variants
def test_counted_cost_equals_the_formula(variant: Variant) -> None:
    model = variant.make().float()
    shape = image(model).shape[1:]
    counted = count(model, shape)
    _same_cost(slimming.cost(model), counted)
    anatomy = prunable(model).anatomy
    for style in variant.counted:
        groups, plan = draw(anatomy, style, seed=3)
        if not groups:
            continue
        small = slimming.cut(model, plan)
        counted = count(small, shape)
        _same_cost(slimming.cost(model, plan), counted)
        _same_cost(slimming.cost(small), counted)


def _same_cost(formula: Any, counted: Any) -> None:
    assert formula.params == counted.params
    assert formula.macs == pytest.approx(counted.macs, rel=0.005)
    assert formula.memory_bytes == pytest.approx(counted.memory_bytes, rel=0.005)


@variants
def test_keeping_all_is_bit_equal(variant: Variant) -> None:
    model = variant.make()
    groups = slimming.describe(model)
    plan = Plan(kept={group.name: tuple(range(group.size)) for group in groups}, sizes={g.name: g.size for g in groups})
    small = slimming.cut(model, plan)
    assert small is not model
    assert torch.equal(variant.output(small, image(model)), variant.output(model, image(model)))
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]


@vits
def test_equal_heads_keep_the_hosts_attention(variant: Variant) -> None:
    model = variant.make()
    _, plan = draw(prunable(model).anatomy, "equal")
    small = slimming.cut(model, plan)
    for before, after in zip(_blocks(model), _blocks(small), strict=True):
        if "qk" in variant.stays:  # V alone shrinks, so that QK and V differ
            assert type(after.attn) is UnevenAttention
            continue
        assert type(after.attn) is Attention
        assert after.attn.head_dim < before.attn.head_dim
        assert after.attn.num_heads == before.attn.num_heads


def _blocks(model: nn.Module) -> list[Any]:
    return [block for block in model.blocks if type(block).__name__ != "TokenSelect"]


SAVED = [*((variant, "free") for variant in (*VARIANTS, *TRACED)), *((variant, "equal") for variant in VARIANTS)]


@pytest.mark.parametrize(("variant", "style"), SAVED, ids=[f"{variant.id}: {style}" for variant, style in SAVED])
def test_saved_and_loaded_is_bit_equal(variant: Variant, style: str, tmp_path: Path) -> None:
    model = variant.make()
    _, plan = draw(prunable(model).anatomy, style, seed=5)
    small = slimming.cut(model, plan).train()
    slimming.save(small, tmp_path / "small")
    again = variant.load(tmp_path / "small")
    assert not again.training
    x = image(model)
    assert torch.equal(variant.output(again, x), variant.output(small.eval(), x))
    assert slimming.cost(again) == slimming.cost(small)
    assert [type(m) for m in again.modules()] == [type(m) for m in small.modules()]
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in small.named_parameters()}
    assert [m.extra_repr() for m in again.modules()] == [m.extra_repr() for m in small.modules()]


@variants
def test_a_slim_model_can_be_slimmed_again(variant: Variant, tmp_path: Path) -> None:
    small = variant.make()
    x = image(small)
    for round_number in (1, 2):
        before = variant.output(small, x)
        groups, plan = draw(prunable(small).anatomy, "free", seed=round_number)
        mask_(small, groups, plan)
        masked_output = variant.output(small, x)
        assert distance(masked_output, before) > 1e-3
        slim = slimming.cut(small, plan)
        assert distance(variant.output(slim, x), masked_output) <= EXACT
        _is_plain(slim)
        small = slim
    _same_cost(slimming.cost(small.float()), count(small, x.shape[1:]))
    slimming.save(small, tmp_path / "twice")
    again = variant.load(tmp_path / "twice")
    assert torch.equal(variant.output(again, x.float()), variant.output(small, x.float()))


@variants
def test_nested_plans_keep_all_that_smaller_ones_keep(variant: Variant) -> None:
    model = variant.make()
    masks = slimming.attach(model)
    scramble_(masks)
    for layout in (slimming.Layout(multiple=2), FREE):
        smaller: dict[str, tuple[int, ...]] = {}
        dense = slimming.cost(model)
        for share in (0.75, 0.9, 1.0):
            plan = slimming.plan(masks, slimming.Budget(macs=share), layout=layout, solver="nested")
            assert slimming.cost(model, plan).macs <= share * dense.macs
            assert all(set(smaller.get(name, ())) <= set(units) for name, units in plan.kept.items())
            smaller = dict(plan.kept)
        assert all(len(smaller[group.name]) == group.size for group in masks.groups)


@variants
def test_gradients_reach_every_mask(variant: Variant) -> None:
    model = variant.make()
    many = image(model).repeat(8, 1, 1, 1)  # a branch that drop path leaves out for all images has no gradient
    masks = slimming.attach(model.train())
    variant.output(model, many).square().sum().backward()
    for name, mask in masks.items():
        assert mask.grad is not None, name
        assert bool((mask.grad != 0).any()), name
