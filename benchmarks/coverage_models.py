"""The models of the sweep of `benchmarks.coverage`: of every model file of timm, of torchvision, of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from slimming.models.family import ORIGIN
from slimming.models.traced.rebuild import example_candidates

SIZES = (64, 96, 128, 160, 192, 224, 256, None)
"""Image sizes to try, the smallest that a model takes is used; None is its own."""
FEWER: dict[str, Any] = {"depth": 2, "depths": (1, 1, 1, 1), "layers": (1, 1, 1, 1)}
LARGE = 15_000_000
"""Models with more parameters are made with few blocks, where their constructor allows it; the row says so."""
TOO_LARGE = (
    "convnext_large", "regnet_y_128gf", "regnet_y_32gf", "vgg13", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vit_h_14",
    "vit_l_16", "vit_l_32",
)  # fmt: skip
"""Classifiers of torchvision above 120 million parameters that are larger members of rows that are there."""
ATTENTION = (
    "beit", "cait", "coat", "convit", "crossvit", "davit", "deepseek_vit", "deit", "efficientformer",
    "efficientformer_v2", "eva", "gcvit", "gemma4_vit", "hiera", "hieradet_sam2", "levit", "maxxvit", "mobilevit",
    "mvitv2", "naflexvit", "nest", "pit", "pvt_v2", "qwen3_vit", "swin_transformer", "swin_transformer_v2",
    "swin_transformer_v2_cr", "tiny_vit", "tnt", "twins", "visformer", "vision_transformer",
    "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam", "vitamin", "volo", "xcit",
)  # fmt: skip
"""Model files of timm whose models are transformers: blocks of attention, alone or after convolutions."""

WINDOWED = {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4, "patch_size": 4}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTModel", {}),
    "deit": ("DeiTModel", {}),
    "dinov2": ("Dinov2Model", {}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {}),
    "dinov3_vit": ("DINOv3ViTModel", {}),
    "beit": ("BeitModel", {}),
    "clip_vision": ("CLIPVisionModel", {}),
    "siglip_vision": ("SiglipVisionModel", {}),
    "siglip2_vision": ("Siglip2VisionModel", {}),
    "swin": ("SwinModel", {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4, "patch_size": 4}),
    "swinv2": (
        "Swinv2Model",
        {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4, "patch_size": 4},
    ),
    "pvt": ("PvtModel", {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 5, 8]}),
    "pvt_v2": ("PvtV2Model", {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 5, 8]}),
    "segformer": ("SegformerModel", {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 5, 8]}),
    "yolos": ("YolosModel", {"image_size": [64, 64]}),
}
"""Model type of transformers -> class and arguments of its configuration beside the small ones."""
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 16,
}


def targets(only: tuple[str, ...] | None, every: bool) -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """Key, family and maker of each model."""
    import timm
    import torchvision

    def wanted(*names: str) -> bool:
        return only is None or any(name in only for name in names)

    for module in timm.list_modules():
        rows = {f"timm/{name}" for name in timm.list_models(module=module)}
        if wanted(module):
            for name in variants(module, every):
                yield f"timm/{name}", module, lambda name=name: small_timm(name)
        elif only is not None:
            for key in sorted(rows.intersection(only)):
                yield key, module, lambda key=key: small_timm(key.removeprefix("timm/"))
    for name in torchvision.models.list_models(module=torchvision.models):
        if wanted("torchvision", key := f"torchvision/{name}") and name not in TOO_LARGE:
            yield key, "torchvision", lambda name=name: small_torchvision(name)
    for name in TRANSFORMERS:
        if wanted("transformers", key := f"transformers/{name}"):
            yield key, "transformers", lambda name=name: small_transformers(name)


def variants(module: str, every: bool) -> list[str]:
    """The smallest model of each structure in one model file of timm; only the smallest by default.

    A structure is the set of classes of the modules that hold parameters, so that another activation is no other.
    """
    import timm

    found: dict[frozenset[str], tuple[int, str]] = {}
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            try:
                model = timm.create_model(name)
            except Exception:  # a few cannot be made on the meta device
                model = timm.create_model(name).to("meta")
        owners = (m for m in model.modules() if any(True for _ in m.parameters()))
        classes = frozenset(f"{type(m).__module__}.{type(m).__qualname__}" for m in owners)
        size = parameters(model)
        found[classes] = min(found.get(classes, (size, name)), (size, name))
    names = [name for _, name in sorted(found.values())]
    return names if every else names[:1]


def small_timm(name: str) -> nn.Module:
    """The model at the smallest image size that it takes, and with few blocks where it is large."""
    error: Exception | None = None
    for size in SIZES:
        overlay: dict[str, Any] = {} if size is None else {"pretrained_cfg_overlay": {"input_size": (3, size, size)}}
        options: tuple[dict[str, Any], ...] = ({"img_size": size}, {}) if size else ({},)
        for sized in options:
            try:
                model, fewer = shallow(name, {**sized, **overlay})
                image_shape(model)
                # So that the slim model is made the same way when it is loaded.
                model.__dict__[ORIGIN] = {"name": name, "arguments": {**sized, **overlay, **fewer}}
                return model
            except Exception as raised:  # hosts raise anything where a size does not fit
                error = raised
    raise RuntimeError(f"{name} takes no image: {error}")


@torch.no_grad()
def image_shape(model: nn.Module) -> tuple[int, ...]:
    """The shape of the image that ``model`` takes, which its first convolution may read in another arrangement."""
    error: Exception | None = None
    for (call,) in example_candidates(model):
        try:
            call.to(torch.float32).run(model)
            return call.shape
        except Exception as raised:  # hosts raise anything where a size does not fit
            error = error or raised
    raise RuntimeError(f"it takes no image: {error}")


def shallow(name: str, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model in evaluation mode, and the argument that made it less deep if it has many parameters."""
    import timm

    with torch.device("meta"):
        try:
            size = parameters(timm.create_model(name, **options))
        except Exception:  # a few cannot be made on the meta device
            size = 0
    if size > LARGE:
        for fewer in [{key: value} for key, value in FEWER.items()]:
            try:
                model = timm.create_model(name, **options, **fewer).eval()
            except Exception:  # its constructor has no such argument
                continue
            if parameters(model) < size:
                return model, fewer
    return timm.create_model(name, **options).eval(), {}


def parameters(model: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def small_transformers(name: str) -> nn.Module:
    """A small random model from its configuration."""
    import transformers

    cls, extra = TRANSFORMERS[name]
    config = getattr(transformers, cls).config_class()
    known = config.to_dict()
    config = type(config)(**{k: v for k, v in {**SMALL, **extra}.items() if k in known and (k not in extra or v)})
    model = getattr(transformers, cls)(config).eval()
    return OfPatches(model) if cls == "Siglip2VisionModel" else model


class OfPatches(nn.Module):
    """SigLIP 2 takes patches of images of any size; this makes them of one image (B, 3, 64, 64)."""

    image_size = 64

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> Any:
        """Cut the image into patches (B, 16, 768), row by row."""
        patches = nn.functional.unfold(image, 16, stride=16).transpose(1, 2)
        mask = torch.ones(patches.shape[:2], dtype=torch.long)
        return self.model(patches, pixel_attention_mask=mask, spatial_shapes=torch.tensor([[4, 4]] * len(image)))


def small_torchvision(name: str) -> nn.Module:
    """The model at full size, at the smallest image size that it takes."""
    import torchvision

    for size in SIZES:
        sized = {"image_size": size} if size and name.startswith("vit_") else {}
        model: Any = torchvision.models.get_model(name, **sized).eval()
        if size:
            model.image_size = size
        try:
            image_shape(model)
        except Exception:  # it does not take images as small
            continue
        return model
    raise RuntimeError(f"{name} takes no image")


def is_transformer(key: str, family: str) -> bool:
    """Whether the model file of a row is one of transformers, or the model of torchvision is one."""
    return family in ("transformers", *ATTENTION) or key.startswith(("torchvision/swin", "torchvision/vit"))
