"""Image preprocessing: decode, augment and normalise an image, with a separate random seed per sample."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from slimming.errors import ConfigError, DataError
from slimming.training.image_files import MAX_BYTES, MAX_PIXELS, UnreadableImageError, decoding, image_formats
from slimming.training.value_range import is_deep, known_range, scale_to_bytes


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Input of a model, as in timm's ``pretrained_cfg``.

    Attributes:
        input_size: (channels, height, width).
        mean: mean per channel.
        std: standard deviation per channel.
        interpolation: interpolation for resizing.
        crop_pct: fraction of the resized image that the centre crop keeps in evaluation.
        crop_mode: ``"center"`` crops the longer side, ``"squash"`` resizes both sides, ``"border"`` pads the shorter
            side.

    Raises:
        DataError: the input has neither one nor three channels.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if self.input_size[0] not in (1, 3):
            raise DataError(
                f"The model takes images of {self.input_size[0]} channels, but files are read with 1 (grey) or 3 (RGB) "
                "channels. Pass custom DataLoaders for other images."
            )

    @staticmethod
    def of_model(model: Any) -> ImageSpec:
        """Return the input of a timm model, from its ``pretrained_cfg``."""
        from timm.data.config import resolve_data_config

        resolved = resolve_data_config({}, model=model)
        channels = resolved["input_size"][0]
        statistics = {key: tuple(resolved[key]) for key in ("mean", "std")}
        if len(statistics["mean"]) != channels:  # timm keeps the three means of ImageNet for models of grey images
            statistics = {key: (sum(value) / len(value),) * channels for key, value in statistics.items()}
        return ImageSpec(
            input_size=tuple(resolved["input_size"]),
            interpolation=resolved["interpolation"],
            crop_pct=float(resolved["crop_pct"]),
            crop_mode=resolved.get("crop_mode") or "center",
            **statistics,
        )


def decode(
    data: bytes | Path | Image.Image, channels: int, largest: int, value_range: tuple[float, ...] | None = None
) -> Image.Image:
    """Decode an image to grey or RGB and apply its EXIF orientation.

    Args:
        data: an encoded image, the path of one, or a decoded image.
        channels: 1 for grey, 3 for RGB.
        largest: JPEG images with sides longer than this number of pixels may be decoded at a reduced scale.
        value_range: values of black and white of images with more than 8 bits per pixel, see `DataConfig`.

    Raises:
        UnreadableImageError: the data is truncated, is not an image, has more than `MAX_PIXELS` pixels, or has more
            than 8 bits per pixel and an unknown range.
    """
    mode = "RGB" if channels == 3 else "L"
    with decoding():
        image = data.copy() if isinstance(data, Image.Image) else open_image(data)
        image.draft(mode, (largest, largest))
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableImageError(
                f"it has {image.width} x {image.height} pixels, more than the {MAX_PIXELS} that are decoded; make it "
                "smaller"
            )
        limits = known_range(image, value_range) if is_deep(image) else None
        ImageOps.exif_transpose(image, in_place=True)
        return _convert(image if limits is None else scale_to_bytes(image, limits), mode)


def open_image(data: bytes | Path) -> Image.Image:
    """Read the header of an image.

    Raises:
        UnreadableImageError: the data is not an image, or has more than `MAX_BYTES` bytes.
    """
    with decoding():
        # Read the whole file, because Pillow leaves the file of a damaged image open.
        if (data.stat().st_size if isinstance(data, Path) else len(data)) > MAX_BYTES:
            raise UnreadableImageError(f"it has more than the {MAX_BYTES} bytes that are read")
        return Image.open(io.BytesIO(data if isinstance(data, bytes) else data.read_bytes()), formats=image_formats())


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "La":  # Pillow converts this mode to LA only
        image = image.convert("LA")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB").convert(mode) if image.mode == "LAB" else image.convert(mode)


def make_transform(spec: ImageSpec, augment: str | None) -> Callable[[Image.Image], Tensor]:
    """Return a transform from a decoded image to a normalised float32 tensor (C, H, W).

    Args:
        spec: input of the model.
        augment: one of ``AUGMENTATIONS``, or None for evaluation (resize and centre crop).
    """
    from timm.data.transforms_factory import create_transform

    make: Callable[..., Any] = create_transform
    common: dict[str, Any] = {
        "input_size": spec.input_size, "interpolation": spec.interpolation, "mean": spec.mean, "std": spec.std
    }  # fmt: skip
    if augment is None or augment == "none":
        return make(**common, is_training=False, crop_pct=spec.crop_pct, crop_mode=spec.crop_mode)
    if augment == "deit":
        return make(**common, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel")
    light = make(
        **common, is_training=True, scale=(0.6, 1.0), ratio=(0.8, 1.25), color_jitter=0.1,
        vflip=0.5 if augment == "overhead" else 0.0,
    )  # fmt: skip
    return _RandomRotate90(light) if augment == "overhead" else light


class _RandomRotate90:
    """Rotate by a random multiple of 90 degrees, then apply ``transform``."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Tensor:
        rotations = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
        rotation = rotations[random.randrange(4)]
        return self.transform(image if rotation is None else image.transpose(rotation))


def derive_seed(seed: int, *key: int) -> int:
    """Derive a 63-bit seed from ``seed`` and ``key`` with `numpy.random.SeedSequence`, the same on every machine.

    Args:
        seed: seed of the run, at least 0.
        key: integers that identify the use of the seed, such as an epoch and the index of an image; at least 0 each.

    Raises:
        ConfigError: the seed is negative.

    >>> derive_seed(0, 1) != derive_seed(1, 0) != derive_seed(0, 1, 0)
    True
    """
    if seed < 0:
        raise ConfigError(f"The seed is {seed}; it must be an integer of 0 or more.")
    # Use spawn_key, because SeedSequence pads entropy with zeros, and (0, 1) and (0, 1, 0) would give the same seed.
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0]) >> 1


def seed_cpu_generators(seed: int) -> None:
    """Seed the global CPU generators of Python, NumPy and PyTorch; augmentation draws from all three."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def fork_rng() -> Iterator[None]:
    """Restore the global CPU generators of Python, NumPy and PyTorch at the end of this block."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(pytorch)
