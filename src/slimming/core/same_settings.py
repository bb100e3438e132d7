"""Compare the settings that a directory was started with with those that it is to go on with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from slimming.errors import ConfigError

SHOWN = 5
"""Differing settings that a message names; the others are counted."""


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


def differing(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    free: Collection[str] = (),
    free_sections: Collection[str] = (),
) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, by dotted name, with both values; one that is missing counts as None.

    Args:
        before: nested settings.
        now: nested settings.
        free: settings that may differ, by the last part of their dotted names.
        free_sections: sections that may differ, by the first part.

    >>> differing({"lr": 0.1, "log": {"every": 1}}, {"lr": 0.2, "log": {"every": 5}}, free_sections=("log",))
    {'lr': (0.1, 0.2)}
    """
    old, new = flatten(before), flatten(now)
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
        and name.partition(".")[0] not in free_sections
        and name.rpartition(".")[2] not in free
    }


def check_same_settings(
    directory: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    free: Collection[str] = (),
    free_sections: Collection[str] = (),
    again: str | None = None,
) -> None:
    """Check that work in ``directory`` goes on with the settings that it was started with.

    Args:
        directory: where the work is, for the message.
        before: the nested settings that it was started with.
        now: those that were given now.
        free: see `differing`.
        free_sections: see `differing`.
        again: the command that goes on with the same settings, for the message.

    Raises:
        ConfigError: settings differ; the message names them with both values.
    """
    found = differing(before, now, free=free, free_sections=free_sections)
    if not found:
        return
    parts = [f"{name} {_short(old)} (now {_short(new)})" for name, (old, new) in list(found.items())[:SHOWN]]
    if len(found) > SHOWN:
        parts.append(f"{len(found) - SHOWN} more")
    raise ConfigError(
        f"{directory} was started with {', '.join(parts)}; go on with the same settings"
        f"{f' ({again})' if again else ''}, or give another directory."
    )


def _short(value: Any, length: int = 40) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= length else text[: length - 1] + "…"
