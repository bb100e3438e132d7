"""Locks of directories, with locks of the operating system and on file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimming.core.files import check_free, exclusive, exclusive_file
from slimming.core.locks import LOCK, hold
from slimming.errors import OutputError


def in_thread(work: Callable[[], Any]) -> Any:
    """The result or the error of ``work`` in another thread, which holds no lock."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except OutputError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def locked(path: Path) -> None:
    with exclusive(path):
        pass


def dead_process() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_the_holder_is_named_and_may_take_the_lock_again(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    with exclusive(place), exclusive(place):
        holder = json.loads((place / LOCK).read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), platform.node())
        error = in_thread(lambda: locked(place))
        assert str(error).startswith(
            f"{place} is in use by process {os.getpid()} on {platform.node()}, since {holder['since']}: "
        )
        assert "choose another directory" in str(error)
        check_free(place)
    assert list(tmp_path.iterdir()) == []
    assert in_thread(lambda: locked(place)) is None


def test_what_is_in_the_directory_stays(tmp_path: Path) -> None:
    with exclusive(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("x")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_a_file_is_locked_beside_it(tmp_path: Path) -> None:
    with exclusive_file(tmp_path / "table.json"):
        assert isinstance(in_thread(lambda: exclusive_file(tmp_path / "table.json").__enter__()), OutputError)
        assert in_thread(lambda: exclusive_file(tmp_path / "other.json").__enter__()) is None
        check_free(tmp_path)
    assert not (tmp_path / f".table.json{LOCK}").exists()


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=lambda code: errno.errorcode[code])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not support locks, as some network disks."""

    def refuse(*_: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.usefixtures("without_locks")
def test_without_locks_of_the_system_the_file_is_the_lock(tmp_path: Path) -> None:
    with hold(tmp_path):
        error = str(in_thread(lambda: locked(tmp_path)))
        assert f"is in use by process {os.getpid()} on " in error
        assert f"If that process no longer exists, delete {tmp_path / LOCK}." in error
    assert list(tmp_path.iterdir()) == []
    # Left by a crash on this machine, and by a process of another machine, which may be alive.
    (tmp_path / LOCK).write_text(f"{dead_process()}\n{platform.node()}\n")
    assert in_thread(lambda: locked(tmp_path)) is None
    (tmp_path / LOCK).write_text("4711\nanother-machine\n")
    assert "is in use by process 4711 on another-machine" in str(in_thread(lambda: locked(tmp_path)))
