"""Check that work is resumed with the settings with which it was started."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from slimming.errors import ConfigError

SHOWN = 5
"""Number of differing settings that a message names; further ones are counted."""


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
    """Check that work in ``directory`` is resumed with the settings with which it was started.

    Args:
        directory: directory of the work, for the message.
        before: nested settings with which it was started.
        now: nested settings that were given now.
        free: see `differing`.
        free_sections: see `differing`.
        again: command that resumes with the same settings, for the message.

    Raises:
        ConfigError: settings differ; the message names them with both values.
    """
    differences = differing(before, now, free=free, free_sections=free_sections)
    if not differences:
        return
    parts = [f"{name} {_short(old)} (now {_short(new)})" for name, (old, new) in list(differences.items())[:SHOWN]]
    if len(differences) > SHOWN:
        parts.append(f"{len(differences) - SHOWN} more")
    raise ConfigError(
        f"{directory} was started with {', '.join(parts)}; go on with the same settings"
        f"{f' ({again})' if again else ''}, or give another directory."
    )


def _short(value: Any, length: int = 40) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= length else text[: length - 1] + "…"
