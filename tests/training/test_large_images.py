"""Images that would take too much memory are refused by a stated limit, from their header."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from slimming.errors import DataError
from slimming.training import images
from slimming.training.images import UnreadableImageError, decode

from .tiny import encoded, make_model, open_tiny, picture, tiny_config, train, write_folders


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, colour: int, *before: bytes, level: int = 1) -> bytes:
    """A black PNG image, written in parts so that it needs no memory itself."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    packer, row = zlib.compressobj(level), bytes(1 + width * channels * bits // 8)
    parts = [packer.compress(row) for _ in range(height)]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = chunk(b"IDAT", b"".join([*parts, packer.flush()]))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(before) + body + chunk(b"IEND", b"")


def only_header(width: int, height: int) -> bytes:
    data = png(1, 1, 8, 2)
    return data[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + data[33:]


@pytest.mark.parametrize(("width", "height"), [(13_300, 13_300), (8193, 8192), (2**30, 1)], ids=str)
def test_the_limit_is_checked_from_the_header(width: int, height: int) -> None:
    with pytest.raises(
        UnreadableImageError, match=rf"{width} x {height} pixels, more than the 67108864|decompression bomb"
    ):
        decode(only_header(width, height), 3, 64)


def test_a_too_large_image_counts_as_unreadable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_folders(tmp_path)
    (root / "dark" / "0.png").write_bytes(only_header(9000, 9000))
    data = open_tiny(root, split_fraction=0.2, max_unreadable=0.2)
    assert train(data, tiny_config(steps=4), None, make_model()).steps == 4
    assert (
        "dark/0.png: it has 9000 x 9000 pixels, more than the 67108864 that are decoded; make it smaller" in caplog.text
    )
    with pytest.raises(DataError, match=r"1 of \d+ images could not be read.*9000 x 9000 pixels"):
        train(open_tiny(root, split_fraction=0.2), tiny_config(steps=4), None, make_model())


def test_a_jpeg_image_is_counted_at_its_reduced_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10**6)
    large = Image.new("RGB", (4000, 4000))
    assert decode(encoded(large, "JPEG"), 3, 64).size == (500, 500)
    with pytest.raises(UnreadableImageError, match="4000 x 4000 pixels, more than the 1000000"):
        decode(encoded(large), 3, 64)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with path.open("wb") as file:
        file.write(encoded(picture(0, 0)))
        file.truncate(2**29 + 1)  # takes no room on the disk
    with pytest.raises(UnreadableImageError, match="more than the 536870912 bytes that are read"):
        decode(path, 3, 64)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"], ids=str)
def test_text_that_unpacks_to_much_is_not_unpacked(kind: str) -> None:
    packed = zlib.compress(bytes(200 * 2**20), 9)
    before = {"zTXt": b"k\0\0", "iTXt": b"k\0\1\0\0\0", "iCCP": b"k\0\0"}[kind]
    data = png(8, 8, 8, 2, chunk(kind.encode(), before + packed))
    try:
        assert decode(data, 3, 64).size == (8, 8)
    except UnreadableImageError as error:
        assert "too large" in str(error)  # noqa: PT017


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"], ids=str)
def test_of_many_frames_only_the_first_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(40)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    monkeypatch.setattr(images, "MAX_PIXELS", 16 * 16)
    assert decode(buffer.getvalue(), 3, 64).size == (16, 16)


def test_memory_that_runs_out_is_no_unreadable_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        decode(encoded(picture(0, 0)), 3, 64)


PROGRAM = """
import json, resource, sys
from pathlib import Path
from slimming.training.images import UnreadableImageError, decode
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
try:
    said = str(decode(Path(sys.argv[1]), int(sys.argv[2]), 64).size)
except UnreadableImageError as error:
    said = str(error)
print(json.dumps([said, peak() - before]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "bits", "colour", "channels", "megabytes"),
    [(13_300, 16, 0, 1, 50), (8192, 16, 0, 1, 900), (8192, 8, 6, 3, 1500)],
    ids=["refused", "16 bits", "transparent"],
)
def test_memory_is_bounded(side: int, bits: int, colour: int, channels: int, megabytes: int, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png(side, side, bits, colour))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(channels)], capture_output=True, text=True, check=True
    )
    said, used = json.loads(done.stdout)
    assert ("more than the 67108864" in said) == (side > 8192), said
    assert used < megabytes, f"{used:.0f} MB"
