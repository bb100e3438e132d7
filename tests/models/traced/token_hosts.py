"""Tiny models whose blocks pass on a flat sequence of tokens, and models in which tokens cannot be removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TIMM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 99,
}


def hf(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A maker of a model of transformers."""
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**{**SMALL, **settings})).eval()


def of_timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """A maker of a model of timm."""
    return lambda: timm.create_model(name, **{**TIMM, **settings}).eval()


def swin() -> nn.Module:
    """Swin, whose attention is in windows."""
    settings: dict[str, Any] = {"img_size": 56, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **settings).eval()


def siglip() -> nn.Module:
    """SigLIP, which averages its tokens."""
    return transformers.SiglipForImageClassification(
        transformers.SiglipConfig(vision_config=dict(SMALL), text_config=dict(TEXT))
    ).eval()


def video_mae() -> nn.Module:
    """VideoMAE, whose tokens are tubes of two frames."""
    model: Any = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**SMALL, num_frames=4)).eval()
    model.example_inputs = torch.zeros(1, 4, 3, 32, 32)
    return model


def of_torchvision() -> nn.Module:
    """torchvision's ViT, with ``nn.MultiheadAttention``."""
    model: Any = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=5
    )
    return model.eval()


class OwnBlock(nn.Module):
    """A block of a model of one's own: attention by hand with a scale per token from outside, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))

    def forward(self, x: Tensor, *, tables: dict[str, Tensor]) -> Tensor:
        """Attend among the tokens; ``tables`` holds one factor per patch."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        k = torch.cat([k[..., :1, :], k[..., 1:, :] * tables["scale"]], -2)
        weights = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class OwnViT(nn.Module):
    """A Vision Transformer of one's own that averages the patches."""

    image_size = 32

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.register_token = nn.Conv2d(3, 32, 8, stride=8), nn.Parameter(torch.zeros(1, 1, 32))
        self.position = nn.Parameter(torch.zeros(1, 16, 32))
        self.layers, self.head = nn.ModuleList([OwnBlock() for _ in range(2)]), nn.Linear(32, 5)

    def forward(self, image: Tensor) -> Tensor:
        """Class scores (B, 5) of images (B, 3, 32, 32)."""
        x = self.patches(image).flatten(2).transpose(1, 2) + self.position
        tables = {"scale": 1 + torch.arange(16, dtype=x.dtype)[:, None] / 16}
        x = torch.cat([self.register_token.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x, tables=tables)
        return self.head(x[:, 1:].mean(1))


class Features(OwnViT):
    """The same, which also returns a map of the patches."""

    def forward(self, image: Tensor) -> Any:
        """Class scores and a map (B, 32, 4, 4)."""
        x = self.patches(image).flatten(2).transpose(1, 2) + self.position
        tables = {"scale": 1 + torch.arange(16, dtype=x.dtype)[:, None] / 16}
        x = torch.cat([self.register_token.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x, tables=tables)
        return self.head(x.mean(1)), x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


class Intermediate(OwnViT):
    """The same, whose head reads the mean of the first and of the last block: it adds them token by token."""

    def forward(self, image: Tensor) -> Tensor:
        """Class scores (B, 5)."""
        x = self.patches(image).flatten(2).transpose(1, 2) + self.position
        tables = {"scale": 1 + torch.arange(16, dtype=x.dtype)[:, None] / 16}
        first = self.layers[0](torch.cat([self.register_token.expand(len(x), -1, -1), x], 1), tables=tables)
        return self.head((first + self.layers[1](first, tables=tables)).mean(1))


OFFERED: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "transformers ViT": (hf("ViTForImageClassification", "ViTConfig"), (1, 16, 0)),
    "transformers DeiT with its tokens returned": (hf("DeiTModel", "DeiTConfig"), (2, 16, 0)),
    "DINOv2 with registers": (
        hf("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"),
        (5, 16, 0),
    ),
    "transformers DINOv3, rotary": (hf("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2), (3, 16, 0)),
    "transformers BEiT, relative bias per block": (
        hf("BeitForImageClassification", "BeitConfig", use_relative_position_bias=True),
        (1, 16, 0),
    ),
    "transformers BEiT, shared relative bias": (
        hf("BeitForImageClassification", "BeitConfig", use_shared_relative_position_bias=True),
        (1, 16, 0),
    ),
    "CLIP": (hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=16), (1, 16, 0)),
    "SigLIP, average": (siglip, (0, 16, 0)),
    "SigLIP, pooled by attention": (hf("SiglipVisionModel", "SiglipVisionConfig"), (0, 16, 0)),
    "VideoMAE": (video_mae, (0, 32, 0)),
    "YOLOS, detection tokens at the end": (
        hf(
            "YolosForObjectDetection",
            "YolosConfig",
            image_size=[32, 32],
            num_detection_tokens=5,
            use_mid_position_embeddings=False,
        ),
        (1, 16, 5),
    ),
    "torchvision ViT": (of_torchvision, (1, 16, 0)),
    "timm BEiT": (of_timm("beit_base_patch16_224"), (1, 16, 0)),
    "timm EVA02, rotary": (of_timm("eva02_tiny_patch14_224"), (1, 16, 0)),
    "timm DINOv3": (of_timm("vit_small_patch16_dinov3"), (5, 16, 0)),
    "timm relative positions": (of_timm("vit_relpos_small_patch16_224"), (0, 16, 0)),
    "timm shared relative positions": (of_timm("vit_srelpos_small_patch16_224"), (0, 16, 0)),
    "timm AIMv2": (of_timm("aimv2_large_patch14_224"), (0, 16, 0)),
    "own ViT": (OwnViT, (1, 16, 0)),
}
"""Models -> tokens at the start, removable positions, tokens at the end."""

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Swin": (swin, "windows, stages"),
    "PVT": (
        hf("PvtV2Model", "PvtV2Config", depths=[1] * 4, num_attention_heads=[1, 2, 5, 8], image_size=32),
        "the host does not take other sizes",
    ),
    "feature maps": (hf("Dinov2Backbone", "Dinov2Config"), "they are outputs of the model"),
    "a map beside the scores": (Features, "the host does not take other sizes"),
    "intermediate features": (Intermediate, "the host does not take other sizes"),
    "talking heads": (of_timm("cait_xxs24_224"), "cut and masked differ"),
}
"""Models -> part of the reason why no tokens can be removed."""
