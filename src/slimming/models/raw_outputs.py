"""The modules of detectors whose outputs say what the model computes, where it returns only what it selected of them.

The detectors of torchvision return the boxes that remain after thresholds and non-maximum suppression. Their number
changes with the image, and hardly any gradient reaches the network through it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

DETECTORS = "torchvision.models.detection."
HEADS = ("head", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor", "roi_heads.keypoint_predictor")
"""Modules of torchvision's detectors that give logits and boxes for all anchors or proposals."""
KINDS: Mapping[str, str] = {
    r"(^head\.cls_logits|^rpn\.head\.0\.\d+|mask_predictor|bbox_ctrness)$": "binary",
    r"box_predictor\.0$": "classes",
}
"""Pattern of the name of an output -> its kind, see `slimming.training.outputs.CountedOutput`; others are values."""


def raw_output_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules whose outputs count for ``model``; empty if those that it returns count."""
    if not type(model).__module__.startswith(DETECTORS):
        return ()
    names = dict(model.named_modules())
    return tuple(name for name in HEADS if name in names)


def raw_kind(name: str) -> str:
    """Return the kind of a raw output by its name."""
    return next((kind for pattern, kind in KINDS.items() if re.search(pattern, name)), "values")
