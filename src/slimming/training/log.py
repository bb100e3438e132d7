"""Log of a training run: JSON lines, progress bar, and Accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from slimming.core.console import PlainConsole
from slimming.core.files import atomic_write_text, explain
from slimming.errors import ConfigError, MissingExtraError, OutputError, nearest

LOG_FILE = "log.jsonl"
LINE = '{"step": '
"""Start of each line of a log."""


def check_trackers(names: tuple[str, ...], directory: Path | None) -> None:
    """Check that every tracker is known and installed, and that there is a directory for its files.

    Raises:
        ConfigError: a tracker is unknown, or there is no directory.
        MissingExtraError: the library of a tracker is not installed.
    """
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"There is no tracker {name!r}; Accelerate supports {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}."
                f"{nearest(name, LOGGER_TYPE_TO_CLASS)}"
            )
        if name not in available:
            raise MissingExtraError(f"The tracker {name!r} is not installed; run: pip install {name}.")
    if names and directory is None:
        raise ConfigError("Trackers write to the directory of the run; give a directory.")


class RunLog:
    """Log of one run. Only the main process writes files and shows progress.

    Args:
        accelerator: Accelerate's accelerator, with the trackers.
        directory: directory of ``log.jsonl``, or None to keep the lines in memory only.
        title: title of the progress bar, or None to show no progress.
        lines: lines up to the step that the run resumes from; new lines are appended to this list, and an existing
            file of an earlier attempt is replaced.
        start: step that the run resumes from.
        total: last step of the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        directory: Path | None,
        title: str | None,
        lines: list[dict[str, Any]],
        start: int,
        total: int,
    ) -> None:
        self.accelerator = accelerator
        self.path = directory / LOG_FILE if directory is not None else None
        self.is_main_process = accelerator.is_main_process
        self.lines = lines
        if self.is_main_process and self.path is not None:
            _check_log(self.path)
            atomic_write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.title, self.start, self.total = title, start, total
        self.console = PlainConsole(stderr=True, quiet=title is None or not self.is_main_process)
        self.bar: Progress | None = None

    def __enter__(self) -> RunLog:
        if self.title is not None and self.is_main_process and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"),
            )  # fmt: skip
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.start, metrics="")
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, step: int) -> None:
        """Update the progress bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line to the log and send it to the trackers.

        Raises:
            OutputError: the disk is full, or the file is not writable.
        """
        self.lines.append(dict(line))
        if self.is_main_process and self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise explain(error, self.path) from error
        if self.accelerator.trackers:
            self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])
        if self.bar is not None:
            self.bar.update(self.task, metrics=format_metrics(line))

    def print(self, line: Mapping[str, Any]) -> None:
        """Print the metrics of a line unless the progress bar shows them."""
        if self.bar is None:
            self.console.print(
                f"{self.title}: step {line['step']} of {self.total}, {format_metrics(line)}", highlight=False
            )


def format_metrics(line: Mapping[str, Any]) -> str:
    """Return the main metrics of a log line as text.

    >>> format_metrics({"step": 3, "loss": 1.23456, "lr": 0.0005, "val_top1": 0.9})
    'loss 1.235, top-1 90.0 %'
    """
    parts = []
    if "loss" in line:
        parts.append(f"loss {line['loss']:.3f}")
    if "val_top1" in line:
        parts.append(f"top-1 {100 * line['val_top1']:.1f} %")
    else:
        others = [key for key in line if key.startswith("val_") and key not in ("val_loss", "val_images")]
        parts += [f"{key.removeprefix('val_')} {line[key]:.4g}" for key in others]
    if "images_per_second" in line:
        parts.append(f"{line['images_per_second']:.0f} images/s")
    return ", ".join(parts)


def _check_log(path: Path) -> None:
    """Check that ``path`` does not exist or is a log of a training, possibly cut off where its process was killed.

    Raises:
        OutputError: it is another file.
    """
    if not path.exists():
        return
    try:
        *texts, last = path.read_text("utf-8").splitlines() or [""]
        ours = all(text.startswith(LINE) for text in texts) and (last.startswith(LINE) or LINE.startswith(last))
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise OutputError(f"{path} is not the log of a training; move it, or choose another directory.")
