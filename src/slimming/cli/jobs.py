"""What the commands that train take, as dataclasses, and how file and flags become one of them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from slimming.benchmarking.config import BenchConfig
from slimming.cli.flags import given
from slimming.cli.settings import build, merge, read_yaml
from slimming.core.budget import Budget
from slimming.errors import ConfigError
from slimming.retraining.retrain import DistilConfig
from slimming.runs.config import RunConfig
from slimming.runs.setup import ModelConfig
from slimming.searching.config import SearchConfig, preset
from slimming.training.config import DataConfig, TrainConfig

J = TypeVar("J")


@dataclass(frozen=True, kw_only=True)
class SearchJob:
    """What ``slimming search`` takes.

    Attributes:
        model: the dense start.
        data: the images.
        search: the search.
    """

    model: ModelConfig
    data: DataConfig
    search: SearchConfig = field(default_factory=SearchConfig)


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What ``slimming train`` takes.

    Attributes:
        model: the model to train: a dense start, or a slim checkpoint.
        data: the images.
        train: the training.
        teacher: a checkpoint to learn from, usually of the dense model.
        distil: how to learn from the teacher.

    Raises:
        ConfigError: ``distil`` without a teacher.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    teacher: str | None = None
    distil: DistilConfig | None = None

    def __post_init__(self) -> None:
        if self.distil is not None and self.teacher is None:
            raise ConfigError("distil has no effect without a teacher; give --teacher, or drop distil.")


@dataclass(frozen=True, kw_only=True)
class EvalJob:
    """What ``slimming eval`` takes beside its checkpoints.

    Attributes:
        data: the images.
    """

    data: DataConfig


@dataclass(frozen=True, kw_only=True)
class BenchJob:
    """What ``slimming bench`` takes beside its models.

    Attributes:
        bench: how time is measured.
    """

    bench: BenchConfig = field(default_factory=BenchConfig)


JOBS: tuple[type[Any], ...] = (RunConfig, SearchJob, TrainJob, EvalJob)


def read_job(cls: type[J], arguments: argparse.Namespace) -> tuple[J, list[str]]:
    """The job that the config file and the flags of ``arguments`` describe; flags win.

    One file may serve several commands: what belongs to others only is left alone, and named in the notes.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or one that is missing.
    """
    values: dict[str, Any] = {}
    notes: list[str] = []
    if arguments.config is not None:
        path = Path(arguments.config)
        values = read_yaml(path)
        known = _names(cls)
        others = [key for key in values if key not in known and any(key in _names(job) for job in JOBS)]
        values = {key: value for key, value in values.items() if key not in others}
        if others:
            notes.append(f"not used by this command: {', '.join(others)} in {path}")
    return from_values(cls, merge(values, given(arguments, cls))), notes


def from_values(cls: type[J], values: Mapping[str, Any]) -> J:
    """Make a job from nested values; ``search.preset`` names what the search starts from."""
    search = values.get("search")
    bases = {}
    if isinstance(search, Mapping) and "preset" in search:
        bases["search"] = preset(str(search["preset"]))
        values = {**values, "search": {key: value for key, value in search.items() if key != "preset"}}
    return build(cls, values, bases=bases)


def document(job: Any) -> dict[str, Any]:
    """A job as plain values from which `from_values` makes the same job again."""
    values = _plain(job)
    if "search" in values:
        # The paper's penalty has no entry for what it does not search; the default's would fill in.
        base = "paper" if set(values["search"]["penalty"]) == set(preset("paper").penalty) else "default"
        values["search"] = {"preset": base, **values["search"]}
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Budget):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def flatten(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested values by dotted name.

    >>> flatten({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else key
        result |= flatten(value, name) if isinstance(value, Mapping) and value else {name: value}
    return result


def differences(job: Any) -> list[str]:
    """One line per section: the settings that differ from the defaults, and those that have none."""
    values = document(job)
    fewest: dict[str, Any] = {"model": {"name": "-"}, "data": {"source": "-"}}
    if "budgets" in values:
        fewest["budgets"] = [{"macs": 1.0}]
    if "search" in values:
        fewest["search"] = {"preset": values["search"]["preset"]}
    if values.get("teacher") is not None:
        fewest |= {"teacher": "-", "distil": {}}
    plain = flatten(document(from_values(type(job), fewest)))
    lines: dict[str, list[str]] = {}
    for name, value in flatten(values).items():
        if value != plain.get(name, ...) or name in ("model.name", "data.source", "search.preset"):
            section, _, key = name.partition(".")
            lines.setdefault(section, []).append(f"{key}={_shown(value)}" if key else _shown(value))
    return [f"{section:<8} {', '.join(entries)}" for section, entries in lines.items()]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(entry)}" for key, entry in value.items()) + "}"
    return "null" if value is None else str(value)


def _names(cls: type[Any]) -> set[str]:
    return {entry.name for entry in dataclasses.fields(cls)}
