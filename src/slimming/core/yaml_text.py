"""Read YAML of limited size: nesting and aliases are counted before anything is built."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from slimming.core.limits import DEEPEST, LARGEST_YAML, MOST_YAML_VALUES
from slimming.core.records import read_bytes
from slimming.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML loader that raises an error for duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names: set[Any] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in names:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        ConfigError: the file does not exist, is too large or too deeply nested, is not YAML, or does not contain a
            mapping.
    """
    value = load_yaml(read_bytes(path, "a YAML file of settings", largest=LARGEST_YAML, error=ConfigError), str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no settings; write lines such as 'data: {{source: DIR}}'.")
    return value


def load_yaml(text: str | bytes, source: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: one YAML document.
        source: name of the file or option, for messages.

    Raises:
        ConfigError: the text is not YAML, or exceeds a limit.
    """
    try:
        _check_extent(text, source)
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{source}{where} is not YAML: {reason}. Correct it.") from error
    # Of a date that does not exist, a number without digits, or text that is not UTF-8.
    except (ValueError, LookupError, ArithmeticError) as error:
        raise ConfigError(f"{source} holds a value that cannot be read ({error}). Put text in quotes.") from error


def _check_extent(text: str | bytes, source: str) -> None:
    """Check the nesting of a YAML text, and the number of its values after its aliases are expanded.

    Raises:
        ConfigError: a limit is exceeded, an alias contains itself, or a tag asks for a type.
    """
    sizes: dict[str, int] = {}  # of the values with an anchor
    opened: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if getattr(event, "tag", None) not in (None, "!"):
            raise ConfigError(f"{source} holds the tag {event.tag!r}; write plain values without tags.")
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
            sizes.pop(event.anchor or "", None)
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise ConfigError(f"{source} holds the alias *{event.anchor} inside of its own value; write it out.")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor is not None:
                sizes[event.anchor] = 1
            total += 1
        if len(opened) > DEEPEST:
            raise ConfigError(f"{source} is nested more than {DEEPEST} levels deep. Write it flatter.")
        if total > MOST_YAML_VALUES:
            raise ConfigError(f"{source} holds more than {MOST_YAML_VALUES:,} values with its aliases. Shorten it.")
