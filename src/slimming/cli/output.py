"""What commands print, and the directories that they write: claimed before any work, left clean by mistakes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from slimming.cli.jobs import as_yaml, differences, document, from_values
from slimming.cli.settings import read_yaml
from slimming.core.files import atomic_write_text, explain, json_values, new_directory, read_json
from slimming.core.same_settings import check_same_settings, differing
from slimming.errors import ConfigError, OutputError
from slimming.runs.config import FREE_SECTIONS
from slimming.training.config import FREE_SETTINGS

CONFIG = "config.yaml"
BEFORE_WORK = (CONFIG, "metrics.json", "log.jsonl")
"""Files that may lie in a directory before there is anything to go on from."""


def is_main() -> bool:
    """Whether this is the process that writes and speaks (launchers number their processes in RANK)."""
    return int(os.environ.get("RANK", "0")) == 0


def console() -> Console:
    """Where results go: standard output, of the first process only."""
    # Tables in a file or a pipe must not be squeezed into 80 columns.
    width = None if sys.stdout.isatty() else 160
    # Names of places may have brackets, which are not rich's.
    return Console(quiet=not is_main(), highlight=False, markup=False, soft_wrap=True, width=width)


def say(line: str) -> None:
    """Print one line as it is."""
    console().print(line)


def count(number: float, unit: str = "") -> str:
    """A number with three digits or more, in thousands, millions or billions.

    >>> count(22050664), count(4598882304), count(9812, "B")
    ('22.05 M', '4.60 G', '9.81 kB')
    """
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {name}{unit}"
    return f"{number:g} {unit}".rstrip()


def announce(command: str, job: Any, directory: Path, notes: list[str]) -> None:
    """Print the settings that matter: what has no default, and what differs from it."""
    say(f"slimming {command}, into {directory}")
    for line in differences(job):
        say(f"  {line}")
    say(f"  every setting: {directory / CONFIG}")
    for note in notes:
        say(note)


@contextmanager
def claimed(directory: Path, job: Any, command: str) -> Iterator[None]:
    """Hold ``directory`` for ``job``: a new or empty one, or that of an earlier call with the same settings.

    ``config.yaml`` is written into it. If the block fails before it has written anything, what was made here
    is removed again.

    Raises:
        OutputError: it holds something else, or cannot be written.
        ConfigError: the earlier call had other settings; the message names them.
    """
    if not is_main():
        yield
        return
    missing = _missing(directory)
    fresh = not (directory / CONFIG).exists()
    try:
        if fresh:
            new_directory(directory)
        else:
            same_settings(directory, job, command)
            _check_writable(directory)
        text = f"# Settings of `slimming {command}`; repeat with: slimming {command} THIS_FILE --output DIR\n"
        text += as_yaml(job)
        if fresh or (directory / CONFIG).read_text("utf-8") != text:
            atomic_write_text(directory / CONFIG, text)
        yield
    except BaseException:
        _clean(directory, missing, fresh)
        raise


def same_settings(directory: Path, job: Any, command: str) -> None:
    """Check that the earlier call in ``directory`` had the settings of ``job``.

    Raises:
        OutputError: it was a call of another command.
        ConfigError: a setting differs.
    """
    path = directory / CONFIG
    try:
        before = from_values(type(job), read_yaml(path))
    except ConfigError as error:
        raise OutputError(
            f"{path} is not of a `slimming {command}` that can go on ({error}) Give another directory."
        ) from error
    check_same_settings(
        directory,
        document(before),
        document(job),
        free=FREE_SETTINGS,
        free_sections=FREE_SECTIONS,
        again=f"slimming {command} {path} --output {directory}",
    )


def is_complete(directory: Path, job: Any) -> dict[str, Any] | None:
    """The results of a finished run in ``directory``, if they are of exactly these settings."""
    target = directory / "results.json"
    if not target.exists() or not (directory / "report.html").exists():
        return None
    results = read_json(target)
    return None if differing(results["settings"], json_values(job), free=FREE_SETTINGS) else results


@contextmanager
def made(directory: Path) -> Iterator[None]:
    """Hold a new or empty ``directory``; if the block fails and leaves it empty, it is removed again.

    Raises:
        OutputError: it holds something, or cannot be written.
    """
    missing = _missing(directory)
    try:
        new_directory(directory)
        yield
    except BaseException:
        _remove_empty(missing)
        raise


def _missing(directory: Path) -> list[Path]:
    """``directory`` and those above it that do not exist yet, the deepest first."""
    return [path for path in (directory, *directory.parents) if not path.exists()]


def _check_writable(directory: Path) -> None:
    probe = directory / f".{CONFIG}.probe"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise explain(error, directory) from error


def _clean(directory: Path, missing: list[Path], fresh: bool) -> None:
    """Remove what was made, if no work was saved yet: a corrected call must not meet the old settings."""
    left = [path for path in directory.rglob("*") if path.is_file()] if directory.is_dir() else [directory]
    if fresh and all(path.name in BEFORE_WORK for path in left):
        for path in left:
            path.unlink()
        inside = [path for path in directory.rglob("*") if path.is_dir()]
        _remove_empty(sorted(inside, reverse=True) + missing)


def _remove_empty(directories: list[Path]) -> None:
    for path in directories:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
