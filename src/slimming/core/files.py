"""Atomic writes of files and directories, and the checksum of JSON files; `slimming.core.records` reads them."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimming.errors import ConfigError, OutputError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file, and move it to ``path`` when the block ends.

    If the block raises, the temporary file is removed and ``path`` is unchanged. The file mode follows the umask.

    Raises:
        OutputError: the disk is full, or ``path`` is not writable; an `OSError` in the block is raised as OutputError.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        # Opened after the block, which may have replaced the file.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        raise explain(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory, and move it to ``path`` when the block ends.

    If the block raises, nothing is left behind. The mode of the directory follows the umask.

    Args:
        path: a directory that does not exist yet or is empty.

    Raises:
        OutputError: the disk is full, or ``path`` is not writable; an `OSError` in the block is raised as OutputError.
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(path)
        partial.mkdir()
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise explain(error, path) from error
    except OutputError as error:  # for a file in the temporary directory: the message should name `path`
        raise OutputError(str(error).replace(str(partial), str(path))) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()


def _beside(path: Path) -> Path:
    """A new name in the same directory. Not made by `tempfile`, whose files ignore the umask."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


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


def check_free(path: Path) -> None:
    """Check that ``path`` does not exist or is an empty directory.

    Raises:
        OutputError: it is a file, or a directory that is not empty.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; give a directory that is empty or does not exist yet.")
    if path.exists() and any(path.iterdir()):
        raise OutputError(f"{path} is not empty; give another directory, or empty this one first.")


def new_directory(path: Path) -> Path:
    """Create ``path`` as an empty, writable directory and return it.

    Raises:
        OutputError: it is a file, is not empty, or cannot be written.
    """
    try:
        check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise explain(error, path) from error
    return path


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
