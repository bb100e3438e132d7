"""Atomic writes of files and directories, and the checksum of JSON files; `slimming.core.records` reads them."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from slimming.core.locks import entries, hold, lock_file, partial_directory, remove_leftovers
from slimming.errors import ConfigError, OutputError

LEVELS = 2
"""Depth of the directories of a run in which its writers may leave temporary directories."""
_created: ContextVar[list[Path] | None] = ContextVar("created", default=None)


@contextmanager
def recorded_creations() -> Iterator[list[Path]]:
    """Yield a list that receives the files and directories which this module creates in this block, in this thread."""
    created: list[Path] = []
    token = _created.set(created)
    try:
        yield created
    finally:
        _created.reset(token)


def _record(path: Path) -> None:
    if (created := _created.get()) is not None:
        created.append(path)


def make_directory(path: Path) -> None:
    """Create a directory and its parents, as far as they do not exist; of a link, the directory that it points to."""
    path = Path(os.path.realpath(path))
    for missing in reversed([place for place in (path, *path.parents) if not place.exists()]):
        missing.mkdir(exist_ok=True)
        _record(missing)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file, and move it to ``path`` when the block ends.

    If the block raises, the temporary file is removed and ``path`` is unchanged. The file mode follows the umask. If
    ``path`` is a link, the file that it points to is replaced.

    Raises:
        OutputError: the disk is full, or ``path`` is not writable or is not a plain file; an `OSError` in the block is
            raised as OutputError.
    """
    try:
        target = _target(path)
        if target.exists() and not target.is_file():
            raise OutputError(f"{path} is not a plain file; give another path.")
        make_directory(target.parent)
        with partial_directory(target.parent) as partial:
            temporary = partial / target.name
            temporary.touch(exist_ok=False)
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            # Opened after the block, which may have replaced the file.
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            new = not target.exists()
            os.replace(temporary, target)
            if new:
                _record(target)
    except OSError as error:
        raise explain(error, path) from error


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory, and move it to ``path`` when the block ends.

    If the block raises, nothing is left behind. The modes of the directory and of everything in it follow the umask. If
    ``path`` is a link, the directory that it points to is filled.

    Args:
        path: a directory that does not exist yet or is empty.

    Raises:
        OutputError: the disk is full, or ``path`` is not writable or in use; an `OSError` in the block is raised as
            OutputError.
    """
    temporary = None
    missing: list[Path] = []
    try:
        target = _target(path)
        missing = [parent for parent in target.parents if not parent.exists()]
        make_directory(target.parent)
        with partial_directory(target.parent) as partial, hold(target) if target.is_dir() else nullcontext():
            temporary = partial / target.name
            temporary.mkdir()
            yield temporary
            _follow_umask(temporary)
            if target.is_dir():
                remove_leftovers(target)
                lock_file(target).unlink(missing_ok=True)
            os.replace(temporary, target)
            _record(target)
    except OSError as error:
        raise explain(error, path) from error
    except OutputError as error:  # for a file in the temporary directory: the message should name `path`
        raise OutputError(str(error).replace(str(temporary or path), str(path))) from error
    finally:
        remove_empty(missing)


def _target(path: Path) -> Path:
    """The place that ``path`` stands for if it is a link."""
    try:
        return path.resolve(strict=False) if path.is_symlink() else path
    except RuntimeError as error:  # Python before 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error


def _follow_umask(directory: Path) -> None:
    """Give everything in a new directory, which has the mode of the umask, the modes that follow from it."""
    mode = stat.S_IMODE(directory.stat().st_mode)
    for parent, directories, files in os.walk(directory):
        for name in directories:
            os.chmod(Path(parent, name), mode)
        for name in files:
            os.chmod(Path(parent, name), mode & 0o666)


def remove_empty(directories: Iterable[Path]) -> None:
    """Remove those of ``directories`` that are empty, in the given order."""
    for path in directories:
        with suppress(OSError):  # it is not empty, or does not exist
            path.rmdir()


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Lock ``directory`` in this block, so that no other process or thread writes to it, and remove leftovers in it.

    The directory is created if it does not exist. If it is still empty when the block ends, it is removed again.

    Raises:
        OutputError: the directory is in use (the message says by whom), is a file, or is not writable.
    """
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"{directory} is a file; give a directory that is empty or does not exist yet.")
    real = Path(os.path.realpath(directory))
    missing = [path for path in (real, *real.parents) if not path.exists()]
    try:
        with ExitStack() as stack:
            try:
                make_directory(directory)
                stack.enter_context(hold(directory))
                remove_leftovers(directory, LEVELS)
            except OSError as error:
                raise explain(error, directory) from error
            yield
    finally:
        remove_empty(missing)


@contextmanager
def exclusive_file(path: Path) -> Iterator[None]:
    """Lock the file at ``path`` in this block, which writes it several times.

    Raises:
        OutputError: the file is in use (the message says by whom), or its directory is not writable.
    """
    with ExitStack() as stack:
        try:
            make_directory(path.parent)
            stack.enter_context(hold(path))
        except OSError as error:
            raise explain(error, path) from error
        yield


def atomic_write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` to ``path``; see `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8; see `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON without NaN; see `check_json` and `atomic_write_bytes`."""
    check_json(value, path.name)
    atomic_write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def check_json(value: Any, name: str) -> None:
    """Check that ``value``, called ``name`` in messages, can be written as JSON without change.

    Raises:
        ConfigError: an entry is not a string, finite number, bool, None, list, or dict with strings as keys; the
            message names its key.
    """
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{name} has the key {key!r}; keys in JSON are strings. Give {str(key)!r}.")
            check_json(entry, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for place, entry in enumerate(value):
            check_json(entry, f"{name}[{place}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}, which JSON cannot hold. Leave it out, or give None.")
    elif not (value is None or isinstance(value, (str, int, float))):
        kind = type(value).__name__
        raise ConfigError(f"{name} is of type {kind}, which JSON cannot hold. Give a number, a string or a list.")


def json_values(value: Any) -> Any:
    """Return a dataclass, or nested values, as JSON values: dataclasses become dicts, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): json_values(entry) for key, entry in value.items()}
    return [json_values(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def check_free(path: Path, besides: Collection[str] = ()) -> None:
    """Check that ``path`` does not exist, or is an empty directory; lock files and temporary directories do not count.

    Args:
        path: path of a new directory.
        besides: names of files that may be in it.

    Raises:
        OutputError: it is a file, or a directory that is not empty.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; give a directory that is empty or does not exist yet.")
    if path.exists() and any(entry.name not in besides for entry in entries(path)):
        raise OutputError(f"{path} is not empty; give another directory, or empty this one first.")


def explain(error: OSError, path: Path) -> OutputError:
    """Return an `OutputError` that explains the error of the operating system for ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"The disk is full: {path} was not written. Free some space and run the command again.")
    return OutputError(f"{path} cannot be written ({error.strerror or error}). Give a path that you may write to.")


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """Return ``value`` with the SHA-256 of its canonical JSON under ``"sha256"``."""
    return {**value, "sha256": digest(value)}


def digest(value: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON of ``value`` as hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


FORMAT = 1
"""Version of the package's JSON formats; files with a larger number are refused."""
