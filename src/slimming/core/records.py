"""Read the JSON files of slimming: each kind of file has one `FileKind`, through which it is read and written.

Reading bounds the size and the nesting of a file before anything is built from it, verifies its checksum, and checks
its content by a schema. The result is an object of the schema's type, so that its users need no checks of their own.
"""

from __future__ import annotations

import bisect
import contextlib
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

from slimming.core.files import FORMAT, atomic_json, digest, seal
from slimming.core.limits import DEEPEST, LARGEST_FILE, LARGEST_INTEGER, MOST_VALUES, megabytes
from slimming.errors import CheckpointError, SlimmingError

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class FileKind(Generic[T]):
    """A kind of JSON file: its schema, and what to do about a damaged file.

    Attributes:
        name: what the file is, with its article, for messages: "a plan".
        schema: type of the content without its format number and checksum, as `msgspec.convert` takes it.
        mend: sentence that says how to get an intact file.
        sealed: whether the file must contain its checksum, as `write` writes it.
        numbered: whether the file must contain a format number; False for files of other libraries.
        largest: largest size in bytes.
        error: class of the errors.

    >>> import tempfile
    >>> kind = FileKind(name="a list of seconds", schema=dict[str, float], mend="Measure again.")
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     kind.write(Path(directory, "seconds.json"), {"search": 2})
    ...     kind.read(Path(directory, "seconds.json"))
    {'search': 2.0}
    """

    name: str
    schema: type[T]
    mend: str = "Take an intact copy."
    sealed: bool = True
    numbered: bool = True
    largest: int = LARGEST_FILE
    error: type[SlimmingError] = CheckpointError

    def read(self, path: str | Path) -> T:
        """Read and check a file.

        Raises:
            SlimmingError: of class ``error``; the file is missing, damaged, too large or of a newer format. The message
                names the file and the entry.
        """
        return self.parse(self.read_bytes(path), str(path))

    def read_values(self, path: str | Path) -> Any:
        """Read and check a file like `read`, and return its content as plain values."""
        source = str(path)
        value = decode_json(self.read_bytes(path), source, mend=self.mend, error=self.error)
        self.check(value, source)
        return {key: entry for key, entry in value.items() if key not in ("format", "sha256")}

    def read_bytes(self, path: str | Path) -> bytes:
        """Return the content of a file that is not larger than ``largest``; see `read`."""
        return read_bytes(path, self.name, largest=self.largest, error=self.error)

    def parse(self, data: bytes | str, source: str) -> T:
        """Check the text of a file; see `read`.

        Args:
            data: the text.
            source: name of the file, for messages.
        """
        return self.check(decode_json(data, source, mend=self.mend, error=self.error), source)

    def check(self, value: Any, source: str) -> T:
        """Check the decoded content of a file; see `read`."""
        value = self.unsealed(value, source)
        if self.numbered:
            value = {key: entry for key, entry in value.items() if key != "format"}
        return converted(value, self.schema, source, mend=self.mend, error=self.error)

    def unsealed(self, value: Any, source: str) -> Any:
        """Return the decoded content of a file without its checksum, after a check of the checksum and the format."""
        if not self.numbered:
            return value
        version = value.get("format") if isinstance(value, dict) else None
        if type(version) is not int or version < 1:
            raise self.error(f"{source} is not {self.name} of slimming: it has no format number. {self.mend}")
        if version > FORMAT:
            raise self.error(
                f"{source} has format {version}, this version of slimming reads up to {FORMAT}. "
                "Upgrade: pip install -U slimming."
            )
        if "sha256" in value:
            rest = {key: entry for key, entry in value.items() if key != "sha256"}
            if value["sha256"] != digest(rest):
                raise self.error(f"{source} was changed after it was written: its checksum differs. {self.mend}")
            return rest
        if self.sealed:
            raise self.error(f"{source} has no checksum, so it is not {self.name} as slimming writes it. {self.mend}")
        return value

    def write(self, path: str | Path, value: Mapping[str, Any]) -> None:
        """Write ``value`` atomically, with the format number, and with its checksum if the kind is sealed.

        Raises:
            ConfigError: ``value`` contains what JSON cannot hold.
            OutputError: ``path`` is not writable, or the disk is full.
        """
        content = {"format": FORMAT, **value}
        atomic_json(Path(path), seal(content) if self.sealed else content)


def read_bytes(
    path: str | Path, name: str, *, largest: int = LARGEST_FILE, error: type[SlimmingError] = CheckpointError
) -> bytes:
    """Return the content of a regular file of limited size.

    Args:
        path: path of the file.
        name: what the file is, with its article, for messages.
        largest: largest size in bytes.
        error: class of the errors.

    Raises:
        SlimmingError: of class ``error``; the file is missing, unreadable, not a regular file, or too large.
    """
    try:
        # A pipe or a device has no end, so look before opening.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise error(f"{path} is not a file. Give the path of {name}.")
        with Path(path).open("rb") as file:
            data = file.read(largest + 1)
    except FileNotFoundError as missing:
        raise error(f"{path} does not exist. Give the path of {name}.") from missing
    except (OSError, ValueError) as failure:  # ValueError: a null character in the path
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"{path} cannot be read ({reason}). Give the path of {name}.") from failure
    if len(data) > largest:
        raise error(f"{path} is larger than {megabytes(largest)}, which is too large for {name}.")
    return data


def decode_json(
    data: bytes | str, source: str, *, mend: str = "Take an intact copy.", error: type[SlimmingError] = CheckpointError
) -> Any:
    """Decode JSON of limited nesting and number of values, without NaN, infinity and huge integers.

    Args:
        data: the text.
        source: name of the file, for messages.
        mend: sentence that says how to get an intact file.
        error: class of the errors.

    Raises:
        SlimmingError: of class ``error``; the text is not JSON or exceeds a limit.
    """
    try:
        data = data.encode("utf-8") if isinstance(data, str) else data
        depth, values = _extent(data)
        if depth > DEEPEST:
            raise error(f"{source} is nested {depth:,} levels deep, more than {DEEPEST}. {mend}")
        if values > MOST_VALUES:
            raise error(f"{source} holds {values:,} values, more than {MOST_VALUES:,}. {mend}")
        value = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as failure:
        raise error(f"{source} is truncated or not JSON ({failure}). {mend}") from failure
    if (large := _large_integer(value)) is not None:
        raise error(f"{source} holds the integer {shown(large)}, which is too large. {mend}")
    return value


def decode_json_lines(data: bytes, source: str, *, mend: str = "Take an intact copy.") -> list[dict[str, Any]]:
    """Decode a file with one JSON object per line; a last line that was cut off while it was written is left out.

    Args:
        data: the text.
        source: name of the file, for messages.
        mend: sentence that says how to get an intact file.

    Raises:
        CheckpointError: another line is not a JSON object, or exceeds a limit.
    """
    lines = []
    *whole, last = data.split(b"\n")
    for number, text in enumerate(filter(None, whole), 1):
        lines.append(converted(decode_json(text, f"{source}, line {number},", mend=mend), dict[str, Any], source))
    if last:
        with contextlib.suppress(CheckpointError):
            lines.append(converted(decode_json(last, source), dict[str, Any], source))
    return lines


def _extent(data: bytes) -> tuple[int, int]:
    """Depth of the nesting and number of values of JSON, read from its brackets and commas outside of strings."""
    # Without escapes, a quotation mark begins or ends a string.
    array = np.frombuffer(data.replace(b"\\\\", b"").replace(b'\\"', b""), dtype=np.uint8)
    outside = ~np.logical_xor.accumulate(array == ord('"')) if len(array) else np.zeros(0, bool)
    marks = array[outside]
    opened, closed = np.isin(marks, list(b"[{")), np.isin(marks, list(b"]}"))
    steps = opened[opened | closed].astype(np.int8) * 2 - 1
    depth = int(np.cumsum(steps, dtype=np.int32).max(initial=0))
    return depth, int(opened.sum()) + int((marks == ord(",")).sum())


def _large_integer(value: Any) -> int | None:
    """An integer in a nested value whose size is above the limit, or None."""
    if isinstance(value, int):
        return value if abs(value) > LARGEST_INTEGER else None
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for entry in entries if (found := _large_integer(entry)) is not None), None)


def converted(
    value: Any,
    schema: type[S],
    source: str,
    *,
    mend: str = "Take an intact copy.",
    error: type[SlimmingError] = CheckpointError,
) -> S:
    """Return the decoded content of a file as ``schema``.

    Args:
        value: decoded JSON.
        schema: a type, as `msgspec.convert` takes it.
        source: name of the file, for messages.
        mend: sentence that says how to get an intact file.
        error: class of the errors.

    Raises:
        SlimmingError: of class ``error``; an entry is missing or malformed. The message names it and what was found.
    """
    try:
        return msgspec.convert(value, schema, str_keys=True)
    except msgspec.ValidationError as failure:
        what, _, at = str(failure).partition(" - at ")
        place = _Place(value, schema, at.strip("`"))
        found = "" if ", got" in what or "missing" in what else f", found {shown(place.entry)}"
        raise error(f"{source} is damaged: {place}{what[0].lower()}{what[1:]}{found}. {mend}") from failure
    except SlimmingError as failure:  # of a dataclass of settings, which checks itself
        raise error(f"{source} is damaged: {failure} {mend}") from failure


class _Place:
    """The place of an entry that does not fit a schema: `entry` is its value, and the text names it for a message.

    msgspec writes ``$.groups[...].size`` without the keys of mappings. It stops at the first wrong entry, which is
    therefore found by conversions of fewer and fewer entries.
    """

    def __init__(self, value: Any, schema: Any, path: str) -> None:
        prefix, _, rest = path.rpartition("$")
        self.of_key = prefix.startswith("key")
        steps = re.findall(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]", rest)
        self.keys: list[Any] = []
        self.entry = value
        for name, index in [*steps, *([("", "...")] if self.of_key else [])]:
            key: Any = name or index
            if isinstance(self.entry, list):
                if not index.isdigit():  # of a set
                    break
                key = int(index)
            elif isinstance(self.entry, dict) and index == "...":
                key = self._first_wrong_key(value, schema, self.entry)
            if isinstance(self.entry, dict) and key not in self.entry:
                break
            self.keys.append(key)
            self.entry = self.entry[key]
        if self.of_key and self.keys:
            self.entry = self.keys[-1]

    def _first_wrong_key(self, value: Any, schema: Any, entries: dict[str, Any]) -> str:
        names = list(entries)

        def wrong(count: int) -> bool:
            fewer: Any = {name: entries[name] for name in names[:count]}
            try:
                msgspec.convert(_replaced(value, self.keys, fewer), schema, str_keys=True)
            except msgspec.ValidationError:
                return True
            return False

        return names[bisect.bisect_left(range(1, len(names)), True, key=wrong)]

    def __str__(self) -> str:
        steps = [f"[{key}]" if isinstance(key, int) else f".{key[:60]}" for key in self.keys]
        text = "".join(steps).removeprefix(".")
        return f"{'the name of ' if self.of_key else ''}{text}: " if text else ""


def _replaced(value: Any, keys: list[Any], entry: Any) -> Any:
    """A copy of a nested value with another entry at the place ``keys``."""
    if not keys:
        return entry
    copied = value.copy()
    copied[keys[0]] = _replaced(value[keys[0]], keys[1:], entry)
    return copied


def shown(value: Any, length: int = 60) -> str:
    """Return a short text of a value, for messages.

    >>> shown("a" * 100, 10)
    "'aaaaaaaa…"
    """
    try:
        text = repr(value)
    except ValueError:  # Python limits the digits of an integer
        text = "an integer of thousands of digits"
    return text if len(text) <= length else f"{text[: length - 1]}…"
