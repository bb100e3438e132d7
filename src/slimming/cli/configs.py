"""Configurations of the commands, read from a YAML file and flags."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from slimming.cli.flags import add_flags, flag_values, flags_of, format_value
from slimming.cli.settings import build, merge
from slimming.core.files import json_values
from slimming.core.same_settings import flatten
from slimming.core.yaml_text import read_yaml
from slimming.errors import ConfigError
from slimming.retraining.config import DistilConfig
from slimming.runs.config import ModelConfig, RunConfig
from slimming.searching.config import PRESETS, SearchConfig, preset
from slimming.training.config import DataConfig, TrainConfig

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class SearchCommandConfig:
    """Configuration of ``slimming search``.

    Attributes:
        model: the dense model.
        data: the images.
        search: settings of the search.
    """

    model: ModelConfig
    data: DataConfig
    search: SearchConfig = field(default_factory=SearchConfig)


@dataclass(frozen=True, kw_only=True)
class TrainCommandConfig:
    """Configuration of ``slimming train``.

    Attributes:
        model: the model to train: a dense model or a slim checkpoint.
        data: the images.
        train: settings of the training.
        teacher: checkpoint of the teacher, usually the dense model.
        distil: settings of the distillation from the teacher.

    Raises:
        ConfigError: ``distil`` is given without ``teacher``.
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
class EvalCommandConfig:
    """Configuration of ``slimming eval``, in addition to its checkpoints.

    Attributes:
        data: the images.
    """

    data: DataConfig


CONFIGS: tuple[type[Any], ...] = (RunConfig, SearchCommandConfig, TrainCommandConfig, EvalCommandConfig)


def add_config_options(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """Add the config file, ``--output``, ``--print-config`` and a flag per setting of ``cls`` to ``parser``."""
    parser.add_argument("config", nargs="?", help="YAML file of settings; flags override it")
    parser.add_argument("--output", metavar="DIR", help="output directory (default: runs/ plus the name of the file)")
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print all settings as a YAML config file, and exit",
    )
    parser.set_defaults(config_class=cls)
    add_flags(parser, cls)


def read_config(cls: type[C], arguments: argparse.Namespace) -> tuple[C, list[str]]:
    """Read a configuration from the config file and the flags of ``arguments``; flags override the file.

    Several commands can share a file: settings of other commands are ignored and listed in the notes.

    Returns:
        The configuration, and notes to print.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type.
    """
    values: dict[str, Any] = {}
    notes: list[str] = []
    if arguments.config is not None:
        values = read_yaml(Path(arguments.config))
        other_names = {entry.name for config in CONFIGS for entry in dataclasses.fields(config)}
        other_names -= {entry.name for entry in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
        if unused := [key for key in values if key in other_names]:
            notes.append(f"not used by this command: {', '.join(unused)} in {arguments.config}")
            values = {key: value for key, value in values.items() if key not in unused}
    return config_from_values(cls, merge(values, flag_values(arguments, cls))), notes


def config_from_values(cls: type[C], values: Mapping[str, Any]) -> C:
    """Create a configuration from nested values; ``search.preset`` selects the defaults of the search."""
    search = values.get("search")
    if isinstance(search, Mapping) and "preset" in search:
        settings = {key: value for key, value in search.items() if key != "preset"}
        values = {**values, "search": build(SearchConfig, settings, "search", preset(str(search["preset"])))}
    return build(cls, values)


def config_to_values(config: Any) -> dict[str, Any]:
    """Return nested values from which `config_from_values` creates the same configuration."""
    values = json_values(config)
    if "budgets" in values:
        values["budgets"] = [budget.to_dict() for budget in config.budgets]
    if "search" in values:
        # Penalties are merged with those of the preset, so choose a preset without kinds that this search lacks.
        kinds = {name: set(preset(name).penalty) for name in PRESETS}
        candidates = [name for name in PRESETS if kinds[name] <= set(config.search.penalty)]
        base = max(candidates, key=lambda name: len(kinds[name]), default="default")
        values["search"] = {"preset": base, **values["search"]}
    return values


def config_to_yaml(config: Any) -> str:
    """Return all settings in the format of a config file."""
    return yaml.safe_dump(config_to_values(config), sort_keys=False, allow_unicode=True)


def changed_settings(config: Any) -> list[str]:
    """Return one line per section with the settings that differ from the defaults or have no default."""
    values = config_to_values(config)
    defaults = {flag.name: flag.default for flag in flags_of(type(config))}
    if "search" in values:
        base = preset(values["search"]["preset"])
        defaults |= {flag.name: flag.default for flag in flags_of(SearchConfig, "search", base)}
    plain_defaults = flatten(json_values(defaults))
    lines: dict[str, list[str]] = {}
    for name, value in flatten(values).items():
        if value != plain_defaults.get(name, ...):
            section, _, key = name.partition(".")
            lines.setdefault(section, []).append(f"{key}={format_value(value)}" if key else format_value(value))
    return [f"{section:<8} {', '.join(entries)}" for section, entries in lines.items()]
