"""Images with more than 8 bits per pixel: which of their values are black and white, and scaling to 8 bits.

The range is that of the container (65535 for 16 bits), or is stated in the file or by `DataConfig.value_range`. It is
never taken from the values of an image, so that all images of a data set are scaled alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from PIL import Image

from slimming.errors import DataError
from slimming.training.image_files import MAX_PIXELS, UnreadableImageError, decoding

BITS_PER_SAMPLE, SAMPLE_FORMAT = 258, 339
LOWEST_TAGS, HIGHEST_TAGS = (280, 340), (281, 341)
"""Tags of TIFF files: MinSampleValue and SMinSampleValue, MaxSampleValue and SMaxSampleValue."""
DARK = 0.25
"""Images of 16 bits that use less than this share of their range are taken to hold fewer bits, such as 12 or 14."""
STRIP = 2**22
"""Pixels that are scaled at a time, which bounds the memory."""


def is_deep(image: Image.Image) -> bool:
    """Whether an image has one channel of more than 8 bits, or of floating-point numbers."""
    return image.mode.startswith("I") or image.mode == "F"


def known_range(image: Image.Image, value_range: tuple[float, ...] | None) -> tuple[float, float]:
    """Return the values of black and white of a deep image.

    Args:
        image: a deep image; only its header is read.
        value_range: the range from the settings, which takes precedence.

    Raises:
        UnreadableImageError: the range is not known.
    """
    if value_range is not None:
        return value_range[0], value_range[1]
    tags = getattr(image, "tag_v2", {})  # of TIFF files
    highest = next((float(np.max(tags[tag])) for tag in HIGHEST_TAGS if tag in tags), None)
    if highest is not None:
        lowest = next((float(np.min(tags[tag])) for tag in LOWEST_TAGS if tag in tags), 0.0)
        if np.isfinite([lowest, highest]).all() and lowest < highest:
            return lowest, highest
    if image.mode.startswith("I;16"):
        return 0.0, float(2 ** max(tags.get(BITS_PER_SAMPLE, (16,))) - 1)
    if image.mode == "I" and image.format in ("PNG", "PPM", "JPEG2000"):  # Pillow scales these formats to 16 bits
        return 0.0, 65535.0
    kind = "floating-point numbers" if image.mode == "F" else "signed or 32-bit integers"
    raise UnreadableImageError(
        f"its pixels are {kind} of unknown range; set data.value_range to the values of black and white, such as [0, 1]"
    )


def scale_to_bytes(image: Image.Image, limits: tuple[float, float]) -> Image.Image:
    """Scale a deep image to 8 bits; values outside the limits become black or white.

    Raises:
        UnreadableImageError: a value is NaN.
    """
    low, high = limits
    width, height = image.size
    scaled = np.empty((height, width), np.uint8)
    rows = max(1, STRIP // max(1, width))
    for first in range(0, height, rows):
        last = min(height, first + rows)
        values = np.asarray(image.crop((0, first, width, last)), dtype=np.float64)
        if np.isnan(values).any():
            raise UnreadableImageError("it has pixels without a value (NaN)")
        scaled[first:last] = ((values - low) * (255 / (high - low))).clip(0, 255)
    return Image.fromarray(scaled)


def check_values(images: Iterable[tuple[str, Image.Image]], value_range: tuple[float, ...] | None, where: str) -> None:
    """Check on some images of a data set that images with more than 8 bits per channel would not come out black.

    Args:
        images: names and images, of which only the header is read so far.
        value_range: the range from the settings.
        where: the data set, for messages.

    Raises:
        DataError: the range is needed and not known, the images use less than a quarter of it, or it cannot be used.
    """
    shares, colour = [], False
    for name, image in images:
        colour = colour or _is_deep_colour(image)
        if colour and value_range is not None:
            raise DataError(
                f"{name} is a colour image of 16 bits, of which the upper 8 bits are read: data.value_range has no "
                "effect on it. Leave it out, or convert the images to 8 bits."
            )
        if value_range is not None or not (is_deep(image) or _is_deep_colour(image)):
            continue
        try:
            highest = 255.0 if _is_deep_colour(image) else known_range(image, None)[1]
        except UnreadableImageError as error:
            raise DataError(f"{name} cannot be scaled: {error}.") from error
        if image.width * image.height <= MAX_PIXELS and highest in (255.0, 65535.0):
            shares.append(_brightest(image) / highest)
    if shares and 0 < max(shares) < DARK:
        bits = max(1, math.ceil(math.log2(max(shares) * 65536)))
        advice = (
            "convert them to 8 bits per channel"
            if colour
            else f"set data.value_range to the values of black and white, such as [0, {2**bits - 1}] for {bits} bits, "
            "or [0, 65535] to read them as they are"
        )
        raise DataError(
            f"{len(shares)} images with 16 bits per channel of {where} use at most {max(shares):.1%} of the range, as "
            f"images of {bits} bits do, and would be nearly black: {advice}."
        )


def _brightest(image: Image.Image) -> float:
    """Return the highest value of an image, without transparency; 0 if it cannot be decoded."""
    try:
        with decoding():
            extrema = image.getextrema()
    except UnreadableImageError:  # it is counted when it is used
        return 0.0
    return float(np.max(extrema[:3] if isinstance(extrema[0], tuple) else extrema))


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has colours of 16 bits per channel, which Pillow reduces to 8."""
    tiles = getattr(image, "tile", None) or ()
    return image.mode in ("RGB", "RGBA") and any(";16" in str(tile[3]) for tile in tiles)
