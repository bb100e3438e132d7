"""Latency tables, built from the layers of real models but with invented times, since no timing decides a test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import slimming
from clocks import CountingClock
from slimming.core.budget import Budget
from slimming.core.completion import complete
from slimming.core.copies import copied
from slimming.core.files import seal
from slimming.core.kinds import KINDS
from slimming.core.layout import FREE, Layout
from slimming.errors import BudgetError, CheckpointError, ConfigError, PlanError, UnsupportedModelError
from slimming.masks.attachment import prunable, select_kinds
from slimming.models import traced
from slimming.models.family import TimedModule
from slimming.models.traced.timed_layers import calls
from slimming.planning import latency_measurement
from slimming.planning.latency_measurement import build_latency_table
from slimming.planning.latency_table import LatencyTable

SMALL: dict[str, Any] = {"img_size": 64, "patch_size": 16, "depth": 3, "embed_dim": 64, "num_heads": 2}


def cost_of(kind: str, sizes: Mapping[str, int]) -> float:
    """A made-up time of a layer in ms: linear in each size, so that interpolation is exact."""
    rates = {"tokens": 0.01, "width": 0.02, "qkv": 0.03, "hidden": 0.015}
    product = 1.0
    for name, size in sizes.items():
        product *= rates[name] * size
    return product + {"patch_embed": 1.0, "head": 0.5}.get(kind, 0.1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL).eval()


@pytest.fixture(scope="module")
def table(model: nn.Module) -> LatencyTable:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_measurement, "Clock", CountingClock)
        built = build_latency_table(model, kinds=KINDS)
    axes = ("tokens", "width", "qkv", "hidden")
    points = tuple(
        {**point, "ms": cost_of(point["kind"], {name: point[name] for name in axes if name in point})}
        for point in built.points
    )
    return LatencyTable(setting=built.setting, points=points, calibration=1.0, reference_ms=1.0)


def masked(model: nn.Module, *, joint: bool = False) -> Any:
    groups = [g for g in slimming.describe(model) if g.kind != "head" and (joint or g.kind not in ("block", "width"))]
    copied = timm.create_model("vit_tiny_patch16_224", **SMALL)
    masks = slimming.attach(copied, groups)
    with torch.no_grad():
        for number, mask in enumerate(masks.values()):
            mask.copy_(torch.rand(mask.shape, generator=torch.Generator().manual_seed(number)))
    return masks


def predicted(table: LatencyTable, model: nn.Module, plan: slimming.Plan) -> float:
    anatomy = prunable(model).anatomy
    return table.predict(anatomy, {name: len(units) for name, units in complete(anatomy, plan).items()})


def test_the_pieces_sum_to_the_model(table: LatencyTable, model: nn.Module) -> None:
    plan = slimming.plan(
        masked(model, joint=True),
        Budget(keep={"mlp": 0.5, "head_dim": 0.5, "token": 0.6, "width": 0.75, "block": 0.7}),
        score="mask",
    )
    small: Any = slimming.cut(model, plan)
    expected = cost_of("patch_embed", {"width": small.embed_dim})
    tokens = small.patch_embed.num_patches + 1
    for name, block in small.blocks.named_children():
        if name.endswith("_tokens"):
            tokens = block.index.numel()
            expected += cost_of("select", {"tokens": tokens, "width": small.embed_dim})
            continue
        sizes = {"tokens": tokens, "width": small.embed_dim}
        if block.attn is not None:
            expected += cost_of("attention", {**sizes, "qkv": block.attn.qkv.out_features})
        if block.mlp is not None:
            expected += cost_of("mlp", {**sizes, "hidden": block.mlp.fc1.out_features})
    expected += cost_of("head", {"tokens": tokens, "width": small.embed_dim})
    assert predicted(table, model, plan) == pytest.approx(expected, rel=1e-6)
    gone = sum(len(units) == 0 for name, units in plan.kept.items() if name.endswith("branch"))
    assert gone == 2
    assert tokens < 17


@pytest.mark.parametrize("budget", [Budget(latency=0.6), Budget(latency=0.6, params=0.7)], ids=str)
def test_a_share_of_the_time_is_never_exceeded_and_nearly_met(
    table: LatencyTable, model: nn.Module, budget: Budget
) -> None:
    plan = slimming.plan(masked(model), budget, score="mask", latency=table, layout=Layout(multiple=1))
    whole = {g.name: g.size for g in prunable(model).anatomy.groups}
    share = predicted(table, model, plan) / table.predict(prunable(model).anatomy, whole)
    assert 0.57 < share <= 0.6
    params = slimming.cost(model, plan).params / slimming.cost(model).params
    assert params <= budget.limits.get("params", 1.0)


def test_sizes_are_multiples_of_what_is_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Aligned(CountingClock):
        """MLPs take a fifth longer at sizes that are no multiple of 16."""

        def times(self, timed: TimedModule, seconds: float, reference_ms: float) -> dict[str, Any]:
            found = super().times(timed, seconds, reference_ms)
            hidden = [module.out_features for name, module in timed.module.named_modules() if name.endswith("mlp.fc1")]
            slow = 1.2 if any(size % 16 for size in hidden) else 1.0
            return {name: value * slow if name == "ms" else value for name, value in found.items()}

    monkeypatch.setattr(latency_measurement, "Clock", Aligned)
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "embed_dim": 128}).eval()
    table = build_latency_table(model, path=tmp_path / "table.json")
    assert table.multiple == 16
    slow, fast = pytest.approx(1.2), pytest.approx(1.0)
    assert table.multiples == {1: slow, 2: slow, 4: slow, 8: slow, 16: fast, 32: fast, 64: 1.0}
    assert LatencyTable.load(tmp_path / "table.json") == table
    masks = slimming.attach(model, [group for group in slimming.describe(model) if group.kind == "mlp"])
    with torch.no_grad():
        for number, mask in enumerate(masks.values()):
            mask.copy_(torch.rand(mask.shape, generator=torch.Generator().manual_seed(number)))
    for given, multiple in ((Layout(), 16), (Layout(multiple=4), 4)):
        for budget in (Budget(macs=0.77), Budget(latency=0.77)):
            kept = slimming.plan(masks, budget, score="mask", latency=table, layout=given).kept
            assert all(len(units) % multiple == 0 for units in kept.values())
            assert given.multiple is None or any(len(units) % 16 for units in kept.values())


def test_milliseconds_from_a_file(table: LatencyTable, model: nn.Module, tmp_path: Path) -> None:
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    whole = table.predict(prunable(model).anatomy, {g.name: g.size for g in prunable(model).anatomy.groups})
    plan = slimming.plan(masked(model), Budget(latency_ms=0.7 * whole), score="mask", latency=tmp_path / "table.json")
    assert plan.solution["latency_ms"] == pytest.approx(predicted(table, model, plan))
    assert plan.solution["latency_ms"] <= 0.7 * whole
    with pytest.raises(BudgetError, match=r"latency_ms 0\.001 cannot be reached.* latency_ms 0\.\d+ \([\d.]+\) of the"):
        slimming.plan(masked(model), Budget(latency_ms=0.001), score="mask", latency=table)


def test_building_goes_on_where_it_stopped(model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(latency_measurement, "Clock", CountingClock)
    CountingClock.asked = 0
    path = tmp_path / "table.json"
    whole = build_latency_table(model, kinds=KINDS, path=path)
    every = CountingClock.asked
    once = 1 + 2 + len(latency_measurement.MULTIPLES)  # the whole model, and sizes that are multiples of something
    assert every == len(whole.points) + once
    half = LatencyTable(setting=whole.setting, points=whole.points[: len(whole.points) // 2], reference_ms=1.0)
    half.save(path)
    again = build_latency_table(model, kinds=KINDS, path=path)
    assert CountingClock.asked == every + len(whole.points) - len(half.points) + once
    assert {json.dumps(p) for p in again.points} == {json.dumps(p) for p in whole.points}
    assert build_latency_table(model, kinds=KINDS, path=path) == again
    CountingClock.asked = 0
    fewer = build_latency_table(model, path=tmp_path / "fewer.json")
    assert len(fewer.points) < len(whole.points) / 2
    narrow = dict.fromkeys(("embedding",), 32)
    with pytest.raises(PlanError, match=r"has only width 64, but the model has 32.*--kinds"):
        fewer.predict(prunable(model).anatomy, {g.name: g.size for g in prunable(model).anatomy.groups} | narrow)
    more = build_latency_table(model, kinds=KINDS, path=tmp_path / "fewer.json")
    assert {json.dumps(p) for p in more.points} == {json.dumps(p) for p in whole.points}
    with pytest.raises(ConfigError, match="There is no kind 'widht'"):
        build_latency_table(model, kinds=("widht",))
    with pytest.raises(PlanError, match="not complete"):
        LatencyTable(setting=whole.setting, points=whole.points[:-1]).predict(
            prunable(model).anatomy, {g.name: g.size for g in prunable(model).anatomy.groups}
        )
    assert half.merged(whole).points == half.points + whole.points[len(half.points) :]


def test_predictions_are_in_proportion_to_the_calibration(table: LatencyTable, model: nn.Module) -> None:
    anatomy = prunable(model).anatomy
    whole = {group.name: group.size for group in anatomy.groups}
    plain = table.predict(anatomy, whole)
    for calibration, factor in ((None, 1.0), (2.0, 2.0), (0.5, 0.5)):
        scaled = LatencyTable(setting=table.setting, points=table.points, calibration=calibration)
        assert scaled.predict(anatomy, whole) == pytest.approx(factor * plain)


def test_merged_tables_tell_the_times_of_one_machine(table: LatencyTable) -> None:
    """Where the block takes twice as long, all the rest does."""
    first = LatencyTable(setting=table.setting, points=table.points[:1], reference_ms=2.0)
    other = LatencyTable(setting=table.setting, points=table.points[1:2], reference_ms=1.0)
    assert first.merged(other).points[1]["ms"] == 2 * table.points[1]["ms"]
    unknown = LatencyTable(setting=table.setting, points=table.points[1:2])
    assert first.merged(unknown).points[1]["ms"] == table.points[1]["ms"]


def test_an_unknown_runtime_is_refused_before_anything_is_timed(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="runtime"):
        build_latency_table(model, runtime="eagr")


def test_the_clock_times_what_it_is_given(model: nn.Module) -> None:
    whole = TimedModule(model, prunable(model).anatomy.input_shape)
    clock = latency_measurement.Clock(whole, next(model.parameters()), batch_size=2, runtime="eager")
    found = clock.times(TimedModule(clock.block.module, tuple(clock.block.x.shape[1:])), 0.01, 3.0)
    assert 0 < found["p25"] <= found["ms"] <= found["p75"]
    assert found["runs"] >= 2
    assert clock.reference(0.01) > 0


def test_every_timed_layer_computes_what_the_model_does(model: nn.Module) -> None:
    anatomy = prunable(model).anatomy
    timed = prunable(model).family.timed_modules(model, anatomy)
    full = {group.name: group.size for group in anatomy.groups}
    x = torch.randn(1, 3, 64, 64)
    stages: dict[str, Any] = {"x": x}
    with torch.no_grad():
        for layer in anatomy.timed_layers:
            sizes = {name: dim.value(full) for name, dim in layer.axes}
            module, shape, copies = timed(layer, sizes)
            if layer.kind == "select":
                continue
            assert tuple(stages["x"].shape[1:]) == shape
            stages["x"] = (module[0] if copies > 1 else module)(stages["x"])  # pyright: ignore
        assert torch.allclose(stages["x"], model(x), atol=1e-5)


SWIN = {"img_size": 64, "window_size": 2, "depths": (2, 1, 1, 1), "embed_dim": 24}
EVA = {"img_size": 56, "depth": 2, "embed_dim": 48, "num_heads": 4}
TRACED = [
    pytest.param("test_resnet", {}, None, id="ResNet"),
    pytest.param("test_efficientnet", {}, None, id="EfficientNet"),
    pytest.param("regnety_002", {}, None, id="RegNet", marks=pytest.mark.slow),
    pytest.param("densenet121", {"block_config": (2, 2, 2, 2)}, None, id="DenseNet"),
    pytest.param("mobilevit_xxs", {}, None, id="MobileViT", marks=pytest.mark.slow),
    pytest.param("swin_tiny_patch4_window7_224", SWIN, None, id="Swin"),
    pytest.param("swin_tiny_patch4_window7_224", SWIN, ("head", "mlp", "width"), id="Swin, width"),
    pytest.param("test_convnext", {}, ("mlp", "width"), id="ConvNeXt, width"),
    pytest.param("levit_128s", {}, ("channel", "head", "mlp", "width"), id="LeViT, width", marks=pytest.mark.slow),
    pytest.param("eva02_tiny_patch14_224", EVA, None, id="EVA-02"),
]


@pytest.mark.parametrize(("name", "arguments", "kinds"), TRACED, ids=None)
def test_the_timed_layers_of_a_traced_model_sum_to_the_slim_model(
    name: str, arguments: dict[str, Any], kinds: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_measurement, "Clock", CountingClock)
    overlay = {"input_size": (3, 56 if "eva" in name else 64, 56 if "eva" in name else 64)}
    model = timm.create_model(name, num_classes=10, pretrained_cfg_overlay=overlay, **arguments)
    model = model.eval().requires_grad_(False)
    built = build_latency_table(model, kinds=kinds)
    anatomy = prunable(model).anatomy
    twin = timm.create_model(name, num_classes=10, pretrained_cfg_overlay=overlay, **arguments)
    masks = slimming.attach(twin, select_kinds(slimming.describe(twin), kinds))
    with torch.no_grad():
        for number, mask in enumerate(masks.values()):
            mask.copy_(torch.rand(mask.shape, generator=torch.Generator().manual_seed(number)))
    plan = slimming.plan(masks, Budget(latency=0.6), score="mask", latency=built)
    counted = CountingClock().times(TimedModule(slimming.cut(model, plan), anatomy.input_shape), 0, 1)["ms"]
    whole = built.predict(anatomy, {group.name: group.size for group in anatomy.groups})
    assert built.calibration == pytest.approx(1.0, abs=1e-5)
    assert predicted(built, model, plan) == pytest.approx(counted, rel=0.01)
    assert 0.5 < predicted(built, model, plan) / whole <= 0.6
    gone = {group.kind for group in masks.groups if len(plan.kept[group.name]) < group.size}
    assert ("width" in gone) == (kinds is not None)
    assert "token" in gone or "eva" not in name


def hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8))


def beit() -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
    return timm.create_model("beit_base_patch16_224", num_classes=10, **sizes)


WITH_TOKENS = {"transformers": hf_vit, "relative positions": beit}


@pytest.mark.parametrize("make", WITH_TOKENS.values(), ids=WITH_TOKENS)
def test_tokens_of_traced_models_are_priced(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_measurement, "Clock", CountingClock)
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    anatomy = prunable(model).anatomy
    built = build_latency_table(model, kinds=("token", "mlp"))
    masks = slimming.attach(copied(model), select_kinds(anatomy.groups, ("token", "mlp")))
    with torch.no_grad():
        for mask in masks.values():
            mask.copy_(torch.rand(mask.shape))
    plan = slimming.plan(masks, Budget(latency=0.6), score="mask", latency=built)
    small = slimming.cut(model, plan)
    counted = CountingClock().times(TimedModule(small, anatomy.input_shape), 0, 1)["ms"]
    whole = built.predict(anatomy, {group.name: group.size for group in anatomy.groups})
    assert predicted(built, model, plan) == pytest.approx(counted, rel=0.01)
    assert 0.5 < predicted(built, model, plan) / whole <= 0.6
    tokens = [len(plan.kept[group.name]) for group in anatomy.groups if group.kind == "token"]
    assert tokens
    assert max(tokens) < 16
    # The layers of the slim model are given the tokens that are left: nothing is counted beyond them.
    again = build_latency_table(small, kinds=())
    assert all(point["ms"] < 1e-3 * counted for point in again.points if point["kind"] == "rest")


def test_the_calls_of_a_traced_model_are_recorded_once_for_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_measurement, "Clock", CountingClock)
    model = timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 64, 64)}).eval()
    slimming.describe(model)  # reading records them too, once per architecture
    recorded: list[int] = []

    def counted(*arguments: Any) -> Any:
        found = calls(*arguments)
        recorded.append(len(found))
        return found

    monkeypatch.setattr(traced, "calls", counted)
    table = build_latency_table(model)
    assert len(table.points) > 20
    assert len(recorded) == 1
    assert recorded[0] > 10


def test_what_cannot_be(table: LatencyTable, model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a latency table of the device"):
        slimming.plan(masked(model), Budget(latency=0.5), score="mask")
    with pytest.raises(BudgetError, match=r"heads of one size.*--uneven-heads"):
        slimming.plan(masked(model), Budget(latency=0.5), score="mask", latency=table, layout=Layout(equal_heads=False))
    for wrong in (0.0, -1.0, float("nan"), True):
        with pytest.raises(BudgetError, match="latency_ms"):
            Budget(latency_ms=wrong)
    with pytest.raises(BudgetError, match=r"latency=2\.0 is not a share"):
        Budget(latency=2.0)
    other = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_heads": 4})
    with pytest.raises(PlanError, match=r"no times for attention \(4 heads"):
        table.predict(prunable(other).anatomy, {g.name: g.size for g in prunable(other).anatomy.groups})
    with pytest.raises(ConfigError, match="Did you mean 'eager'"):
        build_latency_table(model, runtime="eagre")
    with pytest.raises(ConfigError, match="different settings: batch_size is"):
        table.merged(LatencyTable(setting={**table.setting, "batch_size": 2}))
    broken = {"what": "latency table", "format": 1, "setting": {}, "points": [{}]}
    (tmp_path / "broken.json").write_text(json.dumps(seal(broken)))
    with pytest.raises(CheckpointError, match="is damaged: kind of point 0 is None, not text"):
        LatencyTable.load(tmp_path / "broken.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a latency table of slimming"):
        LatencyTable.load(tmp_path / "other.json")


def test_plans_of_uneven_heads_have_a_table_of_their_own(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_measurement, "Clock", CountingClock)
    uneven = build_latency_table(model, uneven_heads=True)
    whole = uneven.predict(prunable(model).anatomy, {g.name: g.size for g in prunable(model).anatomy.groups})
    layout = Layout(equal_heads=False)
    plan = slimming.plan(masked(model), Budget(latency=0.6), score="mask", latency=uneven, layout=layout)
    assert 0.5 < predicted(uneven, model, plan) / whole <= 0.6
    assert LatencyTable(setting=uneven.setting).uneven_heads
    with pytest.raises(BudgetError, match="heads of different sizes"):
        slimming.plan(masked(model), Budget(latency=0.6), score="mask", latency=uneven)
    with pytest.raises(BudgetError, match="QK and V alike"):
        slimming.plan(masked(model), Budget(latency=0.6), score="mask", latency=uneven, layout=FREE)
    with pytest.raises(ConfigError, match="different settings: heads is 'uneven' and 'one size'"):
        uneven.merged(build_latency_table(model))
    with pytest.raises(UnsupportedModelError, match="keep one size"):
        build_latency_table(timm.create_model("test_convnext"), uneven_heads=True)


@pytest.mark.parametrize("heads", [1, 2, 5, 6], ids=lambda count: f"{count} heads")
def test_timed_layers_of_uneven_heads_hold_as_many_dimensions(heads: int) -> None:
    size = {"img_size": 64, "depth": 1, "embed_dim": 64 * heads, "num_heads": heads}
    vit = timm.create_model("vit_tiny_patch16_224", **size)
    anatomy = prunable(vit).anatomy
    timed = prunable(vit).family.timed_modules(vit, anatomy, uneven_heads=True)
    layer = next(each for each in anatomy.timed_layers if each.kind == "attention")
    for each in (8, 16, 32, 48, 64):
        sizes = {"tokens": 17, "width": 64 * heads, "qkv": 3 * heads * each}
        attention: Any = timed(layer, sizes).module[0].attn  # pyright: ignore
        assert attention.qkv.out_features == sizes["qkv"]
        found = {qk for qk, _ in getattr(attention, "heads", [(each, each)])}
        assert (len(found) > 1) == (heads > 1 and 8 < each < 64), (each, found)
        assert all(0 < qk <= 64 and qk % 8 == 0 for qk in found)


def test_a_table_is_of_one_model(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_classes": 3}
    first, other = (timm.create_model("test_vit", **small, num_heads=heads) for heads in (1, 2))
    table = build_latency_table(first, kinds=["mlp"], path=path, seconds=0.001)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"different settings: model is .*build others in separate files"):
        build_latency_table(other, kinds=["mlp"], path=path, seconds=0.001)
    assert path.read_bytes() == before
    half = len(table.points) // 2
    mine = LatencyTable(setting=table.setting, points=table.points[:half], reference_ms=2.0)
    theirs = LatencyTable(setting=table.setting, points=table.points[half:], reference_ms=1.0, calibration=0.9)
    both = mine.merged(theirs)
    assert both.points[-1]["ms"] == pytest.approx(2 * table.points[-1]["ms"])  # on a machine that takes twice as long
    assert (both.calibration, both.reference_ms) == (0.9, 2.0)
