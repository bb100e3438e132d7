"""Command-line flags ``--section.key value`` for the fields of a dataclass, with help texts from its docstring."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from slimming.cli.settings import field_default, strip_optional
from slimming.core.records import shown
from slimming.core.same_settings import flatten
from slimming.core.yaml_text import load_yaml
from slimming.errors import ConfigError

BUDGETS = "budgets"
"""Name of the setting that the repeated flag ``--budget`` gives."""
PRESET = "search.preset"
"""The only flag without a field: the preset with the defaults of the other settings of the search."""


class Flag(NamedTuple):
    """A setting that can be given by a flag."""

    name: str
    """Dotted name."""
    hint: Any
    """Type; None for an optional section, which the flag can only set to null."""
    default: Any
    """Default value."""
    text: str
    """Help text."""


def flags_of(cls: type[Any], section: str = "", base: Any = None) -> Iterator[Flag]:
    """Yield the settings of a dataclass and of its nested sections, in the order of the fields."""
    texts, hints = attribute_docs(cls), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = f"{section}.{field.name}" if section else field.name
        default = field_default(field) if base is None else getattr(base, field.name)
        hint, optional = strip_optional(hints[field.name])
        if not dataclasses.is_dataclass(hint):
            if name != BUDGETS:
                yield Flag(name, hints[field.name], default, texts.get(field.name, ""))
            continue
        if optional:
            yield Flag(name, None, default, texts.get(field.name, ""))
        assert isinstance(hint, type)
        yield from flags_of(hint, name, default if isinstance(default, hint) else None)


def attribute_docs(cls: type[Any]) -> dict[str, str]:
    """Return the texts of ``Attributes:`` in the docstring of a class, each as one line of plain text."""
    block = re.search(r"\n\s*Attributes:\n(.*?)(\n\s*\n\s*\w+:\n|\Z)", cls.__doc__ or "", re.DOTALL)
    docs: dict[str, str] = {}
    for entry in re.split(r"\n {8}(?=\w)", "\n" + block[1].rstrip()) if block else []:
        name, colon, text = entry.partition(":")
        if colon:
            docs[name.strip()] = re.sub(r"\s+", " ", _for_flags(text)).strip()
    return docs


def _for_flags(text: str) -> str:
    """Remove the markup of a docstring, and write values as in YAML."""
    for word, typed in (("`", ""), ('"', "'"), ("None", "null"), ("True", "true"), ("False", "false")):
        text = text.replace(word, typed)
    return text


def add_flags(parser: argparse.ArgumentParser, cls: type[Any], section: str = "", default_text: str = "") -> None:
    """Add a flag to ``parser`` for each setting of ``cls``, grouped by section, and ``--budget`` if it has budgets.

    Args:
        parser: parser of a command.
        cls: the dataclass.
        section: dotted name of ``cls``.
        default_text: description of the defaults in the help texts; by default the defaults of ``cls`` are shown.
    """
    if any(field.name == BUDGETS for field in dataclasses.fields(cls)):
        add_common_options(parser, "--budget")
    title = f"settings of {section}" if section else "settings"
    groups: dict[str, argparse._ArgumentGroup] = {section: parser.add_argument_group(title)}
    for flag in flags_of(cls, section):
        parent = flag.name if flag.hint is None else flag.name.rpartition(".")[0]
        if parent not in groups:
            groups[parent] = parser.add_argument_group(f"settings of {parent}")
            if parent == "search":
                from slimming.searching.config import PRESETS

                text = f"preset with the defaults of the search: {', '.join(PRESETS)} (default: default)"
                _add(groups[parent], PRESET, str, text)
        _add(groups[parent], flag.name, flag.hint, f"{flag.text.rstrip('.')}{_default(flag, default_text)}")


def _add(group: argparse._ArgumentGroup, name: str, hint: Any, text: str) -> None:
    group.add_argument(
        f"--{name}",
        type=partial(parse_flag, hint, where=f"--{name}"),
        default=argparse.SUPPRESS,
        metavar=_metavar(hint),
        help=text.replace("%", "%%"),
    )


def add_common_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the options ``names``, which several commands share, to ``parser``."""
    common: dict[str, dict[str, Any]] = {
        "--device": {"metavar": "NAME", "help": "such as cpu or cuda:0 (default: a GPU if there is one)"},
        "--threads": {"type": int, "metavar": "N", "help": "number of CPU threads (default: chosen by PyTorch)"},
        "--json": {"action": "store_true", "help": "print JSON"},
        "--model.arguments": {
            "type": partial(parse_flag, dict[str, Any], where="--model.arguments"),
            "default": {},
            "metavar": "A=1,B=2",
            "help": "arguments of the model's constructor, such as timm's img_size",
        },
        "--budget": {
            "type": partial(parse_pairs, where="--budget"),
            "dest": BUDGETS,
            "action": "append",
            "default": [],
            "metavar": "LIMITS",
            "help": "macs=0.5, params=0.5, or keep ratios: keep.mlp=0.7,keep.head_dim=0.7; repeat for several models",
        },
    }
    for name in names:
        parser.add_argument(name, **common[name])


def flag_values(arguments: argparse.Namespace, cls: type[Any], section: str = "") -> dict[str, Any]:
    """Return the settings of ``cls`` that are given by flags, as nested values; ``section`` is the name of ``cls``."""
    names = {PRESET, *(flag.name for flag in flags_of(cls, section))}
    values: dict[str, Any] = {}
    for name, value in vars(arguments).items():
        if name in names or (name == BUDGETS and value):
            _set_nested(values, name, value, f"--{name}")
    return values.get(section, {}) if section else values


_OUTSIDE_BRACKETS = re.compile(r",(?![^\[\]{}]*[\]}])")
"""Commas between parts, but not within lists such as ``[1,2]``."""


def parse_flag(hint: Any, text: str, where: str) -> Any:
    """Parse the text of a flag; `slimming.cli.settings.build` checks the type of the value later.

    >>> parse_flag(tuple[int, ...], "1,32", "--bench.batch_sizes")
    [1, 32]
    """
    is_null = text.lower() in ("null", "none")
    if hint is None and not is_null:
        raise ConfigError(f"{where} takes null only; set its settings with their own flags.")
    hint, optional = strip_optional(hint)
    if is_null and (optional or hint is None):
        return None
    origin = get_origin(hint)
    if hint is str:
        return text
    if origin is tuple and not text.startswith("["):
        return [parse_flag(get_args(hint)[0], part, where) for part in text.split(",") if part]
    if origin not in (None, tuple) and not text.startswith("{"):
        return parse_pairs(text, where)
    return load_yaml(text, f"{where} {shown(text)}")


def parse_pairs(text: str, where: str) -> dict[str, Any]:
    """Parse ``a=1,b.c=[2,3]`` to ``{"a": 1, "b": {"c": [2, 3]}}``.

    Raises:
        ConfigError: a part has no ``=``, or a name is given twice.
    """
    values: dict[str, Any] = {}
    for part in filter(None, _OUTSIDE_BRACKETS.split(text)):
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise ConfigError(f"{where} {text!r}: {part!r} is not of the form name=value.")
        _set_nested(values, name.strip(), load_yaml(value, f"{where} {shown(text)}"), f"{where} {text!r}")
    return values


def _set_nested(values: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Set ``value`` at the dotted ``name`` in nested dicts.

    Raises:
        ConfigError: ``name`` or one of its parents has a value already.
    """
    *path, last = name.split(".")
    for index, part in enumerate(path):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            parent = ".".join(path[: index + 1])
            raise ConfigError(
                f"{where}: {parent} is given as {format_value(values)}, so {name} has no effect; drop one."
            )
    if last in values:
        raise ConfigError(f"{where}: {name} is given twice, or beside settings of its own; drop one.")
    values[last] = value


def _metavar(hint: Any) -> str:
    hint, _ = strip_optional(hint)
    single = {None: "null", str: "TEXT", int: "N", float: "X", bool: "true|false"}
    return single.get(hint) or ("A,B" if get_origin(hint) is tuple else "A=1,B=2")


def _default(flag: Flag, default_text: str) -> str:
    if default_text:
        return f" (default: {default_text})"
    if flag.default is dataclasses.MISSING:
        return " (required)"
    without = flag.hint is None or flag.default in ("", {}, (), None)
    return "" if without else f" (default {format_value(flag.default)})"


def format_value(value: Any) -> str:
    """Format a value as the text of a flag; several budgets are separated by spaces.

    >>> format_value((1, 32)), format_value({"keep": {"mlp": 0.5}}), format_value(None), format_value(True)
    ('1,32', 'keep.mlp=0.5', 'null', 'true')
    """
    if isinstance(value, Mapping):
        return ",".join(f"{name}={format_value(entry)}" for name, entry in flatten(value).items()) or "{}"
    if isinstance(value, (list, tuple)):
        return (" " if any(isinstance(entry, Mapping) for entry in value) else ",").join(
            map(format_value, value)
        ) or "[]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else str(value)
