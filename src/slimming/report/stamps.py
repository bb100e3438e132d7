"""Stamp the files of a report with a checksum, which tells whole files from damaged ones and from files of others."""

from __future__ import annotations

import hashlib
from pathlib import Path

from slimming.core.files import atomic_write_text
from slimming.errors import OutputError

START, END = "\n<!-- slimming report, sha256 ", " -->\n"
"""Comment in HTML, Markdown and SVG around the checksum of the text before it."""


def write_stamped(path: Path, text: str) -> Path:
    """Write ``text`` with its stamp, atomically, and return ``path``.

    Raises:
        OutputError: there is a file without a stamp at ``path``, which is kept; or the place is not writable.
    """
    check_ours(path)
    atomic_write_text(path, text + _stamp(text))
    return path


def check_ours(path: Path) -> None:
    """Check that ``path`` does not exist or is a stamped file, whether whole or edited.

    Raises:
        OutputError: it is another file.
    """
    if path.exists() and START not in _read(path):
        raise OutputError(f"{path} exists and was not written by slimming; it is kept. Choose another place.")


def is_whole(path: Path) -> bool:
    """Return whether ``path`` is a stamped file that was not changed."""
    text, start, _ = (stamped := _read(path)).rpartition(START)
    return bool(start) and stamped == text + _stamp(text)


def _stamp(text: str) -> str:
    return f"{START}{hashlib.sha256(text.encode()).hexdigest()}{END}"


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""
