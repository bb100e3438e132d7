"""What is saved can be loaded: replaced layers are recorded, parts of slim models too, and the rest is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import slimming
from slimming.core.budget import Budget
from slimming.errors import CheckpointError, UnsupportedModelError

transformers = pytest.importorskip("transformers")

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
HF = {
    **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48},
    **{"image_size": 16, "patch_size": 8},
}


class Own(nn.Module):
    """A model that only its user can make."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.stem(x)).relu().mean((2, 3)))


class Wrapper(nn.Module):
    """A model of a user around one of timm."""

    image_size = 32

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("test_resnet", num_classes=0)
        self.fc = nn.Linear(self.backbone.num_features, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.backbone(x))


def _squeezenet() -> nn.Module:
    model: Any = torchvision.models.squeezenet1_1(num_classes=3)
    model.image_size = 32
    return model


def _resnet() -> nn.Module:
    model: Any = timm.create_model("test_resnet", num_classes=3)
    model.image_size = 32
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "vit of timm": (lambda: timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=3), "head"),
    "cnn of timm": (_resnet, "fc"),
    "squeezenet": (_squeezenet, "classifier"),
    "vit of transformers": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**HF)), "classifier"),
    "own": (Own, "fc"),
}


def _slim(model: nn.Module) -> Any:
    torch.manual_seed(0)
    kinds = {group.kind for group in slimming.describe(model)} & {"mlp", "channel"}
    masks = slimming.attach(model)
    plan = slimming.plan(masks, Budget(keep=dict.fromkeys(kinds, 0.5)))
    masks.detach_()
    return slimming.cut(model, plan).eval()


def _image(model: nn.Module) -> torch.Tensor:
    size = 16 if getattr(model, "image_size", None) == 16 or not hasattr(model, "image_size") else 32
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def _out(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    found = model(image)
    return getattr(found, "logits", found)


def _width(layer: nn.Module) -> int:
    layers = [each for each in layer.modules() if isinstance(each, (nn.Linear, nn.Conv2d))]
    first = layers[0]
    return first.in_features if isinstance(first, nn.Linear) else first.in_channels


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "other classes": lambda width: nn.Linear(width, 5),
    "no bias": lambda width: nn.Linear(width, 5, bias=False),
    "two layers": lambda width: nn.Sequential(nn.Dropout(0.2), nn.Linear(width, 7), nn.ReLU(), nn.Linear(7, 5)),
}


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "squeezenet"], ids=str)
def test_a_replaced_head_loads_again(name: str, head: str, tmp_path: Path) -> None:
    make, at = MODELS[name]
    small = _slim(make())
    setattr(small, at, HEADS[head](_width(getattr(small, at))))
    small.eval()
    slimming.save(small, tmp_path / "saved")
    again = slimming.load(tmp_path / "saved", dense=make() if name == "own" else None)
    assert torch.equal(_out(again, _image(small)), _out(small, _image(small)))
    slimming.save(again, tmp_path / "twice")
    twice = slimming.load(tmp_path / "twice", dense=make() if name == "own" else None)
    assert torch.equal(_out(twice, _image(small)), _out(small, _image(small)))


@pytest.mark.parametrize("name", ["vit of timm", "cnn of timm", "vit of transformers", "own"], ids=str)
def test_a_head_replaced_before_the_cut_loads_again_and_is_cut_again(name: str, tmp_path: Path) -> None:
    make, at = MODELS[name]
    dense = make()
    setattr(dense, at, nn.Sequential(nn.Linear(_width(getattr(dense, at)), 6), nn.GELU(), nn.Linear(6, 5)))
    user = (lambda: copy.deepcopy(dense)) if name == "own" else (lambda: None)
    small = _slim(_slim(dense))
    slimming.save(small, tmp_path / "saved")
    again = slimming.load(tmp_path / "saved", dense=user())
    assert torch.equal(_out(again, _image(small)), _out(small, _image(small)))


class Odd(nn.Linear):
    """A layer of a user, which no structure can record."""


def _odd_head(model: Any, at: str) -> None:
    setattr(model, at, Odd(_width(getattr(model, at)), 5))


def _buffer(model: Any, at: str) -> None:
    getattr(model, at).register_buffer("mean", torch.zeros(3))


def _parameter(model: Any, at: str) -> None:
    model.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("change_", [_odd_head, _buffer, _parameter], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["vit of timm", "cnn of timm", "vit of transformers", "own"], ids=str)
def test_a_change_that_no_file_can_hold_is_refused(
    name: str, change_: Callable[[Any, str], None], tmp_path: Path
) -> None:
    make, at = MODELS[name]
    small = _slim(make())
    change_(small, at)
    with pytest.raises(UnsupportedModelError, match=r"its file could not be loaded: .* before it is cut"):
        slimming.save(small, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_slim_model_is_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    slim, wrapper = _slim(MODELS["vit of transformers"][0]()), _slim(Wrapper())
    image = torch.randn(1, 3, 16, 16)
    slimming.save(slim.vit, tmp_path / "vit")
    again: Any = slimming.load(tmp_path / "vit")
    assert torch.equal(again(image).last_hidden_state, slim.vit(image).last_hidden_state)
    slimming.save(wrapper.backbone, tmp_path / "backbone")
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(slimming.load(tmp_path / "backbone")(image), wrapper.backbone(image))


def test_a_part_that_cannot_be_made_by_itself_is_refused(tmp_path: Path) -> None:
    slim = _slim(MODELS["vit of timm"][0]())
    holder = nn.Sequential(slim.patch_embed, slim.blocks)
    holder.image_size = 16  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedModelError, match="part of a model that was cut"):
        slimming.save(holder, tmp_path / "part")
    assert not list(tmp_path.iterdir())


def test_a_damaged_record_of_a_replaced_layer_is_refused(tmp_path: Path) -> None:
    import json

    from slimming.core.files import seal

    small = _slim(MODELS["cnn of timm"][0]())
    small.fc = nn.Sequential(nn.Linear(_width(small.fc), 5))
    slimming.save(small, tmp_path / "saved")
    file = tmp_path / "saved" / "structure.json"
    for change in (
        {"fc": {"class": "Evil", "arguments": {}}},
        {"fc": {"class": "Linear", "arguments": {"in_features": "evil.pth", "out_features": 5, "bias": True}}},
        {"fc": {"class": "Linear", "arguments": {"in_features": 8}}},
        {"fc": []},
        {"nowhere.fc": {"class": "Identity", "arguments": {}}},
    ):
        value = json.loads(file.read_text())
        del value["sha256"]
        file.write_text(json.dumps(seal({**value, "replaced": change})))
        with pytest.raises(CheckpointError):
            slimming.load(tmp_path / "saved")


def test_torchvision_keeps_the_image_size(tmp_path: Path) -> None:
    small = _slim(_squeezenet())
    slimming.save(small, tmp_path / "saved")
    again = slimming.load(tmp_path / "saved")
    assert slimming.cost(again).macs == slimming.cost(small).macs
    slimming.save(again, tmp_path / "again")
    assert slimming.cost(slimming.load(tmp_path / "again")).macs == slimming.cost(small).macs


@pytest.mark.parametrize("images", [0, 4], ids=["plain", "compensated"])
def test_channels_last_stays(images: int, tmp_path: Path) -> None:
    def kept(model: nn.Module) -> set[bool]:
        weights = [parameter for parameter in model.parameters() if parameter.dim() == 4]
        assert any(not weight.is_contiguous() for weight in weights)
        return {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights}

    dense = _resnet().to(memory_format=torch.channels_last)
    masks = slimming.attach(dense)
    plan = slimming.plan(masks, Budget(keep={"channel": 0.5}))
    masks.detach_()
    small = slimming.cut(dense, plan, images=[torch.randn(images, 3, 32, 32)] if images else ())
    assert kept(small) == {True}
    slimming.save(small, tmp_path / "saved")
    assert kept(slimming.load(tmp_path / "saved")) == {True}
    slimming.save(_resnet(), tmp_path / "plain")
    plain = slimming.load(tmp_path / "plain")
    assert all(parameter.is_contiguous() for parameter in plain.parameters())


def test_a_slim_model_whose_class_was_changed_is_pickled_and_copied() -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    beit = timm.create_model("beit_base_patch16_224", **sizes, num_classes=5)
    masks = slimming.attach(beit)
    plan = slimming.plan(masks, Budget(keep={"head_dim": 0.5}))
    masks.detach_()
    small: Any = slimming.cut(beit, plan).eval()
    assert type(small.blocks[0].attn) is not type(beit.blocks[0].attn)
    image = torch.randn(1, 3, 32, 32)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(image), small(image))
    assert torch.equal(copy.deepcopy(small)(image), small(image))
    assert slimming.describe(again) == slimming.describe(small)
