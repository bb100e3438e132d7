"""Check that work is resumed with the settings with which it was started."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from slimming.errors import ConfigError

SHOWN = 20
"""Number of differing settings that a message lists; further ones are counted."""


def flatten(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return nested values by dotted name.

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
    """Return the settings that differ: dotted name -> both values, where a missing value is None.

    Args:
        before: nested settings.
        now: nested settings.
        free: settings that may differ, by the last part of the dotted name.
        free_sections: sections that may differ, by the first part of the dotted name.

    >>> differing({"lr": 0.1, "log": {"every": 1}}, {"lr": 0.2, "log": {"every": 5}}, free_sections=("log",))
    {'lr': (0.1, 0.2)}
    >>> differing({"budgets": [{"macs": 0.5}]}, {"budgets": [{"macs": 0.4}]})
    {'budgets[0].macs': (0.5, 0.4)}
    """
    old, new = _leaves(before), _leaves(now)
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
        and name.partition(".")[0].partition("[")[0] not in free_sections
        and name.rpartition(".")[2] not in free
    }


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Single values by dotted name, also those in lists of mappings: ``budgets[0].macs``."""
    if isinstance(value, Mapping) and (value or not name):
        parts = [(f"{name}.{key}" if name else key, entry) for key, entry in value.items()]
    elif isinstance(value, (list, tuple)) and any(isinstance(entry, (Mapping, list, tuple)) for entry in value):
        parts = [(f"{name}[{index}]", entry) for index, entry in enumerate(value)]
    else:
        return {name: list(value) if isinstance(value, tuple) else value}
    return {leaf: entry for place, part in parts for leaf, entry in _leaves(part, place).items()}


def check_same_settings(
    directory: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    free: Collection[str] = (),
    free_sections: Collection[str] = (),
    again: str | None = None,
) -> None:
    """Check that work in ``directory`` is resumed with the settings with which it was started.

    Args:
        directory: directory of the work, for the message.
        before: nested settings with which it was started.
        now: nested settings that were given now.
        free: see `differing`.
        free_sections: see `differing`.
        again: command that resumes with the same settings, for the message.

    Raises:
        ConfigError: settings differ; the message lists them with both values, one per line.
    """
    differences = differing(before, now, free=free, free_sections=free_sections)
    if not differences:
        return
    lines = [f"  {name}: {_short(old)} (now {_short(new)})" for name, (old, new) in differences.items()]
    if len(lines) > SHOWN:
        lines = [*lines[:SHOWN], f"  and {len(lines) - SHOWN} more"]
    listed = "\n".join(lines)
    raise ConfigError(
        f"{directory} was started with other settings:\n{listed}\nGo on with the same settings"
        f"{f' ({again})' if again else ''}, or give another directory."
    )


def _short(value: Any, length: int = 60) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= length else text[: length - 1] + "…"
