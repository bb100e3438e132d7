"""Flags ``--section.key value`` for every field of a dataclass, with help from its docstring."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from slimming.cli.settings import default_of, unwrap
from slimming.core.budget import Budget
from slimming.errors import ConfigError

BUDGET = "budget"
"""The flag that is given once per budget; the other settings have dotted names."""

PRESET = "what the other settings of the search start from: default, or paper (ViT-Slim to the letter)"


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One setting that a flag can give: its dotted name, type, default and meaning."""

    name: str
    hint: Any
    default: Any
    text: str
    section: str


def flags_of(cls: type[Any], section: str = "", base: Any = None) -> Iterator[Flag]:
    """Every setting of a dataclass, sections below it included, in the order of its fields."""
    texts, hints = attribute_texts(cls), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = f"{section}.{field.name}" if section else field.name
        default = getattr(base, field.name) if base is not None else default_of(field)
        hint, optional = unwrap(hints[field.name])
        if dataclasses.is_dataclass(hint):
            if optional:
                yield Flag(name=name, hint=None, default=default, text=texts.get(field.name, ""), section=name)
            below = default if dataclasses.is_dataclass(default) and not isinstance(default, type) else None
            assert isinstance(hint, type)
            yield from flags_of(hint, name, below)
        elif get_args(hint)[:1] != (Budget,):
            yield Flag(
                name=name, hint=hints[field.name], default=default, text=texts.get(field.name, ""), section=section
            )


def attribute_texts(cls: type[Any]) -> dict[str, str]:
    """What the ``Attributes:`` of a class's docstring say, as plain text in one line each."""
    block = re.search(r"\n\s*Attributes:\n(.*?)(\n\s*\n\s*\w+:\n|\Z)", cls.__doc__ or "", re.DOTALL)
    found: dict[str, str] = {}
    for entry in re.split(r"\n {8}(?=\w)", "\n" + block[1].rstrip()) if block else []:
        name, colon, text = entry.partition(":")
        if colon:
            found[name.strip()] = re.sub(r"\s+", " ", _for_flags(text)).strip()
    return found


def _for_flags(text: str) -> str:
    """A docstring's words as one types them: no markup, YAML's names of values."""
    for word, typed in (("`", ""), ('"', "'"), ("None", "null"), ("True", "true"), ("False", "false")):
        text = text.replace(word, typed)
    return text


def add_flags(parser: argparse.ArgumentParser, cls: type[Any], *, budgets: bool = False) -> None:
    """Give ``parser`` one flag per setting of ``cls``, grouped by section, and ``--budget`` where it has budgets."""
    if budgets:
        add_budget(parser)
    groups: dict[str, argparse._ArgumentGroup] = {"": parser.add_argument_group("settings")}
    for flag in flags_of(cls):
        if flag.section not in groups:
            groups[flag.section] = parser.add_argument_group(f"settings of {flag.section}")
        group = groups[flag.section]
        if flag.name == "search.kinds":
            _setting(group, "search.preset", "NAME", PRESET)
        _setting(group, flag.name, _metavar(flag.hint), _help(flag))


def _setting(group: argparse._ArgumentGroup, name: str, metavar: str, text: str) -> None:
    group.add_argument(f"--{name}", dest=name, default=argparse.SUPPRESS, metavar=metavar, help=text)


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the flag ``--budget``."""
    parser.add_argument(
        "--budget",
        dest=BUDGET,
        action="append",
        default=[],
        metavar="LIMITS",
        help="macs=0.5, params=0.5, or keep ratios: keep.mlp=0.7,keep.head_dim=0.7; once for each slim model",
    )


def given(arguments: argparse.Namespace, cls: type[Any]) -> dict[str, Any]:
    """The settings of ``cls`` that flags gave, as nested values."""
    hints = {flag.name: flag.hint for flag in flags_of(cls)} | {"search.preset": str}
    values: dict[str, Any] = {}
    for name, text in vars(arguments).items():
        if name in hints and text is not None:
            _put(values, name, parse_flag(hints[name], text, f"--{name}"), f"--{name}")
    if getattr(arguments, BUDGET, []):
        values["budgets"] = [parse_pairs(text, "--budget") for text in arguments.budget]
    return values


_OUTSIDE_BRACKETS = re.compile(r",(?![^\[\]{}]*[\]}])")
"""Commas between parts, not those of lists such as ``[1,2]``."""


def parse_flag(hint: Any, text: str, where: str) -> Any:
    """The value that the text of a flag stands for; its type is checked where the dataclass is made.

    >>> parse_flag(tuple[int, ...], "1,32", "--bench.batch_sizes")
    [1, 32]
    """
    if hint is None:
        if text.lower() not in ("null", "none"):
            raise ConfigError(f"{where} takes null only; its settings have flags of their own.")
        return None
    hint, optional = unwrap(hint)
    if optional and text.lower() in ("null", "none"):
        return None
    origin = get_origin(hint)
    if hint is str:
        return text
    if origin is tuple and not text.startswith("["):
        return [parse_flag(get_args(hint)[0], part, where) for part in text.split(",") if part]
    if origin is not None and origin is not tuple and not text.startswith("{"):
        return parse_pairs(text, where)
    return _yaml(text, where)


def model_arguments(text: str | None) -> dict[str, Any]:
    """What ``--model.arguments`` gives; nothing where it was not given."""
    return {} if text is None else parse_flag(dict[str, Any], text, "--model.arguments")


def parse_pairs(text: str, where: str) -> dict[str, Any]:
    """Read ``a=1,b.c=[2,3]`` as ``{"a": 1, "b": {"c": [2, 3]}}``.

    Raises:
        ConfigError: a part has no ``=``, or a name is given twice.
    """
    values: dict[str, Any] = {}
    for part in filter(None, _OUTSIDE_BRACKETS.split(text)):
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise ConfigError(f"{where} {text!r}: {part!r} is not name=value.")
        _put(values, name.strip(), _yaml(value, where), f"{where} {text!r}")
    return values


def _put(values: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Put ``value`` below the dotted ``name``.

    Raises:
        ConfigError: there is something already, there or above.
    """
    *path, last = name.split(".")
    for place, part in enumerate(path):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            above = ".".join(path[: place + 1])
            raise ConfigError(f"{where}: {above} is given as {_shown(values)}, so {name} has no effect; drop one.")
    if last in values:
        raise ConfigError(f"{where}: {name} is given twice, or beside settings of its own; drop one.")
    values[last] = value


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} {text!r} cannot be read; put it in quotes.") from error


def _metavar(hint: Any) -> str:
    hint, _ = unwrap(hint)
    origin = get_origin(hint)
    if hint is None:
        return "null"
    if origin is tuple:
        return "A,B"
    if origin is not None and issubclass(origin, Mapping):
        return "A=1,B=2"
    return {str: "TEXT", int: "N", float: "X", bool: "true|false"}[hint]


def _help(flag: Flag) -> str:
    text = flag.text.rstrip(".")
    if flag.default is dataclasses.MISSING:
        text += " (needed)"
    elif not dataclasses.is_dataclass(flag.default) and flag.default not in ("", {}, (), None):
        text += f" (default {_shown(flag.default)})"
    return text.replace("%", "%%")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, Mapping):
        return ",".join(f"{key}={entry:g}" for key, entry in value.items())
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
