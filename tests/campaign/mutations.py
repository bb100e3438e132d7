"""Damage files: change their bytes, or the values of a JSON or YAML file, with a given source of randomness."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 10**30, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"),
    "", "x", "../x", "/etc/passwd", "hf-hub:a/b", "https://localhost/x", "\x1b[2J", "\u202e", "\ud800", "a\0b",
    "9" * 400,    "</script>", "|`[x](y)", [], {}, [[]], [None], {"": None}, {"a": {"a": {}}}, 10_000_000, -(10**7),
)  # fmt: skip
"""Values that replace an entry."""


def mutated_bytes(data: bytes, dice: random.Random) -> bytes:
    """Return ``data`` with one to three changes: bits flipped, parts cut, repeated, moved or overwritten."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        place = dice.randrange(len(changed) + 1)
        length = dice.choice((1, 1, 2, 8, 64, 1024))
        kind = dice.randrange(7)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            del changed[place : place + length]
        elif kind == 3:
            changed[place:place] = changed[place : place + length]
        elif kind == 4:
            changed[place : place + length] = bytes(len(changed[place : place + length]))
        elif kind == 5:
            changed[place:place] = dice.randbytes(length)
        else:
            changed[place:place] = dice.choice(
                (b"[" * 5000, b'{"a":' * 2000, b"1e400", b"NaN", b"\xff\xfe", b"&a [*a]")
            )
        if not changed:
            break
    return bytes(changed)


def mutated_value(value: Any, dice: random.Random) -> Any:
    """Return a copy of a nested value with one entry replaced, removed, added, renamed or nested deeply."""
    changed = copy.deepcopy(value)
    places = list(_places(changed))
    if not places:
        return dice.choice(ODD)
    holder, key = dice.choice(places)
    kind = dice.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[dice.choice(("x", "format", "", "a" * 300, "checkpoint_path", "\x1b[1m"))] = dice.choice(ODD)
    elif kind == 2 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == 3:
        holder[key] = nested(dice.choice((40, 70, 900)))
    elif kind == 4 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = dice.choice((-holder[key], holder[key] * 10**7, str(holder[key]), float(holder[key]) + 0.5))
    elif kind == 5:
        holder[key] = [holder[key]] * dice.choice((2, 3000))
    else:
        holder[key] = dice.choice(ODD)
    return changed


def nested(depth: int) -> Any:
    """Return a list in a list, ``depth`` times."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every entry of a nested value as its container and its key."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield value, key
        yield from _places(entry)
