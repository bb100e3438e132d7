"""A small ViT in float64 and images for it."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}


def vit(**more: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**VIT, **more}).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images(count: int = 2, batch: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(count)]
