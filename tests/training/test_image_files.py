"""What counts as an image: hidden files, links, extensions, and the note on what was passed over."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
from PIL import Image, features

from slimming.errors import DataError
from slimming.training.config import DataConfig
from slimming.training.data import open_unlabelled
from slimming.training.samples import ImageDataset

from .tiny import (
    SPEC,
    encoded,
    open_tiny,
    picture,
    tar_entries,
    write_data,
    write_folders,
    write_tar,
)


def names(root: Path, **changes: object) -> list[str]:
    """Names of all images of a data set, relative to it."""
    data = open_tiny(root, split_fraction=0.5, **changes)
    assert isinstance(data.train, ImageDataset)
    assert isinstance(data.val, ImageDataset)
    return sorted(os.path.relpath(part[i].name, root) for part in (data.train, data.val) for i in range(len(part)))


def folders(root: Path, per_class: int = 2) -> Path:
    return write_folders(root, per_class=per_class)


PLAIN = [f"{name}/{i}.png" for name in ("bright", "dark", "green") for i in (0, 1)]


@pytest.mark.parametrize(
    "hidden",
    ["dark/.ipynb_checkpoints/a.png", "dark/.a.png", "dark/more/.b/c.png", ".cache/a.png", "__MACOSX/a.png",
     "dark/@eaDir/0.png/small.png"],
    ids=str,
)  # fmt: skip
def test_hidden_files_and_folders_are_no_images(hidden: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folders(tmp_path) / hidden
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(0, 0)))
    assert names(tmp_path) == PLAIN
    notes = [record.getMessage() for record in caplog.records]
    assert len(notes) == 1
    assert re.search(rf"passed over in {tmp_path}: 1 hidden \(\S+\)$", notes[0])
    pictures = open_unlabelled(DataConfig(source=str(tmp_path)), SPEC)
    assert pictures is not None
    assert len(pictures) == 6


def test_what_is_passed_over_is_counted_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folders(tmp_path)
    for i in range(5):
        (root / "dark" / f"{i}.txt").write_text("text")
    (root / "loose.png").write_bytes(encoded(picture(0, 0)))
    (root / "green" / "again").symlink_to(root, target_is_directory=True)
    assert names(root) == PLAIN
    assert [record.getMessage() for record in caplog.records] == [
        f"passed over in {root}: 1 outside the class folders (loose.png); "
        "5 not images (dark/0.txt, dark/1.txt, dark/2.txt, ...); "
        "1 linked folders that are read already (green/again)"
    ]


def test_names_in_notes_are_escaped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folders(tmp_path)
    (root / "dark" / "a\x1b[31m\n.txt").write_text("text")
    assert names(root) == PLAIN
    assert "(dark/a\\x1b[31m .txt)" in caplog.text


def test_linked_folders_are_followed_and_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.png").write_bytes(encoded(picture(0, 0)))
    (elsewhere / "up").symlink_to(tmp_path, target_is_directory=True)
    root = folders(tmp_path / "data")
    (root / "dark" / "linked").symlink_to(elsewhere, target_is_directory=True)
    (root / "dark" / "twice").symlink_to(elsewhere, target_is_directory=True)
    (root / "green" / "self").symlink_to(root / "green", target_is_directory=True)
    found = names(root)
    assert len(found) == 7
    assert {name for name in found if "x.png" in name} <= {"dark/linked/x.png", "dark/twice/x.png"}
    assert "3 linked folders that are read already" in caplog.text


def test_a_class_folder_may_be_a_link(tmp_path: Path) -> None:
    root = folders(tmp_path / "data")
    (root / "dark").rename(tmp_path / "dark")
    (root / "dark").symlink_to(tmp_path / "dark", target_is_directory=True)
    assert names(root) == PLAIN


def test_folders_and_pipes_with_the_name_of_an_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folders(tmp_path)
    (root / "dark" / "folder.png").mkdir()
    os.mkfifo(root / "dark" / "pipe.png")  # reading it would wait for ever
    assert names(root) == PLAIN
    assert "1 not images (dark/pipe.png)" in caplog.text


def test_a_link_to_a_missing_image_is_an_unreadable_image(tmp_path: Path) -> None:
    root = folders(tmp_path)
    (root / "dark" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    data = open_tiny(root, split_fraction=0.3)
    assert isinstance(data.train, ImageDataset)
    assert isinstance(data.val, ImageDataset)
    assert len(data.train) + len(data.val) == 7


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    root = folders(tmp_path)
    (root / "dark" / "secret").mkdir(mode=0)
    with pytest.raises(DataError, match=r"The folder .*secret cannot be read: Permission denied"):
        open_tiny(root, split_fraction=0.5)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [(".jfif", "JPEG"), (".jpe", "JPEG"), (".JPG", "JPEG"), (".mpo", "JPEG"), (".webp", "WEBP"), (".avif", "AVIF"),
     (".jp2", "JPEG2000"), (".tga", "TGA"), (".pbm", "PPM"), (".dib", "BMP"), (".apng", "PNG"), (".qoi", "QOI")],
    ids=lambda value: value,
)  # fmt: skip
def test_every_extension_that_pillow_decodes_is_an_image(suffix: str, kind: str, tmp_path: Path) -> None:
    if kind in ("AVIF", "WEBP") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow does not decode {kind}")
    root = folders(tmp_path)
    image = picture(7, 0)
    try:
        (root / "dark" / f"x{suffix}").write_bytes(encoded(image, kind))
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {kind}")
    assert f"dark/x{suffix}" in names(root)


@pytest.mark.parametrize("name", ["scene.eps", "scene.ps", "clip.mpg", "table.h5", "drawing.wmf"], ids=str)
def test_what_pillow_only_recognises_is_no_image(name: str, tmp_path: Path) -> None:
    root = folders(tmp_path)
    (root / "dark" / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    assert names(root) == PLAIN


def test_postscript_with_the_name_of_an_image_never_reaches_ghostscript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "check_call", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    root = folders(tmp_path)
    (root / "dark" / "0.png").write_bytes(buffer.getvalue())
    data = open_tiny(root, split_fraction=0.5, max_unreadable=1.0)
    for part in (data.train, data.val):
        assert isinstance(part, ImageDataset)
        for i in range(len(part)):
            name = part.source.read(int(part.indices[i])).name
            if name.endswith("dark/0.png"):
                with pytest.raises(Exception, match="not an image in a format that Pillow reads"):
                    part[i]


def test_hidden_files_beside_parquet_files_are_no_data(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data")
    (root / "train").mkdir()
    (root / "train.parquet").rename(root / "train" / "a.parquet")
    (root / "train" / "._a.parquet").write_bytes(b"AppleDouble")
    data = open_tiny(root, val=str(root / "test.parquet"))
    assert isinstance(data.train, ImageDataset)
    assert len(data.train) == 48


def test_hidden_members_of_a_shard_are_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = tar_entries(12)
    extra = {"._00001.png": b"AppleDouble", ".cache/00001.png": b"x", "00001.txt": b"a caption"}
    write_tar(tmp_path / "train.tar", {**extra, **entries})
    write_tar(tmp_path / "val.tar", tar_entries(6, first=50))
    data = open_tiny(tmp_path)
    assert isinstance(data.train, ImageDataset)
    assert len(data.train) == 12
    assert len(caplog.records) == 1
    assert "2 hidden (" in caplog.text
    assert "1 neither images nor labels (" in caplog.text


def test_a_sample_with_two_images_is_refused(tmp_path: Path) -> None:
    entries = tar_entries(12)
    write_tar(tmp_path / "train.tar", {**entries, "00001.jpg": entries["00001.png"]})
    write_tar(tmp_path / "val.tar", tar_entries(6, first=50))
    with pytest.raises(DataError, match=r"Sample '00001' of .*train\.tar is stored twice"):
        open_tiny(tmp_path)
