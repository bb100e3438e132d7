"""Channels are followed to an end in every model, whole detectors too, and what cannot be followed is named."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator

import slimming
from slimming.masks.attachment import prunable
from slimming.models.traced import coupling


@pytest.fixture(autouse=True)
def _ends() -> Iterator[None]:
    """Fail the test after half a minute; `pytest.fail` raises what no `except Exception` catches."""

    def stop(*_: object) -> None:
        pytest.fail("no end after 30 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def share(model: nn.Module) -> float:
    """The share of the multiply-adds that can be removed, after masked and cut model agreed."""
    found = slimming.check(model)
    # What a detector multiplies depends on what it finds, so its costs are not compared.
    assert found.steps[0].held, str(found)
    assert found.ok or isinstance(model, Single), str(found)
    return found.covered_macs


class Rotated(nn.Module):
    """Adds channels to themselves, rotated as in position encodings, between layers that can be cut."""

    image_size = 16

    def __init__(self, wide: int = 32) -> None:
        super().__init__()
        self.first, self.turned = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.wide, self.last = nn.Conv2d(16, wide, 3, padding=1), nn.Conv2d(wide, 5, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image)
        y = self.turned(x)
        for _ in range(3):
            a, b = y.chunk(2, dim=1)
            y = y * 0.7 + torch.cat([-b, a], dim=1) * 0.3 + x
        return self.last(self.wide(y).relu()).mean((2, 3))


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class PositionAttention(nn.Module):
    """Attention between all positions of a feature map, as in decoders of MA-Net."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rows, self.columns = nn.Conv2d(channels, 8, 1), nn.Conv2d(channels, 8, 1)
        self.values, self.out = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.rows(x).flatten(2).transpose(1, 2) @ self.columns(x).flatten(2)
        mixed = weights.softmax(-1) @ self.values(x).flatten(2).transpose(1, 2)
        return self.out(x + mixed.transpose(1, 2).reshape(x.shape))


class Fusion(nn.Module):
    """Joins a feature map with a larger one, both weighted by what squeezed maps say."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.narrow, self.join = convolution(inputs, channels), convolution(2 * channels, channels)
        self.low, self.high = self._squeeze(channels), self._squeeze(channels)

    @staticmethod
    def _squeeze(channels: int) -> nn.Sequential:
        narrow = nn.Conv2d(channels, channels // 4, 1), nn.ReLU(), nn.Conv2d(channels // 4, channels, 1), nn.Sigmoid()
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), *narrow)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        x = functional.interpolate(self.narrow(x), scale_factor=2.0)
        return self.join(torch.cat([x * (self.low(x) + self.high(skipped)), skipped], dim=1))


class Segmenter(nn.Module):
    """An encoder, position attention, and a decoder that fuses."""

    image_size = 32

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        sizes = (16, 32, 64)
        self.encoder = nn.ModuleList(convolution(*pair) for pair in zip((3, *sizes), sizes, strict=False))
        self.attention = PositionAttention(64)
        self.decoder = nn.ModuleList([Fusion(64, 32), Fusion(32, 16)])
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        features: list[Tensor] = []
        for number, stage in enumerate(self.encoder):
            x = stage(functional.max_pool2d(x, 2) if number else x)
            features.append(x)
        x = self.attention(x)
        for fuse, skipped in zip(self.decoder, features[-2::-1], strict=True):
            x = fuse(x, skipped)
        return self.head(x)


def small_detector() -> nn.Module:
    """A whole Faster R-CNN with a small backbone."""
    backbone = nn.Sequential(convolution(3, 16), nn.MaxPool2d(4), convolution(16, 24), nn.MaxPool2d(4))
    backbone.out_channels = 24  # pyright: ignore
    anchors = AnchorGenerator(((16, 32),), ((1.0,),))
    torch.manual_seed(0)
    model = detection.FasterRCNN(
        backbone, 3, rpn_anchor_generator=anchors, min_size=64, max_size=64, box_score_thresh=0.0
    )
    return Single(model, 64).eval()


class Single(nn.Module):
    """A detector for one image."""

    def __init__(self, detector: nn.Module, image_size: int) -> None:
        super().__init__()
        self.detector, self.image_size = detector, image_size

    def forward(self, image: Tensor) -> list[dict[str, Tensor]]:
        return self.detector(list(image))


@pytest.mark.parametrize(
    ("make", "least"),
    [(Rotated, 0.3), (Segmenter, 0.8), (small_detector, 0.9)],
    ids=["rotated channels", "position attention in a decoder", "whole Faster R-CNN"],
)
def test_models_whose_channels_come_back_to_themselves_are_read_and_cut(make, least: float):
    torch.manual_seed(0)
    assert share(make()) > least


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"], ids=["SSDlite", "Faster R-CNN"]
)
def test_whole_detectors_of_torchvision_are_read(name: str):
    signal.alarm(120)
    model = Single(getattr(detection, name)(weights=None, weights_backbone=None).eval(), 320)
    assert slimming.check(model).covered_macs > 0.8


def test_layers_whose_output_only_chooses_are_read():
    """The scores of proposals choose what is computed: no gradient of the result reaches the layer that makes them."""
    groups = {group.name: group for group in slimming.describe(small_detector())}
    conv = groups["detector.rpn.head.conv.0.0.channels"]
    assert {part.tensor for part in conv.slices if part.side == "consumes"} == {
        "detector.rpn.head.cls_logits.weight",
        "detector.rpn.head.bbox_pred.weight",
    }


def test_channels_beyond_the_budget_are_named_with_the_module_and_the_rest_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(coupling, "STEPS", 300)
    anatomy = prunable(Rotated(wide=6)).anatomy  # readings are cached by architecture
    assert [group.name for group in anatomy.groups if group.kind == "channel"] == ["wide.channels"]
    reason = next(reason for reason in anatomy.uncovered if "too many steps" in reason)
    assert "from first" in reason
    assert "the model (Rotated)" in reason
    assert "Register a row" in reason


def test_reading_says_what_it_reads_after_a_few_seconds(monkeypatch: pytest.MonkeyPatch, capsys):
    ticks = itertools.count(step=5)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    slimming.describe(Segmenter(classes=4))
    lines = capsys.readouterr().err.splitlines()
    assert any("reading Segmenter: following the channels of " in line for line in lines)
    assert any("reading Segmenter: checking" in line for line in lines)


def test_reading_that_is_fast_says_nothing(capsys):
    slimming.describe(Rotated(wide=48))
    assert capsys.readouterr().err == ""
