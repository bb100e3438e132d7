"""Models in wrappers and forms of their hosts: cut and given back in the same form, or refused with what unwraps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import slimming
from slimming.core.layout import FREE
from slimming.errors import UnsupportedModelError
from slimming.models.traced.verification import outputs
from slimming.pruning.checks import distance


class Net(nn.Module):
    """Two convolutions and a classifier."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.body, self.fc = nn.Conv2d(16, 24, 3, padding=1), nn.Linear(24, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.body(self.norm(self.stem(x)).relu()).relu()

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.features(x).mean((2, 3)))


class Twice(Net):
    """Calls one layer twice, and then another one."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(24, 24, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        x = super().features(x)
        return self.again(self.again(x).relu()).relu()


class Tied(Net):
    """Two layers share their weights; a third has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 12), nn.Linear(5, 12)
        self.second.weight = self.first.weight
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.last(self.first(x).relu() + self.second(x).relu())


class Dictionary(Net):
    def forward(self, x: Tensor) -> dict[str, Any]:
        high = self.features(x)
        return {"logits": self.fc(high.mean((2, 3))), "aside": [high.mean(1), "name"]}


class Several(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        high = self.features(x)
        return self.fc(high.mean((2, 3))), high.mean(1)


@dataclass
class Scores:
    logits: Tensor
    map: Tensor | None = None


class Data(Net):
    def forward(self, x: Tensor) -> Scores:
        return Scores(logits=super().forward(x))


class TwoInputs(Net):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x * weight)


def compiled_in_place() -> nn.Module:
    model = Net()
    model.compile(backend="eager")
    return model


def features_only() -> nn.Module:
    overlay = {"input_size": (3, 32, 32)}
    return timm.create_model("test_resnet", features_only=True, pretrained_cfg_overlay=overlay)


def frozen() -> nn.Module:
    model = Net()
    for part in (model.stem, model.norm):
        part.requires_grad_(False)
    return model


IMAGE = torch.zeros(1, 3, 16, 16)
FORMS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "compiled in place": (compiled_in_place, None),
    "features only": (features_only, None),
    "half precision": (lambda: Net().half(), None),
    "bfloat16": (lambda: Net().bfloat16(), None),
    "channels last": (lambda: Net().to(memory_format=torch.channels_last), None),  # pyright: ignore
    "frozen parts": (frozen, None),
    "tied weights": (Tied, None),
    "a layer called twice": (Twice, None),
    "dictionary": (Dictionary, None),
    "tuple": (Several, None),
    "dataclass": (Data, None),
    "two inputs": (TwoInputs, (IMAGE, torch.ones(1, 1, 16, 16))),
}


def form_of(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What a cut must keep of every parameter."""
    return {
        name: (
            parameter.dtype,
            parameter.requires_grad,
            parameter.dim() == 4 and not parameter.is_contiguous(),
        )
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_model_is_given_back_in_its_form(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, example = FORMS[form]
    model: Any = make()
    before, kind, shared = form_of(model), type(model), len(list(model.parameters()))
    groups = [group for group in slimming.describe(model, example_inputs=example) if group.kind != "block"]
    assert groups
    like = next(model.parameters())
    size = 32 if form == "features only" else 16
    batch = torch.randn(4, 3, size, size, dtype=like.dtype)
    if form != "two inputs" and like.dtype not in (torch.float16, torch.bfloat16):
        scored = slimming.score(model, [batch])
        assert set(scored.scores) >= {group.name for group in groups if group.kind in ("channel", "mlp")}
    masks = slimming.attach(model, groups)
    plan = slimming.plan(masks, slimming.Budget(keep={group.kind: 0.5 for group in groups}), layout=FREE)
    masks.detach_()
    slim: Any = slimming.cut(model, plan)
    assert type(slim) is kind
    assert form_of(slim) == before
    assert form_of(model) == before
    assert len(list(slim.parameters())) == shared
    slimming.save(slim, tmp_path / "slim")
    own = kind.__module__.startswith("tests") or kind.__module__ == __name__
    loaded = slimming.load(tmp_path / "slim", dense=make() if own else None)
    call = (batch, torch.ones(4, 1, size, size)) if form == "two inputs" else batch
    with torch.no_grad():
        pairs = zip(outputs(slim.eval(), call), outputs(loaded.eval(), call), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    found = slimming.check(make(), example_inputs=example)
    assert found.ok, found


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "torch.compile": (lambda model: torch.compile(model, backend="eager"), "_orig_mod"),  # pyright: ignore
    "DataParallel": (nn.DataParallel, "module"),
    "AveragedModel": (AveragedModel, "module"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=str)
def test_a_wrapper_is_refused_with_its_attribute(wrapper: str) -> None:
    wrap, attribute = WRAPPERS[wrapper]
    wrapped: Any = wrap(Net())
    for call in (slimming.describe, slimming.attach):
        with pytest.raises(UnsupportedModelError, match=rf"around a model: give its attribute {attribute}"):
            call(wrapped)
    assert slimming.describe(getattr(wrapped, attribute))


def test_distributed_data_parallel_is_refused_with_its_attribute(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Net())
        with pytest.raises(UnsupportedModelError, match="DistributedDataParallel around a model: give its attribute"):
            slimming.describe(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_a_part_that_is_compiled_is_named() -> None:
    model: Any = Net()
    model.body = torch.compile(model.body, backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"body is compiled.* attribute _orig_mod in its place"):
        slimming.describe(model)
    model.body = model.body._orig_mod
    assert slimming.describe(model)


def lora(targets: list[str]) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=3)
    config = peft.LoraConfig(r=2, target_modules=targets)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return wrapped


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_peft_are_merged_first() -> None:
    wrapped = lora(["fc1", "qkv"])
    for given in (wrapped, wrapped.base_model):
        with pytest.raises(UnsupportedModelError, match=r"merge_and_unload\(\)"):
            slimming.describe(given)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = wrapped.eval()(x)
        merged = wrapped.merge_and_unload()
        assert distance([expected], [merged(x)]) < 1e-4
    assert {group.kind for group in slimming.describe(merged)} >= {"head_dim", "mlp", "token"}
