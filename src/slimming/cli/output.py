"""Console output and output directories of the commands.

An output directory is created and checked before any work. It is removed again if a command fails before it saves work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from slimming.cli.configs import changed_settings, config_from_values, config_to_values, config_to_yaml
from slimming.cli.settings import read_yaml
from slimming.core.files import atomic_write_text, explain, json_values, new_directory
from slimming.core.same_settings import check_same_settings, differing
from slimming.errors import ConfigError, OutputError
from slimming.report.model import RESULTS
from slimming.runs.config import FREE_SECTIONS
from slimming.training.config import FREE_SETTINGS

CONFIG = "config.yaml"
BEFORE_WORK = (CONFIG, "metrics.json", "log.jsonl")
"""Files that a failed run may leave without any work to resume from."""


def is_main_process() -> bool:
    """Return whether this process prints and writes files; launchers set RANK."""
    return int(os.environ.get("RANK", "0")) == 0


def console() -> Console:
    """Return a console on the standard output of the main process; other processes print nothing."""
    # Without a terminal, rich would limit tables to 80 columns.
    width = None if sys.stdout.isatty() else 160
    # Paths may contain brackets, which rich would read as markup.
    return Console(quiet=not is_main_process(), highlight=False, markup=False, soft_wrap=True, width=width)


def echo(line: str) -> None:
    """Print a line without markup."""
    console().print(line)


def format_count(number: float, unit: str = "") -> str:
    """Format a number with the prefix k, M or G.

    >>> format_count(22050664), format_count(4598882304), format_count(9812, "B")
    ('22.05 M', '4.60 G', '9.81 kB')
    """
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {name}{unit}"
    return f"{number:g} {unit}".rstrip()


def print_settings(command: str, config: Any, directory: Path, notes: list[str]) -> None:
    """Print the settings that differ from the defaults or have no default."""
    echo(f"slimming {command}, output: {directory}")
    for line in changed_settings(config):
        echo(f"  {line}")
    echo(f"  all settings: {directory / CONFIG}")
    for note in notes:
        echo(note)


@contextmanager
def run_directory(directory: Path, config: Any, command: str) -> Iterator[None]:
    """Prepare ``directory``, which must be new, empty, or from an earlier call with the same settings.

    ``config.yaml`` is written to it. If the block fails before it saves any work, the new files and directories are
    removed.

    Raises:
        OutputError: the directory contains other files or is not writable.
        ConfigError: the earlier call had other settings; the message lists them.
    """
    if not is_main_process():
        yield
        return
    missing = _missing(directory)
    fresh = not (directory / CONFIG).exists()
    try:
        if fresh:
            new_directory(directory)
        else:
            check_config(directory, config, command)
            _check_writable(directory)
        text = f"# Settings of `slimming {command}`; repeat with: slimming {command} THIS_FILE --output DIR\n"
        text += config_to_yaml(config)
        if fresh or (directory / CONFIG).read_text("utf-8") != text:
            atomic_write_text(directory / CONFIG, text)
        yield
    except BaseException:
        _clean(directory, missing, fresh)
        raise


def check_config(directory: Path, config: Any, command: str) -> None:
    """Check that an earlier call in ``directory`` had the settings of ``config``.

    Raises:
        OutputError: it was another command.
        ConfigError: a setting differs.
    """
    path = directory / CONFIG
    try:
        before = config_from_values(type(config), read_yaml(path))
    except ConfigError as error:
        raise OutputError(
            f"{path} is not of a `slimming {command}` that can be resumed ({error}) Choose another directory."
        ) from error
    check_same_settings(
        directory,
        config_to_values(before),
        config_to_values(config),
        free=FREE_SETTINGS,
        free_sections=FREE_SECTIONS,
        again=f"slimming {command} {path} --output {directory}",
    )


def finished_results(directory: Path, config: Any) -> dict[str, Any] | None:
    """Return the results of a finished run in ``directory`` with these settings, or None."""
    target = directory / "results.json"
    if not target.exists() or not (directory / "report.html").exists():
        return None
    results = RESULTS.read_values(target)
    return None if differing(results["settings"], json_values(config), free=FREE_SETTINGS) else results


@contextmanager
def output_directory(directory: Path) -> Iterator[None]:
    """Create ``directory``, which must be new or empty; if the block fails and leaves it empty, it is removed.

    Raises:
        OutputError: the directory is not empty or not writable.
    """
    missing = _missing(directory)
    try:
        new_directory(directory)
        yield
    except BaseException:
        _remove_empty(missing)
        raise


def _missing(directory: Path) -> list[Path]:
    """Return ``directory`` and its parents as far as they do not exist, the deepest first."""
    return [path for path in (directory, *directory.parents) if not path.exists()]


def _check_writable(directory: Path) -> None:
    probe = directory / f".{CONFIG}.probe"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise explain(error, directory) from error


def _clean(directory: Path, missing: list[Path], fresh: bool) -> None:
    """Remove new files and directories if no work was saved, so that a corrected call can use the directory."""
    files = [path for path in directory.rglob("*") if path.is_file()] if directory.is_dir() else [directory]
    if fresh and all(path.name in BEFORE_WORK for path in files):
        for path in files:
            path.unlink()
        directories = [path for path in directory.rglob("*") if path.is_dir()]
        _remove_empty(sorted(directories, reverse=True) + missing)


def _remove_empty(directories: list[Path]) -> None:
    for path in directories:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
