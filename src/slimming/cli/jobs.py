"""What the commands that train take, as dataclasses, and how file and flags become one of them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from slimming.cli.flags import add_flags, flags_of, given, shown
from slimming.cli.settings import build, merge, read_yaml
from slimming.core.files import json_values
from slimming.core.same_settings import flatten
from slimming.errors import ConfigError
from slimming.retraining.config import DistilConfig
from slimming.runs.config import ModelConfig, RunConfig
from slimming.searching.config import PRESETS, SearchConfig, preset
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


JOBS: tuple[type[Any], ...] = (RunConfig, SearchJob, TrainJob, EvalJob)


def add_job(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """Give ``parser`` what every command that trains has: the file, ``--output`` and a flag per setting of ``cls``."""
    parser.add_argument("config", nargs="?", help="YAML file of settings; flags win over it")
    parser.add_argument("--output", metavar="DIR", help="where it goes (default runs/ and the file's name)")
    parser.add_argument(
        "--print-config", action="store_true", help="print every setting as YAML, to save as a config file, and stop"
    )
    parser.set_defaults(job=cls)
    add_flags(parser, cls)


def read_job(cls: type[J], arguments: argparse.Namespace) -> tuple[J, list[str]]:
    """The job that the config file and the flags of ``arguments`` describe; flags win.

    One file may serve several commands: what belongs to others only is left alone, and named in the notes.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or one that is missing.
    """
    values: dict[str, Any] = {}
    notes: list[str] = []
    if arguments.config is not None:
        values = read_yaml(Path(arguments.config))
        elsewhere = {entry.name for job in JOBS for entry in dataclasses.fields(job)}
        elsewhere -= {entry.name for entry in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
        if others := [key for key in values if key in elsewhere]:
            notes.append(f"not used by this command: {', '.join(others)} in {arguments.config}")
            values = {key: value for key, value in values.items() if key not in others}
    return from_values(cls, merge(values, given(arguments, cls))), notes


def from_values(cls: type[J], values: Mapping[str, Any]) -> J:
    """Make a job from nested values; ``search.preset`` names what the search starts from."""
    search = values.get("search")
    if isinstance(search, Mapping) and "preset" in search:
        own = {key: value for key, value in search.items() if key != "preset"}
        values = {**values, "search": build(SearchConfig, own, "search", preset(str(search["preset"])))}
    return build(cls, values)


def document(job: Any) -> dict[str, Any]:
    """A job as plain values from which `from_values` makes the same job again."""
    values = json_values(job)
    if "budgets" in values:
        values["budgets"] = [budget.to_dict() for budget in job.budgets]
    if "search" in values:
        # A penalty is laid over that of the preset, so the preset must have no kind that this search has not.
        kinds = {name: set(preset(name).penalty) for name in PRESETS}
        below = [name for name in PRESETS if kinds[name] <= set(job.search.penalty)]
        base = max(below, key=lambda name: len(kinds[name]), default="default")
        values["search"] = {"preset": base, **values["search"]}
    return values


def as_yaml(job: Any) -> str:
    """Every setting of a job, as a config file that makes the same job again."""
    return yaml.safe_dump(document(job), sort_keys=False, allow_unicode=True)


def differences(job: Any) -> list[str]:
    """One line per section: the settings that differ from the defaults, and those that have none."""
    values = document(job)
    defaults = {flag.name: flag.default for flag in flags_of(type(job))}
    if "search" in values:
        base = preset(values["search"]["preset"])
        defaults |= {flag.name: flag.default for flag in flags_of(SearchConfig, "search", base)}
    plain_defaults = flatten(json_values(defaults))
    lines: dict[str, list[str]] = {}
    for name, value in flatten(values).items():
        if value != plain_defaults.get(name, ...):
            section, _, key = name.partition(".")
            lines.setdefault(section, []).append(f"{key}={shown(value)}" if key else shown(value))
    return [f"{section:<8} {', '.join(entries)}" for section, entries in lines.items()]
