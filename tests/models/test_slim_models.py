"""Masked and slim models in use: their interface, their dtype, their copies, and that a wrong cut is seen."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.evo_norm import EvoNorm2dS0
from torch import nn

import slimming
from slimming.core.budget import Budget
from slimming.core.layout import Layout
from slimming.core.pruning_plan import Plan
from slimming.errors import ConfigError, PlanError, UnsupportedModelError
from slimming.masks.attachment import prunable
from slimming.models import timm_vit
from slimming.models.layers import PartialBlock, TokenSelect, UnevenAttention
from variants import VARIANTS, Variant, distance, draw, image

BY_ID = {variant.id: variant for variant in VARIANTS}
SLIM = [
    ("plain", "equal"),
    ("plain", "qk"),
    ("deit distilled", "free"),
    ("deit3 layer scale", "free"),
    ("siglip", "coupled"),
    ("average, no class token", "free"),
]


def slim(variant: str, style: str, seed: int = 2) -> nn.Module:
    model = BY_ID[variant].make()
    return slimming.cut(model, draw(prunable(model).anatomy, style, seed)[1])


slim_models = pytest.mark.parametrize(
    ("variant", "style"), SLIM, ids=[f"{variant}: {style}" for variant, style in SLIM]
)


@pytest.mark.parametrize("variant", ["plain", "swiglu"], ids=str)
def test_a_wrong_index_is_seen(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every single selection of the cut, when one of its places is off by one, breaks the equality."""
    model = BY_ID[variant].make()
    groups, plan = draw(prunable(model).anatomy, "free")
    slimming.attach(model, groups).apply_(plan)
    x = image(model)
    expected = model(x)
    real = timm_vit.select_indices
    calls = 0
    wrong = -1

    def shifted(tensor: torch.Tensor, indices: dict[int, list[int]]) -> torch.Tensor:
        nonlocal calls
        (dim, index), *_ = indices.items()
        calls += 1
        if calls - 1 == wrong:
            gone = sorted(set(range(tensor.shape[dim])) - set(index))
            index = [gone[-1], *index[1:]]
        return real(tensor, {dim: index})

    monkeypatch.setattr(timm_vit, "select_indices", shifted)
    assert distance(slimming.cut(model, plan)(x), expected) <= 1e-9
    for wrong in range(calls):
        calls = 0
        assert distance(slimming.cut(model, plan)(x), expected) > 1e-6, wrong
    assert wrong >= 2 * 5 - 1


def test_a_wrong_token_is_seen() -> None:
    model = BY_ID["plain"].make()
    groups, plan = draw(prunable(model).anatomy, "token")
    slimming.attach(model, groups).apply_(plan)
    x = image(model)
    small = slimming.cut(model, plan)
    assert distance(small(x), model(x)) <= 1e-9
    select = next(module for module in small.modules() if isinstance(module, TokenSelect))
    gone = set(range(select.incoming)) - set(select.index.tolist())
    select.index[-1] = gone.pop()
    assert distance(small(x), model(x)) > 1e-6


@slim_models
def test_the_interface_of_the_host_stays(variant: str, style: str, tmp_path: Path) -> None:
    model: Any = slim(variant, style)
    assert type(model) is type(BY_ID[variant].make())
    x = image(model)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    assert all(isinstance(head, nn.Linear if model.num_classes else nn.Identity) for head in heads)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    state = {name: tensor + 0.01 for name, tensor in model.state_dict().items()}
    twin.load_state_dict(state, strict=True)
    assert distance(twin(x), model(x)) > 1e-6, "the copy shares its weights"
    model.load_state_dict(state, strict=True)
    assert torch.equal(twin(x), model(x))
    model.reset_classifier(5)
    model.double()  # older timm makes a classifier of single precision
    assert model(x).shape == (2, 5)
    slimming.save(model, tmp_path / "five")
    assert torch.equal(slimming.load(tmp_path / "five")(x), model(x))


def test_what_is_left_of_a_block_asks_its_attention_for_nothing_new() -> None:
    class Attention(nn.Identity):  # of timm before 1.0.26
        def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
            return x

    block: Any = timm.create_model("test_vit").blocks[0]
    block.attn = Attention()
    x = torch.randn(1, 5, 64)
    found = PartialBlock(block, attention=True, mlp=False, post_norm=False)(x)
    assert torch.equal(found, x + block.ls1(block.norm1(x)))


def test_another_pooling_is_saved_too(tmp_path: Path) -> None:
    model: Any = slim("plain", "free")
    model.reset_classifier(5, global_pool="avg")
    model.double()
    slimming.save(model, tmp_path / "avg")
    again: Any = slimming.load(tmp_path / "avg")
    assert again.global_pool == "avg"
    assert torch.equal(again(image(model)), model(image(model)))


def test_another_input_size_is_saved_too(tmp_path: Path) -> None:
    model = _slim_without_tokens()
    model.set_input_size(img_size=48)
    x = image(model)
    assert x.shape[-1] == 48
    slimming.save(model, tmp_path / "larger")
    assert torch.equal(slimming.load(tmp_path / "larger")(x), model(x))


def _slim_without_tokens() -> Any:
    model = BY_ID["plain"].make()
    masks = slimming.attach(model, [g for g in slimming.describe(model) if g.kind != "token"])
    return slimming.cut(model, slimming.plan(masks, Budget(macs=0.7), layout=Layout(multiple=2)))


def test_intermediate_features_with_and_without_token_cut() -> None:
    whole = _slim_without_tokens()
    final, maps = whole.forward_intermediates(image(whole))
    assert [tuple(m.shape) for m in maps] == [(2, final.shape[-1], 4, 4)] * 2
    assert torch.equal(final, whole.forward_features(image(whole)))
    cut: Any = slim("plain", "token")
    for method in ("forward_intermediates", "get_intermediate_layers", "set_input_size"):
        with pytest.raises(UnsupportedModelError, match=f"{method} needs the full grid.*forward_features"):
            getattr(cut, method)(image(cut))
    assert torch.equal(copy.deepcopy(cut)(image(cut)), cut(image(cut)))
    again: Any = slimming.cut(cut, _cut_tokens_plan(cut))
    with pytest.raises(UnsupportedModelError, match="tokens were cut"):
        copy.deepcopy(again).forward_intermediates(image(cut))


def _cut_tokens_plan(model: nn.Module) -> Plan:
    return draw(prunable(model).anatomy, "mlp")[1]


def test_a_cut_grid_refuses_other_sequences() -> None:
    model = BY_ID["dynamic size"].make()
    small = slimming.cut(model, draw(prunable(model).anatomy, "token")[1])
    with pytest.raises(UnsupportedModelError, match="sequences of 17 tokens, but this image has 26"):
        small(torch.zeros(1, 3, 40, 40, dtype=torch.float64))
    whole = slimming.cut(model, draw(prunable(model).anatomy, "mlp")[1])
    assert whole(torch.zeros(1, 3, 40, 40, dtype=torch.float64)).shape == (1, 1000)


@slim_models
def test_export(variant: str, style: str) -> None:
    model = slim(variant, style)
    x = image(model)
    program = torch.export.export(model, (x,))
    assert distance(program.module()(x), model(x)) <= 1e-12


@pytest.mark.parametrize(("variant", "style"), [("plain", "qk"), ("deit3 layer scale", "free")], ids=["plain", "deit3"])
def test_compile(variant: str, style: str) -> None:
    model = slim(variant, style)
    x = image(model)
    torch._dynamo.reset()
    assert distance(torch.compile(model, backend="eager", fullgraph=True)(x), model(x)) <= 1e-12


def test_masked_models_compile_and_train() -> None:
    model = BY_ID["plain"].make()
    masks = slimming.attach(model)
    x = image(model)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager")
    fast(x).square().sum().backward()
    compiled = {name: mask.grad.clone() for name, mask in masks.items() if mask.grad is not None}
    model.zero_grad()
    model(x).square().sum().backward()
    assert compiled.keys() == masks.keys()
    for name, mask in masks.items():
        assert mask.grad is not None
        assert distance(compiled[name], mask.grad) < 1e-5, name


@pytest.mark.parametrize("tokens", ["bias", "multiply"], ids=str)
def test_masks_are_float32_parameters_of_the_model_under_autocast(tokens: str) -> None:
    model = BY_ID["plain"].make().float().train()
    masks = slimming.attach(model, tokens=tokens)
    owned = {id(parameter) for parameter in model.parameters()}
    state = model.state_dict(keep_vars=True)
    stored = {id(tensor) for tensor in state.values()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(image(model))
    (output.float().square().sum() + masks.penalty()).backward()
    assert output.dtype is torch.bfloat16
    for name, mask in masks.items():
        assert id(mask) in owned, name
        assert id(mask) in stored, name
        assert mask.dtype is torch.float32
        assert mask.grad is not None
        assert mask.grad.dtype is torch.float32
        assert bool(torch.isfinite(mask.grad).all()), name
        assert bool((mask.grad != 0).any()), name


def test_the_state_dict_of_a_masked_model_restores_it() -> None:
    one, other = BY_ID["plain"].make(0), BY_ID["plain"].make(7)
    masks, fresh = slimming.attach(one), slimming.attach(other)
    with torch.no_grad():
        for mask in masks.values():
            mask.uniform_(0.2, 1.0)
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(other(image(one)), one(image(one)))
    assert all(torch.equal(fresh[name], mask) for name, mask in masks.items())


def test_a_copy_of_a_masked_model_is_independent() -> None:
    model = BY_ID["plain"].make()
    masks = slimming.attach(model)
    twin = copy.deepcopy(model)
    x = image(model)
    before = model(x)
    own = slimming.masks.soft_masks.attached(twin)
    assert own is not None
    assert own is not masks
    with torch.no_grad():
        for mask in own.values():
            mask.uniform_(0.2, 0.9)
    assert torch.equal(model(x), before)
    changed = twin(x)
    assert distance(changed, before) > 1e-3
    masks.detach_()
    assert torch.equal(twin(x), changed), "taking the masks off one model changed the other"
    own.fold_()
    own.detach_()
    assert twin.state_dict().keys() == model.state_dict().keys()
    again = slimming.attach(model)
    assert distance(model(x), before) <= 1e-9
    again.detach_()


def test_folding_keeps_the_function() -> None:
    model = BY_ID["plain"].make()
    masks = slimming.attach(model, [g for g in slimming.describe(model) if g.kind != "token"])
    with torch.no_grad():
        for mask in masks.values():
            mask.uniform_(0.2, 1.5)
    x = image(model)
    expected = model(x)
    masks.fold_()
    assert distance(model(x), expected) <= 1e-12
    assert len(masks) == 0
    assert model.state_dict().keys() == BY_ID["plain"].make().state_dict().keys()
    slimming.attach(model)


def test_without_folding_what_stays_counts_whole() -> None:
    """The paper's cut: masks become 0 or 1."""
    model = BY_ID["plain"].make()
    groups, plan = draw(prunable(model).anatomy, "coupled")
    plan = Plan(kept=plan.kept, sizes=plan.sizes, fold=False)
    masks = slimming.attach(model, groups)
    with torch.no_grad():
        for mask in masks.values():
            mask.uniform_(0.2, 0.9)
    small = slimming.cut(model, plan)
    masks.apply_(plan)
    assert {value for mask in masks.values() for value in mask.tolist()} == {0.0, 1.0}
    assert distance(small(image(model)), model(image(model))) <= 1e-9
    unfolded = slimming.cut(BY_ID["plain"].make(), plan)
    assert torch.equal(small(image(model)), unfolded(image(model)))


def test_a_plan_of_another_model_is_refused() -> None:
    model = BY_ID["plain"].make()
    for stranger in (_wide(), _wide(depth=2), _wide(depth=2, embed_dim=24)):
        plan = draw(prunable(stranger).anatomy, "free")[1]
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for action in (slimming.cut, slimming.cost):
            with pytest.raises(PlanError, match="made for another model"):
                action(model, plan)
        masks = slimming.attach(model)
        with pytest.raises(PlanError, match="made for another model"):
            masks.apply_(plan)
        assert all(bool((mask == 1).all()) for mask in masks.values()), "a refused plan changed the masks"
        masks.detach_()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def _wide(**arguments: Any) -> nn.Module:
    return Variant("wide", "vit_tiny_patch16_224", {"embed_dim": 72, "depth": 3, **arguments}).make()


def test_plans_that_leave_nothing_or_half_a_head_are_refused() -> None:
    model = BY_ID["plain"].make()
    for name, size, kept, says in (
        ("blocks.0.mlp.hidden", 192, (), "leaves 0 units in 'blocks.0.mlp.hidden'; at least 1"),
        ("blocks.1.tokens", 16, (), "leaves 0 units in 'blocks.1.tokens'"),
        ("blocks.0.attn.v", 48, (), "leaves 0 units in 'blocks.0.attn.v'"),
        ("blocks.0.attn.qk", 48, tuple(range(16)), "leaves head 1 of blocks.0.attn with V but without QK"),
        ("blocks.0.mlp.hidden", 192, (0, 0, 1), "repeated or outside 0..191"),
        ("blocks.0.mlp.hidden", 192, (0, 192), "repeated or outside 0..191"),
    ):
        with pytest.raises(PlanError, match=says.replace(".", r"\.")):
            slimming.cut(model, Plan(kept={name: kept}, sizes={name: size}))


def test_attaching_refuses_what_does_not_fit() -> None:
    model = BY_ID["plain"].make()
    before = set(model.state_dict())
    groups = {group.name: group for group in prunable(model).anatomy.groups}
    qk, qkv = groups["blocks.0.attn.qk"], groups["blocks.0.attn.qkv"]
    for chosen, says in (([], "No group"), ([qk, qkv], "share units"), ([qk, qk], "share units")):
        with pytest.raises(PlanError, match=says):
            slimming.attach(model, chosen)
    for stranger, says in ((_wide(), "no group 'blocks.2"), (_wide(depth=2), "has other sizes")):
        with pytest.raises(PlanError, match=says):
            slimming.attach(model, [slimming.describe(stranger)[-4]])
    with pytest.raises(ConfigError, match="tokens='bia'"):
        slimming.attach(model, tokens="bia")
    assert set(model.state_dict()) == before
    masks = slimming.attach(model)
    with pytest.raises(PlanError, match="masks already"):
        slimming.attach(model)
    with pytest.raises(PlanError, match="has no mask"):
        masks.apply_(draw(prunable(model).anatomy, "head")[1])


def test_a_model_of_which_nothing_can_be_cut() -> None:
    normed = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Softmax(dim=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    with pytest.raises(UnsupportedModelError, match=r"can be cut: .*something else reads these units"):
        slimming.describe(normed)


def test_what_torch_pruning_loses_track_of_is_named() -> None:
    normed = nn.Sequential(
        *(nn.Conv2d(3, 32, 3), EvoNorm2dS0(32), nn.Conv2d(32, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 8, 1)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    )
    normed.image_size = 16  # pyright: ignore
    found = slimming.check(normed)
    assert found.ok
    assert any(reason.startswith("2.channels: the host does not take other sizes") for reason in found.uncovered)


def test_parts_that_no_group_covers_are_named() -> None:
    normed = prunable(BY_ID["qk norm"].make()).anatomy
    assert any("blocks.0.attn QK" in reason for reason in normed.uncovered)
    pooled = Variant("max", "vit_tiny_patch16_224", {"global_pool": "max"}).make()
    assert any("token positions: pooling 'max'" in reason for reason in prunable(pooled).anatomy.uncovered)
    inner = Variant("inner", "vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}).make()
    reasons = " ".join(prunable(inner).anatomy.uncovered)
    assert "blocks.1.attn: a norm over all heads" in reasons
    assert "blocks.1.mlp: a norm over the hidden units" in reasons
    assert {group.kind for group in slimming.describe(inner)} == {"token", "width"}
    dropped = Variant("dropped", "vit_tiny_patch16_224", {"patch_drop_rate": 0.5}).make()
    assert any("patch dropout" in reason for reason in prunable(dropped).anatomy.uncovered)


def test_training_settings_survive_cut_and_load(tmp_path: Path) -> None:
    model = BY_ID["drop path"].make()
    small: Any = slimming.cut(model, draw(prunable(model).anatomy, "free")[1])
    slimming.save(small, tmp_path / "small")
    again: Any = slimming.load(tmp_path / "small")
    for each in (small, again):
        assert each.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
        assert each.blocks[-1].attn.proj_drop.p == pytest.approx(0.1)
        assert each.head_drop.p == pytest.approx(0.1)
    assert isinstance(again.blocks.get_submodule("1").attn, UnevenAttention)


def test_padding_of_odd_sizes_survives_cut_and_load(tmp_path: Path) -> None:
    arguments = {"dynamic_img_size": True, "dynamic_img_pad": True}
    model = Variant("pad", "vit_tiny_patch16_224", arguments).make()
    small = slimming.cut(model, draw(prunable(model).anatomy, "mlp")[1])
    slimming.save(small, tmp_path / "small")
    x = torch.randn(1, 3, 37, 29, dtype=torch.float64)
    assert torch.equal(slimming.load(tmp_path / "small")(x), small(x))


def test_loading_needs_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    model = slim("deit3 layer scale", "free")
    for holder, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "dump")):
        monkeypatch.setattr(holder, name, refuse)
    slimming.save(model, tmp_path / "small")
    assert torch.equal(slimming.load(tmp_path / "small")(image(model)), model(image(model)))


def test_a_new_process_computes_the_same_bits(tmp_path: Path) -> None:
    model = slim("deit3 layer scale", "free")
    slimming.save(model, tmp_path / "small")
    program = (
        "import sys, torch, slimming; torch.set_num_threads(1); model = slimming.load(sys.argv[1]);"
        "x = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float64).reshape(2, 3, 32, 32);"
        "print(model(x).detach().numpy().tobytes().hex())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "small")], capture_output=True, text=True, check=True
    )
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float64).reshape(2, 3, 32, 32)
    assert ran.stdout.strip() == model(x).detach().numpy().tobytes().hex()


def test_what_lost_a_branch_and_width_is_slimmed_again_and_used_on(tmp_path: Path) -> None:
    model: Any = _wide(num_classes=5)
    x = image(model)
    groups = [group for group in slimming.describe(model) if group.kind != "head"]
    before = model(x)
    masks = slimming.attach(model, groups)
    keep = Budget(keep={"width": 0.5, "block": 0.7})
    plan = slimming.plan(masks, keep, score="contribution")
    masks.apply_(plan)
    small = slimming.cut(model, plan)
    assert distance(small(x), model(x)) < 1e-9
    masks.detach_()
    assert torch.equal(model(x), before), "the norms see every feature again"
    assert slimming.attach(model, groups).groups, "groups described before fit afterwards"
    again = slimming.attach(small, [group for group in slimming.describe(small) if group.kind != "head"])
    smaller: Any = slimming.cut(small, slimming.plan(again, Budget(macs=0.5), score="contribution"))
    assert slimming.cost(smaller).macs <= 0.5 * slimming.cost(small).macs
    smaller.reset_classifier(3)
    smaller.double()
    assert smaller(x).shape == (2, 3)
    slimming.save(smaller, tmp_path / "slim")
    assert torch.equal(slimming.load(tmp_path / "slim")(x), smaller(x))
    exported: Any = torch.export.export(smaller, (x,)).module()
    assert distance(exported(x), smaller(x)) < 1e-9
    with_grid: Any = slimming.cut(model, plan)
    assert [t.shape[1] for t in with_grid.forward_intermediates(x)[1]] == [with_grid.embed_dim] * 3
