"""Odd values for every setting of the commands."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from slimming.cli.entry import main
from slimming.cli.settings import strip_optional
from slimming.retraining.config import DistilConfig
from slimming.runs.config import RunConfig

from .tally import Tally

ODD = (
    "null true false 0 -1 1 2 0.5 -0.0 1e-320 1e308 1e400 -.inf .nan 9223372036854775808 1_000 0x10 010 1:30 "
    "2026-11-30 ~ '' ' ' 'a b' '../..' /dev/null 'C:\\nul' '\\0' \"\\e[31m\" \"\\ud800\" \"\\u202e\" 💥 [] [[]] [null] "
    "[1, 1] [0.5, x] {} {a: 1} {a: {b: {}}} {'': 0} {1: 2} !!binary aGk= '${HOME}' '%s%n' '{0}' '<script>' '`id`' "
    "99999999999999999999999999999999 1e-400 on No NaN 'nan' '1.0' '1' .5 1. +1 '+1' -.5"
)
"""Values as YAML, separated by blanks that are not inside quotes or brackets."""


def odd_values() -> list[str]:
    """Return the values of `ODD`."""
    values, current, depth, quote = [], "", 0, ""
    for letter in ODD + " ":
        if letter == " " and not depth and not quote:
            values.append(current)
            current = ""
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(letter, 0) if not quote else 0
        current += letter
    return values


def settings(cls: type[Any] = RunConfig, where: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the places of all settings and sections."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield (*where, field.name)
        hint, _ = strip_optional(hints[field.name])
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from settings(hint, (*where, field.name))


def attack(tally: Tally, root: Path, share: float, seed: int) -> None:
    """Give a share of all pairs of a setting and an odd value to ``slimming run --print-config``.

    It must print settings that it reads back to the same ones, or end with one sentence.
    """
    pairs = [(place, value) for place in settings() for value in odd_values()]
    assert any(place[:1] == ("distil",) and len(place) > 1 for place, _ in pairs), DistilConfig
    pairs = random.Random(seed).sample(pairs, round(share * len(pairs)))
    for place, value in pairs:
        text = "model: {name: test_vit}\ndata: {source: photos}\nbudgets: [{macs: 0.5}]\n"
        values: Any = yaml.safe_load(text)
        (root / "odd.yaml").write_text(_with(values, place, value), "utf-8", errors="surrogatepass")
        fault = _fault(root / "odd.yaml", root / "again.yaml")
        tally.add(None if fault is None else f"{'.'.join(place)}: {value}: {fault}")


def _with(values: dict[str, Any], place: tuple[str, ...], value: str) -> str:
    inner: Any = values
    for name in place[:-1]:
        inner = inner.setdefault(name, {})
    inner[place[-1]] = "@odd@"
    return yaml.safe_dump(values, default_flow_style=True, width=10**6).replace("'@odd@'", value)


def _fault(path: Path, again: Path) -> str | None:
    code, output, errors, seconds = _print_config(path)
    if seconds > 5:
        return f"took {seconds:.0f} s"
    if code == 2:
        sentence = errors.startswith("slimming: error: ") and errors.rstrip("\n").isprintable()
        return None if sentence else f"no sentence of one line: {errors[-300:]!r}"
    if code != 0:
        return f"ended with {code}: {errors[-300:]}"
    again.write_text(output, "utf-8")
    code, second, errors, _ = _print_config(again)
    return None if second == output else f"printed settings are not read back the same ({code}): {errors[-300:]}"


def _print_config(path: Path) -> tuple[int, str, str, float]:
    output, errors = io.StringIO(), io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(["run", str(path), "--print-config"])
    return code, output.getvalue(), errors.getvalue(), time.monotonic() - began
