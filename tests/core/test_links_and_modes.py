"""Outputs that are links or special files, and the modes of files and directories."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from slimming.core.files import atomic_directory, atomic_write_bytes
from slimming.errors import OutputError


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for name in ("there", "not there yet"):
        link = tmp_path / f"link to {name}"
        link.symlink_to(tmp_path / "real" / name)
        if name == "there":
            (tmp_path / "real" / name).write_bytes(b"before")
        atomic_write_bytes(link, b"after")
        assert link.is_symlink()
        assert (tmp_path / "real" / name).read_bytes() == b"after"
    assert {path.name for path in (tmp_path / "real").iterdir()} == {"there", "not there yet"}
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match="loop cannot be written"):
        atomic_write_bytes(tmp_path / "loop", b"x")
    assert (tmp_path / "loop").is_symlink()


def test_a_directory_that_is_a_link_is_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for name in ("empty", "not there yet"):
        link = tmp_path / f"link to {name}"
        link.symlink_to(tmp_path / "real" / name)
        if name == "empty":
            (tmp_path / "real" / name).mkdir()
        with atomic_directory(link) as place:
            (place / "x").write_text("1")
        assert link.is_symlink()
        assert (tmp_path / "real" / name / "x").read_text() == "1"
    assert {path.name for path in (tmp_path / "real").iterdir()} == {"empty", "not there yet"}


def test_what_is_not_a_plain_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OutputError, match="is not a plain file"):
            atomic_write_bytes(path, b"x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077], ids=oct)
def test_modes_follow_the_umask_whatever_a_library_sets(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "made" / "here") as place:
            (place / "sub").mkdir(mode=0o700)
            for path in (place / "private", place / "sub" / "private"):
                path.touch(mode=0o600)
            (place / "open").touch()
            (place / "open").chmod(0o666)
        atomic_write_bytes(tmp_path / "made" / "file", b"x")
    finally:
        os.umask(before)
    for path in (tmp_path / "made").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path
