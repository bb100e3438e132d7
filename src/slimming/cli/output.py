"""Console output and output directories of the commands.

An output directory is created and checked before any work. It is removed again if a command fails before it saves work.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from slimming.cli.configs import (
    SearchCommandConfig,
    changed_settings,
    config_from_values,
    config_to_values,
    config_to_yaml,
)
from slimming.core.console import PlainConsole
from slimming.core.files import (
    atomic_write_text,
    check_free,
    exclusive,
    recorded_creations,
    remove_empty,
)
from slimming.core.locks import is_temporary
from slimming.core.same_settings import check_same_settings
from slimming.core.yaml_text import read_yaml
from slimming.errors import ConfigError, OutputError
from slimming.runs.config import CONFIG_FILE, CONFIG_START, FREE_SECTIONS, RunConfig, is_own_config, is_unscored
from slimming.searching.config import scoring_settings
from slimming.training.config import FREE_SETTINGS

BEFORE_WORK = (CONFIG_FILE, "inputs.json", "settings.json", "metrics.json", "log.jsonl")
"""Files that a failed run may leave without any work to resume from."""


def is_main_process() -> bool:
    """Return whether this process prints and writes files; launchers set RANK."""
    return int(os.environ.get("RANK", "0")) == 0


def console() -> Console:
    """Return a console on the standard output of the main process; other processes print nothing."""
    # Without a terminal, rich would limit tables to 80 columns.
    width = None if sys.stdout.isatty() else 160
    # Paths may contain brackets, which rich would read as markup.
    return PlainConsole(quiet=not is_main_process(), highlight=False, markup=False, soft_wrap=True, width=width)


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
    echo(f"  all settings: {directory / CONFIG_FILE}")
    for note in notes:
        echo(note)


@contextmanager
def run_directory(directory: Path, config: Any, command: str) -> Iterator[None]:
    """Prepare and lock ``directory``, which must be new, empty, or from an earlier call with the same settings.

    ``config.yaml`` is written to it. If the block fails before it saves any work, the files and directories that it
    created are removed, so that a corrected call can use the directory.

    Raises:
        OutputError: the directory contains files of others, is in use by another process, or is not writable.
        ConfigError: the earlier call had other settings; the message lists them.
    """
    if not is_main_process():
        yield
        return
    with exclusive(directory), recorded_creations() as created:
        try:
            if (directory / CONFIG_FILE).exists():
                check_config(directory, config, command)
            else:
                check_free(directory)
            _write_config(directory / CONFIG_FILE, config, command)
            yield
        except BaseException:
            _remove_unless_work(directory, created)
            raise


def _write_config(path: Path, config: Any, command: str) -> None:
    """Write ``config`` to ``path``, unless the file has been edited: then it stays as it is, with the same settings."""
    text = config_to_yaml(config)
    digest = hashlib.sha256(text.encode()).hexdigest()
    header = f"{CONFIG_START}{command}`; repeat with: slimming {command} THIS_FILE --output DIR\n# sha256 {digest}\n"
    if not path.exists() or (_is_unedited(path) and path.read_text("utf-8") != header + text):
        atomic_write_text(path, header + text)


def _is_unedited(path: Path) -> bool:
    """Whether a config.yaml is as `_write_config` wrote it."""
    first, _, rest = path.read_text("utf-8").partition("\n")
    second, _, text = rest.partition("\n")
    return first.startswith(CONFIG_START) and second == f"# sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def check_config(directory: Path, config: Any, command: str) -> None:
    """Check that an earlier call in ``directory`` had the settings of ``config``.

    Raises:
        OutputError: it was another command.
        ConfigError: a setting differs.
    """
    path = directory / CONFIG_FILE
    if not is_own_config(path):
        raise OutputError(
            f"{path} was not written by slimming, which keeps the settings of a run under this name. Choose another "
            "--output, or give this file another name or place."
        )
    try:
        before = config_from_values(type(config), read_yaml(path))
    except ConfigError as error:
        raise OutputError(
            f"{path} is not of a `slimming {command}` that can be resumed ({error}) Choose another directory."
        ) from error
    edited = not _is_unedited(path)
    check_same_settings(
        directory,
        config_to_values(before),
        config_to_values(config),
        # An edited file is not overwritten, and must have all settings of this call.
        free=() if edited else (*FREE_SETTINGS, *_unused_settings(directory, config)),
        free_sections=() if edited else FREE_SECTIONS,
        again=f"slimming {command} {path} --output {directory}",
    )


def _unused_settings(directory: Path, config: Any) -> tuple[str, ...]:
    """The settings of the scores, unless models were cut by these scores."""
    if isinstance(config, SearchCommandConfig) or (isinstance(config, RunConfig) and is_unscored(directory)):
        return scoring_settings(config.search)
    return ()


@contextmanager
def output_directory(directory: Path) -> Iterator[None]:
    """Create and lock ``directory``, which must be new or empty; if the block fails and leaves it empty, it is removed.

    Raises:
        OutputError: the directory is not empty, is in use by another process, or is not writable.
    """
    with exclusive(directory):
        check_free(directory)
        yield


def _remove_unless_work(directory: Path, created: list[Path]) -> None:
    """Remove what was ``created`` if ``directory`` contains nothing else, and no work to resume from."""
    files = [path for path in directory.rglob("*") if not path.is_dir() and not is_temporary(path.name)]
    if all(path in created and path.name in BEFORE_WORK for path in files):
        for path in files:
            path.unlink()
        remove_empty(sorted((path for path in created if path.is_dir()), reverse=True))
