"""From the bytes of an image file to a model's tensor, with random numbers of its own for each sample."""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from slimming.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What a model takes: ``input_size`` (channels, height, width), ``mean`` and ``std`` by channel.

    ``crop_mode`` is timm's: ``"center"`` cuts off what is too long, ``"squash"`` scales both sides to size,
    ``"border"`` pads what is too short.
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
                f"The model takes images of {self.input_size[0]} channels; the readers give 1 (grey) or "
                "3 (RGB). Pass DataLoaders of your own for others."
            )

    @staticmethod
    def of_model(model: Any) -> ImageSpec:
        """Read the spec from a timm model's own ``pretrained_cfg``."""
        from timm.data.config import resolve_data_config

        found = resolve_data_config({}, model=model)
        channels = found["input_size"][0]
        fit = {key: tuple(found[key]) for key in ("mean", "std")}
        if len(fit["mean"]) != channels:  # a model for grey images keeps the three means of its ImageNet entry
            fit = {key: (sum(value) / len(value),) * channels for key, value in fit.items()}
        return ImageSpec(
            input_size=tuple(found["input_size"]),
            interpolation=found["interpolation"],
            crop_pct=float(found["crop_pct"]),
            crop_mode=found.get("crop_mode") or "center",
            **fit,
        )


class UnreadableImageError(Exception):
    """One image cannot be decoded; caught, counted and skipped by the readers of batches."""


def decode(data: bytes | Path | Image.Image, channels: int, largest: int) -> Image.Image:
    """Decode one image upright, as grey or RGB.

    Args:
        data: an encoded image, the path of one, or a decoded one.
        channels: 1 for grey, 3 for RGB.
        largest: sides beyond this many pixels may be decoded at a reduced scale (JPEG only).

    Raises:
        UnreadableImageError: truncated, no image, or too large to be decoded safely.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of images above 89 megapixels and refuses those above 179; that is no news here.
            warnings.simplefilter("ignore")
            image = data if isinstance(data, Image.Image) else _open(data)
            image.draft("RGB" if channels == 3 else "L", (largest, largest))
            image = ImageOps.exif_transpose(image)
            return _convert(image, "RGB" if channels == 3 else "L")
    except UnidentifiedImageError as error:
        # Pillow's own text holds the address of a buffer; an image that comes again must be known by its text.
        raise UnreadableImageError("no image of a kind that Pillow reads") from error
    # Decoders of damaged files fail in many ways: OSError, SyntaxError, ValueError, struct.error ...
    except Exception as error:
        raise UnreadableImageError(str(error) or type(error).__name__) from error


def _open(data: bytes | Path) -> Image.Image:
    # The bytes of a file, so that no damaged image leaves it open.
    return Image.open(io.BytesIO(data if isinstance(data, bytes) else data.read_bytes()))


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bits per pixel: Pillow would clip at 255
        values, highest = np.asarray(image, dtype=np.float64), 255.0
        if image.mode.startswith("I;16") or values.max(initial=0.0) > 255:
            highest = 65535.0
        elif image.mode == "F" and values.max(initial=0.0) <= 1:
            highest = 1.0
        image = Image.fromarray((values * (255 / highest)).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def make_transform(spec: ImageSpec, augment: str | None) -> Callable[[Image.Image], Tensor]:
    """Return the function from a decoded image to a normalised float32 tensor (C, H, W).

    Args:
        spec: the model's own input.
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
    """Rotate by a random multiple of 90 degrees, then go on with ``then``."""

    def __init__(self, then: Callable[[Image.Image], Tensor]) -> None:
        self.then = then

    def __call__(self, image: Image.Image) -> Tensor:
        turns = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
        turn = turns[random.randrange(4)]
        return self.then(image if turn is None else image.transpose(turn))


def derive_seed(seed: int, *key: int) -> int:
    """Return the 63-bit seed of one use of ``seed``, the same on every machine: `numpy.random.SeedSequence`.

    Args:
        seed: of the run, at least 0.
        key: tells this use of it from all others, such as an epoch and an image; at least 0 each.

    Raises:
        ConfigError: the seed is negative.

    >>> derive_seed(0, 1) != derive_seed(1, 0) != derive_seed(0, 1, 0)
    True
    """
    if seed < 0:
        raise ConfigError(f"The seed is {seed}; give a whole number of 0 or more.")
    # As a spawn key: SeedSequence fills its entropy up with zeros, so that (0, 1) and (0, 1, 0) would be the same.
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0]) >> 1


def seed_cpu_generators(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators: the libraries that augment draw from all three."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def fork_rng() -> Iterator[None]:
    """Give the global generators back as they were."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(pytorch)
