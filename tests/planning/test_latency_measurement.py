"""How latency tables are built: which sizes are timed, what is told and kept meanwhile, and how times are scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from clocks import CountingClock
from planning.tiny import anatomy_of, mlp, sizes
from slimming.core.formulas import Dim
from slimming.core.groups import REST, TimedLayer
from slimming.core.kinds import KINDS
from slimming.errors import ConfigError
from slimming.models.family import TimedModule
from slimming.planning import latency_measurement
from slimming.planning.latency_measurement import Clock, build_latency_table
from slimming.planning.latency_table import LatencyTable

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_measurement, "Clock", CountingClock)
    monkeypatch.setattr(CountingClock, "asked", 0)


def vit(width: int) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **SMALL, embed_dim=width).eval()


def test_what_does_not_exist_is_refused_before_anything_is_timed() -> None:
    for arguments, says in (({"runtime": "eagre"}, "Did you mean 'eager'"), ({"kinds": ("widht",)}, "kind 'widht'")):
        with pytest.raises(ConfigError, match=says):
            build_latency_table(vit(32), **arguments)
    assert CountingClock.asked == 0


def test_points_are_counted_in_the_log_and_kept_after_every_ten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines: list[str] = []
    whole = build_latency_table(vit(32), kinds=KINDS, log=lines.append)
    count = len(whole.points)
    assert count > 25
    assert [line.partition(":")[0] for line in lines] == [f"{n} of {count}" for n in range(1, count + 1)]

    class Stopped(CountingClock):
        def times(self, *arguments: Any) -> dict[str, Any]:
            if CountingClock.asked == 25:
                raise KeyboardInterrupt
            return super().times(*arguments)

    monkeypatch.setattr(latency_measurement, "Clock", Stopped)
    CountingClock.asked = 0
    with pytest.raises(KeyboardInterrupt):
        build_latency_table(vit(32), kinds=KINDS, path=tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json").points == whole.points[:20]


@pytest.mark.parametrize(("width", "half"), [(48, None), (64, 128), (80, 128), (96, 192)], ids=str)
def test_multiples_are_timed_near_half_of_the_largest_size_from_256_on(
    monkeypatch: pytest.MonkeyPatch, width: int, half: int | None
) -> None:
    timed: list[int] = []

    class Watching(CountingClock):
        def times(self, timed_module: TimedModule, seconds: float, reference_ms: float) -> dict[str, Any]:
            timed.extend(m.out_features for n, m in timed_module.module.named_modules() if n.endswith("mlp.fc1"))
            return super().times(timed_module, seconds, reference_ms)

    monkeypatch.setattr(latency_measurement, "Clock", Watching)
    found = build_latency_table(vit(width), kinds=["mlp"]).multiples
    if half is None:
        assert not found
        return
    assert list(found) == [1, 2, 4, 8, 16, 32, 64]
    assert set(timed[-8:]) == {half + more for more in (0, 1, 2, 4, 8, 16, 32, 64)}


@pytest.mark.parametrize("size", [1, 2, 3, 8], ids=str)
def test_the_time_beyond_the_layers_falls_with_what_it_depends_on(size: int) -> None:
    group = mlp("m", size)
    layers = (
        TimedLayer(name="first", kind="conv", like="1", axes=(("out", Dim(fixed=4, groups=())),)),
        TimedLayer(name="all else", kind=REST, like="", axes=(("elements", Dim(fixed=0, groups=(("m", 1),))),)),
    )
    anatomy = anatomy_of(group, layers=layers)
    table = LatencyTable(setting={}, points=({"kind": "conv", "like": "1", "out": 4, "ms": 2.0},), reference_ms=1.0)
    found = latency_measurement.calibrated(table, anatomy, 10.0)
    assert found.calibration == pytest.approx(1.0)
    for kept in range(1, size + 1):
        assert found.predict(anatomy, {"m": kept}) == pytest.approx(2.0 + 8.0 * kept / size)
    assert found.predict(anatomy, sizes(group)) == pytest.approx(10.0)


def test_the_time_beyond_the_layers_of_a_block_falls_with_its_tokens() -> None:
    axes = (("elements", Dim(fixed=6)), ("tokens", Dim(groups=(("m", 1),))))
    layers = (
        TimedLayer(name="first", kind="conv", like="1", axes=(("out", Dim(fixed=4)),)),
        TimedLayer(name="rest block", kind=REST, like="block", axes=axes),
        TimedLayer(name="rest", kind=REST, like="", axes=(("elements", Dim(fixed=12)),)),
    )
    anatomy = anatomy_of(mlp("m", 8), layers=layers)
    table = LatencyTable(setting={}, points=({"kind": "conv", "like": "1", "out": 4, "ms": 4.0},), reference_ms=1.0)
    found = latency_measurement.calibrated(table, anatomy, 10.0)
    for kept in (2, 4, 8):  # 6 elements of each token, and 12 more
        assert found.predict(anatomy, {"m": kept}) == pytest.approx(4.0 + 6.0 * (6 * kept + 12) / 60)


@pytest.mark.parametrize(
    ("size", "timed"), [(4, (1, 2, 3, 4)), (6, (1, 2, 3, 5, 6)), (8, (2, 4, 6, 8))], ids=("4", "6", "8")
)
def test_small_layers_are_timed_at_sizes_of_their_own(size: int, timed: tuple[int, ...]) -> None:
    layer = TimedLayer(name="fc", kind="mlp", like="1", axes=(("hidden", Dim(fixed=0, groups=(("m", 1),))),))
    points = list(latency_measurement.grid_points(anatomy_of(mlp("m", size), layers=(layer, layer)), {"m"}))
    assert [at for _, at in points] == [{"hidden": each} for each in timed]
    whole = list(latency_measurement.grid_points(anatomy_of(mlp("m", size), layers=(layer,)), ()))
    assert [at for _, at in whole] == [{"hidden": size}]


def test_times_are_those_of_one_copy_in_units_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def paired(modules: dict[str, Any], *_: Any, **__: Any) -> dict[str, list[float]]:
        return {"layer": [4.0, 8.0, 12.0], "block": [1.0, 2.0, 4.0]}

    monkeypatch.setattr(latency_measurement, "paired_times", paired)
    clock = Clock(TimedModule(nn.Identity(), (3,)), torch.zeros(1), batch_size=2, runtime="eager")
    found = clock.times(TimedModule(nn.Identity(), (3,), 2), 0.01, 10.0)
    assert found["ms"] == pytest.approx(20.0)  # 4 blocks of 10 ms for two copies
    assert found["runs"] == 3


def test_the_reference_block_computes_on_an_input_of_its_own() -> None:
    clock = Clock(TimedModule(nn.Linear(3, 5), (3,)), torch.zeros(1), batch_size=2, runtime="eager")
    assert clock.block.x.shape == (2, 3)
    with torch.no_grad():
        assert torch.equal(clock.block(torch.zeros(7)), clock.block.module(clock.block.x))
