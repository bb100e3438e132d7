"""Work goes on with the inputs with which it was started, or says which of them changed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slimming.core.inputs import INPUTS_FILE, Inputs, check_inputs, files_at, recorded_inputs
from slimming.errors import CheckpointError, ConfigError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for number in range(6):
        place = root / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(bytes([number]) * 50)
    return root


def check(work: Path, images: Path) -> None:
    check_inputs(work, Inputs(images={"data.source": files_at(images)}))


def _longer(root: Path) -> None:
    (root / "class0" / "0.png").write_bytes(b"longer" * 50)


def _other(root: Path) -> None:
    (root / "class0" / "0.png").write_bytes(b"x" * 50)


def _without(root: Path) -> None:
    for number in (1, 3, 5):
        (root / "class1" / f"{number}.png").unlink()
    (root / "class1" / "7.png").write_bytes(b"x")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_longer, r"data.source changed \('class0/0.png' has another size\)"),
        (_other, r"data.source changed \('class0/0.png' has other content\)"),
        (_without, r"'class1/1.png', 'class1/3.png', 'class1/5.png': each is missing; 'class1/7.png' is new"),
    ],
    ids=["size", "content", "names"],
)
def test_what_changed_is_named(images: Path, tmp_path: Path, change: Callable[[Path], None], says: str) -> None:
    check(tmp_path / "work", images)
    check(tmp_path / "work", images)
    change(images)
    with pytest.raises(ConfigError, match=rf"(?s)started with other inputs: .*{says}.*or give another directory"):
        check(tmp_path / "work", images)


def test_a_copy_with_other_times_is_the_same(images: Path, tmp_path: Path) -> None:
    check(tmp_path / "work", images)
    before = (tmp_path / "work" / INPUTS_FILE).read_text()
    copied = tmp_path / "elsewhere"
    shutil.copytree(images, copied, copy_function=shutil.copy)
    for path in copied.rglob("*.png"):
        os.utime(path, (1, 1))
    check(tmp_path / "work", copied)
    assert (tmp_path / "work" / INPUTS_FILE).read_text() != before, "the new times are recorded"
    (copied / "class0" / "2.png").write_bytes(b"y" * 50)
    os.utime(copied / "class0" / "2.png", (2, 2))
    with pytest.raises(ConfigError, match=r"'class0/2.png' has other content"):
        check(tmp_path / "work", copied)


def test_weights_of_the_same_size_and_time_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "dense.pth"
    file.write_bytes(b"a" * 100)
    os.utime(file, (1, 1))
    inputs = Inputs(weights={"model.checkpoint (dense.pth)": {"dense.pth": file}})
    check_inputs(tmp_path / "work", inputs)
    file.write_bytes(b"b" * 100)
    os.utime(file, (1, 1))
    with pytest.raises(ConfigError, match=r"model.checkpoint \(dense.pth\) changed \('dense.pth' has other content\)"):
        check_inputs(tmp_path / "work", inputs)


def test_checksums_are_compared_and_new_inputs_added(tmp_path: Path) -> None:
    check_inputs(tmp_path, Inputs(checksums={"the weights of the model": "a"}))
    check_inputs(tmp_path, Inputs(checksums={"the weights of the teacher": "b"}))
    with pytest.raises(ConfigError, match="the weights of the model changed"):
        check_inputs(tmp_path, Inputs(checksums={"the weights of the model": "b"}))
    check_inputs(tmp_path, Inputs(checksums={"the weights of the model": "c"}), fresh=True)
    assert recorded_inputs(tmp_path) == {
        "the weights of the model": {"sha256": "c"},
        "the weights of the teacher": {"sha256": "b"},
    }


def test_names_of_any_bytes_are_recorded_and_hidden_files_are_not(images: Path, tmp_path: Path) -> None:
    names = ["a b.png", "new\nline.png", "100%.png", "ü\x85.png", os.fsdecode(b"\xff.png")]
    for name in names:
        (images / name).write_bytes(b"1")
    (images / ".hidden").write_bytes(b"1")
    assert len(files_at(images)) == 6 + len(names)
    check(tmp_path / "work", images)
    check(tmp_path / "work", images)
    (images / "100%.png").unlink()
    with pytest.raises(ConfigError, match=r"'100%.png' is missing"):
        check(tmp_path / "work", images)


def test_the_record_holds_no_absolute_path_and_damage_is_seen(images: Path, tmp_path: Path) -> None:
    check(tmp_path / "work", images)
    record = tmp_path / "work" / INPUTS_FILE
    assert str(tmp_path) not in record.read_text()
    found = recorded_inputs(tmp_path / "work")["data.source"]
    assert (found["files"], found["bytes"]) == (6, 300)
    record.write_text(record.read_text().replace('"files": 6', '"files": 7'))
    with pytest.raises(CheckpointError, match="checksum differs"):
        check(tmp_path / "work", images)


@pytest.mark.slow
def test_a_hundred_thousand_files_take_seconds(tmp_path: Path) -> None:
    for folder in range(100):
        place = tmp_path / "photos" / f"{folder:03d}"
        place.mkdir(parents=True)
        for number in range(1000):
            (place / f"{number:04d}.jpg").touch()
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        check(tmp_path / "work", tmp_path / "photos")
        seconds.append(time.perf_counter() - began)
    assert max(seconds) < 10, seconds
