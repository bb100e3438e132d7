"""Locks on output directories, and the temporary directories that writers fill before they rename their result.

A temporary directory is locked as long as its writer lives. If the writer was killed, the next start finds it without
a lock and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from slimming.errors import OutputError

LOCK = ".slimming.lock"
"""Name of the lock file in a directory that is being written, and end of the name of the lock file beside a file."""
PARTIAL = ".slimming-partial-"
"""Start of the names of temporary directories."""
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of file systems that do not support locks of the operating system."""


@contextmanager
def hold(target: Path) -> Iterator[None]:
    """Lock a file or a directory in this block; the thread that holds a lock may take it again.

    The lock is one of the operating system (`flock`), which ends with the process, however it ends. On file systems
    without such locks, the lock file itself is the lock: after a crash it is taken over on the same machine only.

    Raises:
        OutputError: another process, or another thread, holds the lock; the message says who.
        OSError: the directory does not exist or is not writable.
    """
    lock, path = _acquired(target), lock_file(target)
    outermost, native = lock.lock_counter == 1, not isinstance(lock, SoftFileLock)
    mine = None
    try:
        if native:
            if outermost:
                with contextlib.suppress(PermissionError):  # Windows does not allow writing to a locked file
                    path.write_text(json.dumps(_me()), "utf-8")
            mine = path.stat().st_ino
        yield
    finally:
        # Removed while it is locked, and only if it is this lock: the directory may have been replaced.
        if native and outermost:
            with contextlib.suppress(OSError):
                if path.stat().st_ino == mine:
                    path.unlink()
        lock.release()


def lock_file(target: Path) -> Path:
    """Return the path of the lock file of a directory, in it, or of a file, beside it."""
    target = Path(os.path.realpath(target))
    return target / LOCK if target.is_dir() else target.with_name(f".{target.name}{LOCK}")


def _acquired(target: Path) -> BaseFileLock:
    path = lock_file(target)
    existed = path.exists()
    # The instance of a path is shared, so that functions which call each other can all take the lock.
    try:
        return _taken(FileLock(path, is_singleton=True), target)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    if not existed and path.stat().st_size == 0:  # left by the attempt
        path.unlink()
    return _taken(SoftFileLock(path, is_singleton=True), target)


def _taken(lock: BaseFileLock, target: Path) -> BaseFileLock:
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(_in_use(target)) from error
    return lock


def _me() -> dict[str, str | int]:
    command = shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])
    since = datetime.now(timezone.utc).astimezone().isoformat(" ", "seconds")
    return {"host": platform.node(), "pid": os.getpid(), "since": since, "command": command[:300]}


def _in_use(target: Path) -> str:
    """The sentence that says who holds the lock of ``target``."""
    path = lock_file(target)
    advice = f"Wait until it ends, stop it, or choose another {'directory' if target.is_dir() else 'file'}."
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError):
        text = ""
    try:
        holder = json.loads(text)
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}: {holder['command']!a}"
    except (ValueError, KeyError, TypeError):
        lines = text.splitlines()  # of a lock file that is itself the lock: process and host
        who = f"process {lines[0]} on {lines[1]}" if len(lines) > 1 else "another process"
        advice += f" If that process no longer exists, delete {path}." if len(lines) > 1 else ""
    return f"{target} is in use by {who}. {advice}"


@contextmanager
def partial_directory(parent: Path) -> Iterator[Path]:
    """Yield a new locked temporary directory in ``parent``, and remove it when the block ends.

    Raises:
        OSError: ``parent`` does not exist or is not writable.
    """
    remove_leftovers(parent)
    # Not made by `tempfile`, whose directories ignore the umask.
    partial = parent / f"{PARTIAL}{secrets.token_hex(6)}"
    partial.mkdir()
    try:
        with hold(partial):
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(directory: Path, depth: int = 0) -> None:
    """Remove the temporary directories whose writers were killed, in ``directory`` and ``depth`` levels below it."""
    with os.scandir(directory) as found:
        below = [Path(entry) for entry in found if entry.is_dir(follow_symlinks=False)]
    for path in below:
        if path.name.startswith(PARTIAL):
            _remove_unless_held(path)
        elif depth:
            remove_leftovers(path, depth - 1)


def _remove_unless_held(partial: Path) -> None:
    with contextlib.suppress(OutputError, OSError):  # it is locked, or another process removes it too
        lock = _acquired(partial)
        if lock.lock_counter == 1:  # otherwise this thread is filling the directory
            shutil.rmtree(partial, ignore_errors=True)
        lock.release()


def entries(directory: Path) -> list[Path]:
    """Return the entries of ``directory`` without lock files and temporary directories."""
    return [path for path in sorted(directory.iterdir()) if not is_temporary(path.name)]


def is_temporary(name: str) -> bool:
    """Return whether ``name`` is that of a lock file or a temporary directory."""
    return name.startswith(PARTIAL) or (name.startswith(".") and name.endswith(LOCK))
