"""Small variants of torchvision's detectors and segmenters, with the calls by which they are read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection, segmentation
from torchvision.models.detection import (
    faster_rcnn,
    keypoint_rcnn,
    mask_rcnn,
    retinanet,
    ssd,
    ssdlite,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.segmentation import deeplabv3, fcn, lraspp
from torchvision.ops import FeaturePyramidNetwork

SIDE = 64
Made = tuple[nn.Module, Any]
"""A model, and its example inputs."""


def conv(inputs: int, outputs: int, stride: int = 2) -> nn.Sequential:
    """A convolution with BatchNorm."""
    layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Pyramid(nn.Module):
    """A small backbone with a feature pyramid of three levels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), conv(8, 12))
        self.stages = nn.ModuleList([conv(12, 16), conv(16, 20), conv(20, 24)])
        self.pyramid = FeaturePyramidNetwork([16, 20, 24], width)
        self.out_channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, features = self.stem(images), OrderedDict()
        for level, stage in enumerate(self.stages):
            x = features[str(level)] = stage(x)
        return self.pyramid(features)


class Maps(nn.Module):
    """A small backbone that gives two maps, ``low`` and ``high`` or ``aux`` and ``out``."""

    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(conv(3, 8), conv(8, 16)), conv(16, 24)
        self.names = names

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        first = self.first(images)
        return OrderedDict(zip(self.names, (first, self.second(first)), strict=True))


SIZES = {"min_size": SIDE, "max_size": SIDE}
ROI = {
    **SIZES,
    "rpn_post_nms_top_n_train": 12,
    "rpn_post_nms_top_n_test": 12,
    "box_detections_per_img": 6,
    "box_score_thresh": 0.0,
    "box_batch_size_per_image": 8,
}


def _anchors() -> AnchorGenerator:
    return AnchorGenerator(((16,), (32,), (48,)), ((0.5, 1.0),) * 3)


def _detector(model: nn.Module, **further: Tensor) -> Made:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, SIDE, SIDE, generator=generator)]
    boxes = torch.tensor([[4.0, 6.0, 30.0, 28.0], [28.0, 30.0, 60.0, 58.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2]), **further}
    return model.eval(), [(images,), (images, [target])]


def _roi_parts() -> dict[str, Any]:
    box = faster_rcnn.TwoMLPHead(16 * 49, 32)
    return {"rpn_anchor_generator": _anchors(), "box_head": box, "box_predictor": faster_rcnn.FastRCNNPredictor(32, 3)}


def faster() -> Made:
    """Faster R-CNN."""
    return _detector(detection.FasterRCNN(Pyramid(), None, **_roi_parts(), **ROI))


def masks() -> Made:
    """Mask R-CNN."""
    head, predictor = mask_rcnn.MaskRCNNHeads(16, (16, 16), 1), mask_rcnn.MaskRCNNPredictor(16, 12, 3)
    model = detection.MaskRCNN(Pyramid(), None, mask_head=head, mask_predictor=predictor, **_roi_parts(), **ROI)
    drawn = torch.zeros(2, SIDE, SIDE, dtype=torch.uint8)
    drawn[0, 6:28, 4:30] = drawn[1, 30:58, 28:60] = 1
    return _detector(model, masks=drawn)


def keypoints() -> Made:
    """Keypoint R-CNN, in evaluation."""
    head, predictor = keypoint_rcnn.KeypointRCNNHeads(16, (16, 16)), keypoint_rcnn.KeypointRCNNPredictor(16, 5)
    model = detection.KeypointRCNN(
        Pyramid(), None, keypoint_head=head, keypoint_predictor=predictor, **_roi_parts(), **ROI
    )
    made, calls = _detector(model)
    return made, calls[:1]  # torchvision takes key points in float32 only, and models are read in float64


def retina() -> Made:
    """RetinaNet with BatchNorm in its heads."""
    head = retinanet.RetinaNetHead(16, 2, 3, norm_layer=nn.BatchNorm2d)
    return _detector(
        detection.RetinaNet(Pyramid(), 3, anchor_generator=_anchors(), head=head, score_thresh=0.0, **SIZES)
    )


def fcos_() -> Made:
    """FCOS, whose heads have GroupNorm with 32 groups."""
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    return _detector(detection.FCOS(Pyramid(32), 3, anchor_generator=anchors, score_thresh=0.0, **SIZES))


def ssd_lite() -> Made:
    """SSDlite."""
    backbone = Pyramid()
    head = ssdlite.SSDLiteHead([16] * 3, [4] * 3, 3, nn.BatchNorm2d)
    boxes = DefaultBoxGenerator([[2]] * 3, min_ratio=0.2, max_ratio=0.9)
    model = ssd.SSD(backbone, boxes, (SIDE, SIDE), 3, head=head, score_thresh=0.0, topk_candidates=20)
    return _detector(model)


def _segmenter(model: nn.Module) -> Made:
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return model.eval(), images


def deeplab() -> Made:
    """DeepLabV3 with its auxiliary head."""
    head, auxiliary = deeplabv3.DeepLabHead(24, 3, (2, 4)), fcn.FCNHead(16, 3)
    return _segmenter(segmentation.DeepLabV3(Maps(("aux", "out")), head, auxiliary))


def lr_aspp() -> Made:
    """LR-ASPP."""
    return _segmenter(lraspp.LRASPP(Maps(("low", "high")), 16, 24, 3, 16))


def fcn_() -> Made:
    """FCN."""
    return _segmenter(segmentation.FCN(Maps(("aux", "out")), fcn.FCNHead(24, 3)))


MODELS: dict[str, Callable[[], Made]] = {
    "Faster R-CNN": faster,
    "Mask R-CNN": masks,
    "Keypoint R-CNN": keypoints,
    "RetinaNet": retina,
    "FCOS": fcos_,
    "SSDlite": ssd_lite,
    "DeepLabV3": deeplab,
    "LR-ASPP": lr_aspp,
    "FCN": fcn_,
}
