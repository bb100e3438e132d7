"""Read the logs of trainings, and reduce curves to the resolution of a chart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimming.core.argument_types import check_path
from slimming.core.limits import LARGEST_LOG
from slimming.core.records import decode_json_lines, read_bytes
from slimming.errors import CheckpointError

POINTS = 200
"""Largest number of points of a curve; more would be less than a pixel apart."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """The lines of a log.

    Attributes:
        lines: one mapping per logged step.
        axis: horizontal axis of the curves, ``"epoch"`` or ``"step"``.
    """

    lines: tuple[Mapping[str, Any], ...]
    axis: str

    def curve(self, key: str, factor: float = 1.0) -> list[tuple[float, float]]:
        """The points of one entry; if there are too many, neighbours are averaged. Missing values are left out."""
        points = [
            (float(line[self.axis]), factor * float(line[key]))
            for line in self.lines
            if _finite(line.get(key)) and _finite(line.get(self.axis))
        ]
        size = math.ceil(len(points) / POINTS) if points else 1
        parts = [points[i : i + size] for i in range(0, len(points), size)]
        return [(_mean([x for x, _ in part]), _mean([y for _, y in part])) for part in parts]

    def entries(self) -> list[str]:
        """All entries that occur in a line, in order of appearance."""
        return list(dict.fromkeys(key for line in self.lines for key in line))


def read_log(directory: Path, name: str | None, sha256: str | None = None) -> Log | None:
    """Read a log that the results name; None if no log is named or the file does not exist.

    A last line that was cut off while it was written is left out.

    Args:
        directory: directory of the run.
        name: path of the log in it.
        sha256: its checksum; None does not verify it.

    Raises:
        CheckpointError: the name leads out of the run's directory, the log was changed after the run, or a line is not
            JSON.
    """
    if name is None:
        return None
    check_path(name, "The log in the results")
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise CheckpointError(
            f"The log {name!r} does not lie in {directory}; results name files of their own run only."
        )
    if not path.is_file():
        return None
    content = read_bytes(path, "the log of a training", largest=LARGEST_LOG)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise CheckpointError(
            f"{path} was changed after it was written: its checksum differs. Take an intact copy, or remove it, which "
            "leaves out its curves."
        )
    lines = decode_json_lines(content, str(path))
    axis = "epoch" if lines and all(_finite(line.get("epoch")) for line in lines) else "step"
    return Log(lines=tuple(lines), axis=axis)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
