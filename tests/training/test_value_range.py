"""Images with more than 8 bits per channel, other modes of Pillow, and orientation."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from slimming.errors import ConfigError, DataError
from slimming.training.config import DataConfig
from slimming.training.data import open_unlabelled
from slimming.training.images import UnreadableImageError, decode
from slimming.training.samples import ImageDataset

from .tiny import CLASSES, SPEC, encoded, open_tiny


def middle(data: bytes, channels: int = 1, value_range: tuple[float, float] | None = None) -> Any:
    return decode(data, channels, 64, value_range).getpixel((0, 0))


def flat(value: float, kind: type, size: int = 20) -> Image.Image:
    return Image.fromarray(np.full((size, size), value, kind))


@pytest.mark.parametrize(
    ("value", "kind", "form", "wanted"),
    [(200, np.uint16, "PNG", 0), (32896, np.uint16, "PNG", 128), (32896, np.uint16, "TIFF", 128),
     (65535, np.uint16, "JPEG2000", 255)],
    ids=["dark", "png", "tiff", "jpeg2000"],
)  # fmt: skip
def test_16_bits_are_scaled_by_the_range_of_16_bits(value: int, kind: type, form: str, wanted: int) -> None:
    assert middle(encoded(flat(value, kind), form)) == wanted  # whatever the image's own highest value is


def test_a_deep_grey_map_is_scaled_by_16_bits() -> None:
    assert middle(b"P5\n2 2\n65535\n" + np.full(4, 128, ">u2").tobytes()) == 0
    assert middle(b"P5\n2 2\n4095\n" + np.full(4, 2048, ">u2").tobytes()) == 127  # the header says 12 bits


def tiff(image: Image.Image, **tags: float) -> bytes:
    """A TIFF file with tags for its range."""
    numbers = {"smin": 340, "smax": 341}
    directory = ImageFileDirectory_v2()
    for name, value in tags.items():
        directory[numbers[name]] = value
        directory.tagtype[numbers[name]] = 12
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", tiffinfo=directory)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32], ids=lambda kind: kind.__name__)
def test_a_tiff_file_may_state_its_range(kind: type) -> None:
    assert middle(tiff(flat(2048, kind), smax=4095)) == 127
    assert middle(tiff(flat(3000, kind), smin=2000, smax=4000)) == 127
    assert middle(tiff(flat(2048, kind), smax=4095), value_range=(0, 2048)) == 255


def test_bits_per_sample_of_a_tiff_file() -> None:
    # 12 bits packed: two pixels in three bytes, 0x800 each
    assert "I;12" in {mode for _, mode in TiffImagePlugin.OPEN_INFO.values()}
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    entries = b"".join(
        np.array([tag, 3], "<u2").tobytes() + np.array([1, v], "<u4").tobytes() for tag, v in tags.items()
    )
    head = b"II*\0" + np.array([12], "<u4").tobytes() + bytes([0x80, 0x08, 0x00, 0])
    assert middle(head + np.array([len(tags)], "<u2").tobytes() + entries + bytes(4)) == 127


@pytest.mark.parametrize("value", [1.0, 64.0, 1000.0, 1e9], ids=str)
@pytest.mark.parametrize("kind", [np.int32, np.float32], ids=["integers", "floats"])
def test_numbers_without_a_range_are_not_guessed(value: float, kind: type) -> None:
    data = encoded(flat(value, kind), "TIFF")
    with pytest.raises(UnreadableImageError, match=r"of unknown range; set data\.value_range .* such as \[0, 1\]"):
        decode(data, 1, 64)
    assert middle(data, value_range=(0.0, 2 * value)) == 127


def test_a_pixel_without_a_value_is_unreadable() -> None:
    with pytest.raises(UnreadableImageError, match=r"without a value \(NaN\)"):
        decode(encoded(flat(np.nan, np.float32), "TIFF"), 1, 64, (0.0, 1.0))


def write(root: Path, images: dict[str, Image.Image], kind: str = "PNG") -> Path:
    for name in CLASSES:
        (root / name).mkdir(parents=True, exist_ok=True)
        for key, image in images.items():
            (root / name / f"{key}.{kind.lower()}").write_bytes(encoded(image, kind))
    return root


def deep(highest: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, highest + 1, (20, 20)).astype(np.uint16))


@pytest.mark.parametrize("bits", [10, 12, 14], ids=str)
def test_12_bits_in_16_are_refused_with_the_setting_that_mends_it(bits: int, tmp_path: Path) -> None:
    root = write(tmp_path, {str(i): deep(2**bits - 1, i) for i in range(4)})
    message = rf"would be nearly black: set data\.value_range .* such as \[0, {2**bits - 1}\] for {bits} bits"
    with pytest.raises(DataError, match=message):
        open_tiny(root, split_fraction=0.5)
    with pytest.raises(DataError, match=message):
        open_unlabelled(DataConfig(source=str(root)), SPEC)
    bright = open_tiny(root, split_fraction=0.5, value_range=(0, 2**bits - 1), augment="none").train
    dark = open_tiny(root, split_fraction=0.5, value_range=(0, 65535), augment="none").train
    assert isinstance(bright, ImageDataset)
    assert isinstance(dark, ImageDataset)
    mean = [float((part[0].image * 0.25 + 0.5).mean()) for part in (bright, dark)]
    assert 0.45 < mean[0] < 0.55
    assert mean[1] < 0.55 / 2 ** (16 - bits) + 0.001


def test_16_bits_that_use_their_range_need_no_setting(tmp_path: Path) -> None:
    root = write(tmp_path, {"a": deep(60000), "b": deep(900), "black": flat(0, np.uint16)})
    assert len(open_tiny(root, split_fraction=0.4).classes) == 3


def test_black_images_and_8_bits_need_no_setting(tmp_path: Path) -> None:
    root = write(tmp_path, {"a": flat(0, np.uint16), "b": flat(3, np.uint8)})
    assert len(open_tiny(root, split_fraction=0.4).classes) == 3


@pytest.mark.parametrize("kind", [np.int32, np.float32], ids=["integers", "floats"])
def test_data_of_unknown_range_is_refused_when_it_is_opened(kind: type, tmp_path: Path) -> None:
    root = write(tmp_path, {"a": flat(9, kind), "b": flat(2, kind)}, "TIFF")
    with pytest.raises(DataError, match=r"\.tiff cannot be scaled: .*set data\.value_range"):
        open_tiny(root, split_fraction=0.5)
    assert len(open_tiny(root, split_fraction=0.5, value_range=(0, 10)).classes) == 3


def colour_png(highest: int) -> bytes:
    """A PNG image of 16 bits per channel, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + np.full(24, highest, ">u2").tobytes() for _ in range(8))
    head = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_12_bits_in_16_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path, {})
    for name in CLASSES:
        for i in range(2):
            (root / name / f"{i}.png").write_bytes(colour_png(4095))
    with pytest.raises(DataError, match=r"would be nearly black: convert them to 8 bits"):
        open_tiny(root, split_fraction=0.5)
    with pytest.raises(DataError, match=r"data\.value_range has no effect on it"):
        open_tiny(root, split_fraction=0.5, value_range=(0, 4095))
    assert middle(colour_png(65535), 3) == (255, 255, 255)


@pytest.mark.parametrize("value", [(1.0,), (4.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)], ids=str)
def test_bad_value_ranges(value: tuple[float, ...]) -> None:
    with pytest.raises(
        ConfigError, match=r"value_range.* is .*; it must be (two numbers, the lower one first|a number)"
    ):
        DataConfig(source="x", value_range=value)


def red_on_white(mode: str) -> Image.Image:
    """Half transparent red in ``mode``."""
    return Image.new("RGBA", (8, 8), (255, 0, 0, 128)).convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind", "colour"),
    [("RGBA", "PNG", (255, 127, 127)), ("LA", "PNG", (165, 165, 165)), ("RGB", "PNG", (255, 0, 0)),
     ("L", "PNG", (76, 76, 76)), ("P", "PNG", (255, 0, 0)), ("CMYK", "JPEG", (254, 0, 0)),
     ("CMYK", "TIFF", (255, 0, 0)), ("1", "PNG", (0, 0, 0)), ("LAB", "TIFF", None)],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_modes_become_colours_on_white(mode: str, kind: str, colour: tuple[int, int, int] | None) -> None:
    image = red_on_white("RGB") if mode in ("RGB", "P", "CMYK", "LAB") else red_on_white("RGBA")
    image = Image.new("LAB", (8, 8), (128, 0, 0)) if mode == "LAB" else image.convert(mode)
    data = encoded(image, kind)
    found, grey = middle(data, 3), middle(data, 1)
    if colour is not None:
        assert found == pytest.approx(colour, abs=1)
    assert grey == Image.new("RGB", (1, 1), found).convert("L").getpixel((0, 0))


def test_premultiplied_images() -> None:
    grey = Image.new("LA", (8, 8), (100, 128)).convert("La")
    assert decode(grey, 1, 64).getpixel((0, 0)) == pytest.approx(177, abs=2)
    assert decode(red_on_white("RGBa"), 3, 64).getpixel((0, 0)) == pytest.approx((255, 127, 127), abs=2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"], ids=str)
@pytest.mark.parametrize("is_deep", [False, True], ids=["8 bits", "16 bits"])
def test_orientation_is_applied_once(kind: str, is_deep: bool) -> None:
    if is_deep and kind in ("JPEG", "WEBP"):
        pytest.skip(f"{kind} has no 16 bits")
    values = np.zeros((20, 40), np.uint16 if is_deep else np.uint8)
    values[:, :20] = 65535 if is_deep else 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise: white on top
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, exif=exif)
    image = decode(buffer.getvalue(), 1, 1000)
    assert image.size == (20, 40)
    assert image.getpixel((10, 5)) > 200  # type: ignore[operator]
    assert image.getpixel((10, 35)) < 50  # type: ignore[operator]
