"""Files that are whole or not there, and what is said of those that cannot be read or written."""

from __future__ import annotations

import errno
import secrets
from pathlib import Path
from typing import Any

import pytest

from slimming.core.files import (
    atomic_directory,
    atomic_json,
    atomic_write_bytes,
    check_free,
    check_json,
    explain,
)
from slimming.core.locks import PARTIAL
from slimming.errors import ConfigError, OutputError


def test_only_new_and_empty_directories_are_free(tmp_path: Path) -> None:
    check_free(tmp_path / "a")
    (tmp_path / "a" / "b").mkdir(parents=True)
    check_free(tmp_path / "a" / "b")
    with pytest.raises(OutputError, match="is not empty"):
        check_free(tmp_path / "a")
    check_free(tmp_path / "a", besides=("b",))
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        check_free(tmp_path / "file")


def test_what_a_block_writes_is_there_at_its_end_only(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a" / "b") as place:
        (place / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    with pytest.raises(KeyError), atomic_directory(tmp_path / "c" / "d"):
        raise KeyError
    assert not (tmp_path / "c").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_error_inside_names_the_place_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=rf"{tmp_path}/a cannot be written"), atomic_directory(tmp_path / "a") as at:
        raise explain(OSError(errno.EACCES, "no"), at)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write_bytes(path, b"one")
    atomic_write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "The disk is full"),
        (errno.EDQUOT, "The disk is full"),
        (errno.EACCES, r"cannot be written \(why\)"),
    ],
    ids=["disk", "quota", "rights"],
)
def test_what_the_system_says_is_told(code: int, says: str) -> None:
    with pytest.raises(OutputError, match=says):
        raise explain(OSError(code, "why"), Path("here"))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": {1: 2}}, r"x\.a has the key 1"),
        ({"a": [0.0, float("nan")]}, r"x\.a\[1\] is nan"),
        ({"a": (float("inf"),)}, r"x\.a\[0\] is inf"),
        ({"a": {"b": {1, 2}}}, r"x\.a\.b is of type set"),
    ],
    ids=["key", "nan", "infinite", "set"],
)
def test_what_json_cannot_hold_is_named_by_its_place(value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_json(value, "x")
    check_json({"a": [1, 0.5, True, None, "b", {"c": ()}]}, "x")


def test_nothing_is_written_that_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"file\.json\.a is nan"):
        atomic_json(tmp_path / "file.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []
    atomic_json(tmp_path / "file.json", {"a": 1})
    assert (tmp_path / "file.json").read_text() == '{\n "a": 1\n}\n'


def test_a_temporary_name_that_is_taken_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write_bytes(tmp_path / "file", b"one")
    monkeypatch.setattr(secrets, "token_hex", lambda _: "taken")
    (tmp_path / f"{PARTIAL}taken").write_bytes(b"of another process")
    with pytest.raises(OutputError, match="cannot be written"):
        atomic_write_bytes(tmp_path / "file", b"two")
    assert (tmp_path / "file").read_bytes() == b"one"


def test_a_temporary_directory_of_a_living_writer_stays(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "made") as place:
        (place / "x").write_text("1")
        (tmp_path / f"{PARTIAL}0123456789ab").mkdir()
        atomic_write_bytes(tmp_path / "file", b"x")  # removes leftovers beside it
        assert place.exists()
        assert not (tmp_path / f"{PARTIAL}0123456789ab").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"made", "file"}
