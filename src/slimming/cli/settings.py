"""Create frozen dataclasses from nested values of a YAML file or of flags.

The error for an unknown key suggests the closest one, and the error for a wrong type names the setting.
`docs/design.md` compares this reader with jsonargparse and tyro.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from slimming.core.argument_types import SCALARS, scalar
from slimming.core.records import shown
from slimming.errors import BudgetError, ConfigError, nearest

T = TypeVar("T")


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` updated with the values of ``override``, recursively for nested mappings.

    >>> merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
    {'a': {'b': 1, 'c': 3}}
    """
    result = dict(base)
    for key, value in override.items():
        current = result.get(key)
        nested = isinstance(current, Mapping) and isinstance(value, Mapping)
        result[key] = merge(current, value) if nested else value  # pyright: ignore[reportArgumentType]
    return result


def build(cls: type[T], values: Mapping[str, Any], where: str = "", base: T | None = None) -> T:
    """Create a dataclass from nested values.

    Args:
        cls: the dataclass.
        values: values by name of the field.
        where: dotted name of the section, for messages.
        base: instance with the defaults of the fields that are not given; by default those of ``cls``.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type.
    """
    dot = f"{where}." if where else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    hints, arguments = get_type_hints(cls), {}
    for key in values:
        if key not in fields:
            hint = nearest(str(key), fields, dot) or f" {where or 'The file'} takes {', '.join(fields)}."
            raise ConfigError(f"There is no setting {dot}{key}.{hint}")
    for name, field in fields.items():
        value = field_default(field) if base is None else getattr(base, name)
        if name in values or (value is dataclasses.MISSING and dataclasses.is_dataclass(hints[name])):
            value = convert(hints[name], values.get(name, {}), f"{dot}{name}", value)
        arguments[name] = value
        if value is dataclasses.MISSING:
            raise ConfigError(f"{dot}{name} is missing; give it in the config file or as a flag.")
    try:
        return cls(**arguments)
    except (ConfigError, BudgetError) as error:
        raise type(error)(f"{where}: {error}" if where else str(error)) from error


def field_default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field, or ``dataclasses.MISSING``."""
    has_factory = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if has_factory else field.default  # pyright: ignore[reportCallIssue]


def strip_optional(hint: Any) -> tuple[Any, bool]:
    """Return a type without ``None``, and whether it was optional."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [arg for arg in get_args(hint) if arg is not type(None)]
        return rest[0], len(rest) < len(get_args(hint))
    return hint, False


def convert(hint: Any, value: Any, where: str, base: Any = None) -> Any:
    """Convert ``value`` to the type ``hint``; values missing in sections and mappings are taken from ``base``.

    Raises:
        ConfigError: the value has another type.
    """
    hint, optional = strip_optional(hint)
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or (value is None and optional):
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong_type(value, where, "a list, such as [a, b]")
        return tuple(convert(args[0], entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        return build(hint, _mapping(value, where), where, base if dataclasses.is_dataclass(base) else None)
    if hint not in SCALARS:
        merged = merge(base if isinstance(base, Mapping) else {}, _mapping(value, where))
        return {str(key): convert(args[1], entry, f"{where}.{key}") for key, entry in merged.items()}
    if hint is float and isinstance(value, str):  # YAML reads 1e-4 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    kind: Any = hint
    return scalar(kind, value, where)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong_type(value, where, "a mapping of names to values")
    return value


def _wrong_type(value: Any, where: str, wanted: str) -> ConfigError:
    return ConfigError(f"{where} is {shown(value)}; it must be {wanted}.")
