"""Check the types of settings and arguments, and convert scalars of NumPy and PyTorch to plain numbers."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from slimming.core.limits import LARGEST_INTEGER
from slimming.core.records import shown
from slimming.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")
SCALARS = {str: "text (put it in quotes)", int: "a whole number", float: "a number", bool: "true or false"}
"""Types of single values and their descriptions in messages."""
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes of a name and of a path on Linux."""


def plain_number(value: Any) -> Any:
    """Return a scalar of NumPy or PyTorch, or another number, as int, float or bool; other values as they are.

    >>> import numpy as np
    >>> plain_number(np.float32(0.5)), plain_number(np.int64(3)), plain_number("3")
    (0.5, 3, '3')
    """
    if type(value) in (int, float, bool, str) or value is None:
        return value
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        value = item()
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def scalar(kind: type, value: Any, name: str) -> Any:
    """Return ``value`` as ``kind``, one of `SCALARS`.

    Raises:
        ConfigError: it is of another type, not finite, or so large that it is not exact.
    """
    number: Any = plain_number(value)
    if kind is float and type(number) is int and abs(number) <= LARGEST_INTEGER:
        number = float(number)
    fits = type(number) is kind
    if fits and kind in (int, float):
        fits = math.isfinite(number) and (kind is float or abs(number) <= LARGEST_INTEGER)
    if isinstance(number, str):
        check_text(number, name)
    if not fits:
        raise ConfigError(f"{name} is {shown(value)}; it must be {SCALARS[kind]}.")
    return number


def check_text(text: str, name: str) -> None:
    """Check that a text can be written to a file, and be a part of a path.

    Raises:
        ConfigError: it contains a null character or is not UTF-8.
    """
    if "\0" in text:
        raise ConfigError(f"{name} contains a null character; remove it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name} is {text!a}, which is not UTF-8; rename it.") from error


def check_path(path: str | os.PathLike[str], name: str) -> None:
    """Check that a path can exist.

    Raises:
        ConfigError: it contains a null character, or it or one of its names is too long.
    """
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise ConfigError(f"{name} contains a null character; remove it.")
    if len(raw) > LONGEST_PATH or any(len(part) > LONGEST_NAME for part in raw.split(b"/")):
        raise ConfigError(
            f"{name} is {shown(os.fspath(path))}, which is too long for a path: {LONGEST_PATH:,} bytes, and "
            f"{LONGEST_NAME} for each name. Give a shorter one."
        )


def check_fields(settings: Any) -> None:
    """Check the fields of a frozen dataclass by their annotations, and replace scalars by plain numbers.

    Raises:
        ConfigError: a field has another type.
    """
    for name, hint in _hints(type(settings)).items():
        value = getattr(settings, name)
        fitting = _fitting(hint, value, f"{type(settings).__name__}.{name}")
        if fitting is not value:
            object.__setattr__(settings, name, fitting)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def checked_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of a public function by their annotations before it is called.

    Numbers, texts, paths and the classes of this package and of PyTorch are checked; of collections, only that they are
    not a scalar.

    >>> @checked_arguments
    ... def double(size: int) -> int:
    ...     return 2 * size
    >>> double(True)
    Traceback (most recent call last):
    slimming.errors.ConfigError: size is True; it must be a whole number.
    """
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        return get_type_hints(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            if name in hints() and kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                bound.arguments[name] = _fitting(hints()[name], value, name)
        return function(*bound.args, **bound.kwargs)

    return checked


def _fitting(hint: Any, value: Any, name: str) -> Any:
    """``value`` as the type ``hint``, as far as it is checked.

    Raises:
        ConfigError: it has another type.
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if Path in options and isinstance(value, (str, os.PathLike)):
        check_path(value, name)
        return value
    for option in options:
        if option is None or option is type(None):
            if value is None:
                return value
        elif option in SCALARS:
            number = plain_number(value)
            if type(number) is option or (option is float and type(number) is int):
                scalar(option, value, name)
                return number
        elif _fits_class(option, value):
            return _entries(option, value, name)
    wanted = " or ".join(_described(option) for option in options)
    raise ConfigError(f"{name} is {shown(value)}; it must be {wanted}.")


def _fits_class(option: Any, value: Any) -> bool:
    origin = get_origin(option) or option
    if origin is Any or origin is object or not isinstance(origin, type):  # Any is a class from Python 3.11 on
        return True  # Literal and the like, too
    if getattr(origin, "_is_protocol", False):
        return True
    if issubclass(origin, (list, tuple)) or origin.__module__ == "collections.abc":
        scalars = (bool, numbers.Number, type(None))
        return isinstance(value, Mapping) if origin is Mapping else not isinstance(value, scalars)
    return isinstance(value, origin)


def _entries(option: Any, value: Any, name: str) -> Any:
    """The entries of a tuple or mapping of scalars in a field, checked and as plain numbers."""
    args = get_args(option)
    if get_origin(option) is tuple and len(args) == 2 and args[1] is Ellipsis and isinstance(value, (list, tuple)):
        entries = tuple(_fitting(args[0], entry, f"{name}[{index}]") for index, entry in enumerate(value))
        return value if type(value) is tuple and all(a is b for a, b in zip(entries, value, strict=True)) else entries
    if get_origin(option) is Mapping and len(args) == 2 and args[1] in SCALARS:
        entries = {key: _fitting(args[1], entry, f"{name}[{key!r}]") for key, entry in value.items()}
        return value if all(entries[key] is value[key] for key in value) else entries
    return value


def _described(option: Any) -> str:
    if option in SCALARS:
        return SCALARS[option].partition(" (")[0]
    if option is None or option is type(None):
        return "None"
    origin = get_origin(option) or option
    if origin is Path:
        return "a path"
    name = getattr(origin, "__name__", str(origin))
    return f"a {name}"
