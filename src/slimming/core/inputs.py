"""Check that work is resumed with the inputs with which it was started: weights, data and tables.

Settings name inputs by path. The file ``inputs.json`` in the directory of the work records what was there: for each
file its name, size, time of modification and a checksum, and checksums of models that were given as objects. It holds
no absolute path.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from slimming.core.limits import MIB
from slimming.core.records import FileKind
from slimming.errors import ConfigError, DataError

INPUTS_FILE = "inputs.json"
SAMPLED = 64 * MIB
"""Bytes of the images of an input that are read for checksums; a large file is read at its start and its end."""
END = MIB // 2
"""Bytes at the start and at the end of a large file that its checksum covers, if the file is one of many images."""
_LARGEST_LIST = 512 * MIB
_NAMED = 3
_checked: ContextVar[bool] = ContextVar("checked", default=False)

Files = Mapping[str, Path]
"""Files of one input by their name relative to the input, with ``/`` between folders."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of some work, each under a name that messages can use, such as ``"the training images"``.

    Attributes:
        weights: files of weights and tables, whose whole content counts.
        images: files of images, whose names and sizes count, and the content of a sample.
        checksums: checksums of inputs that are not files, such as models.
    """

    weights: Mapping[str, Files] = field(default_factory=dict)
    images: Mapping[str, Files] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    """What is known of a file: size, times of modification and of change of its entry in ns, and its checksum."""

    size: int
    modified: int
    changed: int
    sha256: str = ""


class FileList(msgspec.Struct, frozen=True):
    """The recorded files of one input: how many they are, their bytes, and the compressed list of them."""

    files: Annotated[int, msgspec.Meta(ge=0)]
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    listed: str

    def entries(self) -> dict[str, _Entry]:
        """The recorded files by name.

        Raises:
            ValueError: the list is damaged.
        """
        text = zlib.decompressobj().decompress(base64.b64decode(self.listed), _LARGEST_LIST).decode()
        found = {}
        for line in text.split("\n") if text else ():
            size, modified, changed, sha256, name = line.split(" ", 4)
            found[_decoded(name)] = _Entry(int(size), int(modified), int(changed), sha256.strip("-"))
        return found


class InputsContent(msgspec.Struct, frozen=True):
    """The content of ``inputs.json``."""

    checksums: dict[str, str]
    weights: dict[str, FileList]
    images: dict[str, FileList]


RECORD = FileKind(
    name="the record of the inputs of a run",
    schema=InputsContent,
    mend="Give another directory to start anew.",
    largest=256 * MIB,
)


def files_at(path: Path) -> dict[str, Path]:
    """Return the file at ``path``, or all files in this directory and below that are not hidden, sorted by name.

    Raises:
        DataError: a directory cannot be read.
    """
    if not path.is_dir():
        return {path.name: path} if path.exists() else {}
    return dict(sorted(_walk(str(path), "")))


def _walk(directory: str, prefix: str) -> Iterator[tuple[str, Path]]:
    try:
        with os.scandir(directory) as found:
            for entry in found:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    yield from _walk(entry.path, f"{prefix}{entry.name}/")
                elif entry.is_file():
                    yield f"{prefix}{entry.name}", Path(entry.path)
    except OSError as error:
        raise DataError(f"{directory} cannot be read ({error.strerror}); make it readable.") from error


def check_inputs(directory: Path, inputs: Inputs, *, fresh: bool = False) -> None:
    """Compare ``inputs`` with those of the earlier work in ``directory``, and record those that are new.

    A file with the recorded size and times is taken as unchanged. Where only times differ, checksums decide: of weights
    over the whole file, of images over a sample of up to 64 MiB. Inputs that the record does not name are added to it.
    Inside `inputs_are_checked`, nothing is done.

    Args:
        directory: directory of the work.
        inputs: the inputs of now.
        fresh: whether the work starts anew, so that these inputs are recorded without a comparison.

    Raises:
        ConfigError: an input has changed; the message names the files.
        CheckpointError: the record is damaged.
        DataError: a file cannot be read.
    """
    if _checked.get():
        return
    path = directory / INPUTS_FILE
    known = RECORD.read(path) if path.exists() else InputsContent({}, {}, {})
    before = InputsContent({}, {}, {}) if fresh else known
    lists = {
        kind: {
            name: _compared(directory, name, now, earlier.get(name), sampled=kind == "images")
            for name, now in given.items()
        }
        for kind, given, earlier in (
            ("weights", inputs.weights, before.weights),
            ("images", inputs.images, before.images),
        )
    }
    for name, checksum in inputs.checksums.items():
        if before.checksums.get(name, checksum) != checksum:
            raise _refusal(directory, f"{name} changed")
    content = InputsContent(
        checksums={**known.checksums, **inputs.checksums},
        weights={**known.weights, **lists["weights"]},
        images={**known.images, **lists["images"]},
    )
    if content != known:
        RECORD.write(path, msgspec.to_builtins(content))


def recorded_inputs(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the inputs of the work in ``directory`` for its results: name -> number of files, bytes and checksum.

    The checksum of several files is that of their names, sizes and recorded checksums, whatever their times.

    Raises:
        CheckpointError: the record is missing or damaged.
    """
    record = RECORD.read(directory / INPUTS_FILE)
    found: dict[str, dict[str, Any]] = {name: {"sha256": checksum} for name, checksum in record.checksums.items()}
    for name, files in (*record.weights.items(), *record.images.items()):
        entries = _entries(directory, files)
        whole = hashlib.sha256()
        for file, entry in sorted(entries.items()):
            whole.update(f"{_encoded(file)} {entry.size} {entry.sha256}\n".encode())
        only = next(iter(entries.values())).sha256 if len(entries) == 1 and name in record.weights else ""
        found[name] = {"files": files.files, "bytes": files.bytes, "sha256": only or whole.hexdigest()}
    return found


def _entries(directory: Path, files: FileList) -> dict[str, _Entry]:
    try:
        return files.entries()
    except (ValueError, zlib.error) as error:
        raise RECORD.error(f"{directory / INPUTS_FILE} is damaged: {error}. {RECORD.mend}") from error


@contextmanager
def inputs_are_checked() -> Iterator[None]:
    """In this block, the inputs are known to be those of the earlier work: `check_inputs` does nothing."""
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def _refusal(directory: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{directory} was started with other inputs: {what}. Put back what was there to go on, or give another "
        "directory to start anew."
    )


def _compared(directory: Path, name: str, files: Files, known: FileList | None, *, sampled: bool) -> FileList:
    """Return the list to record for the ``files`` of one input, after a comparison with the ``known`` list."""
    now = _stated(files)
    if known is None:
        chosen = _sample(now) if sampled else now
        return _listed({file: _with_checksum(entry, files[file], sampled) if file in chosen else entry
                        for file, entry in now.items()})  # fmt: skip
    before = _entries(directory, known)
    kinds = {
        "is missing": [file for file in before if file not in now],
        "is new": [file for file in now if file not in before],
        "has another size": [file for file in before if file in now and now[file].size != before[file].size],
    }
    same = [file for file in before if file in now and now[file].size == before[file].size]
    moved = [file for file in same if _times(now[file], sampled) != _times(before[file], sampled)]
    for file in moved:
        if before[file].sha256:
            now[file] = _with_checksum(now[file], files[file], sampled)
    kinds["has other content"] = [file for file in moved if before[file].sha256 != now[file].sha256]
    unknown = [file for file in moved if not before[file].sha256]
    if len(moved) < len(same):  # a copy has other times in all files; this is a change of some
        kinds["was modified later"] = unknown
    changes = {what: found for what, found in kinds.items() if found}
    if changes:
        raise _refusal(directory, f"{name} changed ({'; '.join(_words(what, each) for what, each in changes.items())})")
    if not moved:
        return known
    return _listed({file: dataclasses.replace(now[file], sha256=before[file].sha256) for file in before})


def _words(what: str, files: list[str]) -> str:
    shown = ", ".join(repr(file) for file in files[:_NAMED])
    rest = f" and {len(files) - _NAMED:,} more" if len(files) > _NAMED else ""
    return f"{shown}{rest} {what}" if len(files) == 1 else f"{shown}{rest}: each {what}"


def _times(entry: _Entry, sampled: bool) -> tuple[int, ...]:
    """The times that tell whether a file is the same; links and modes change the second, so it counts for weights."""
    return (entry.modified,) if sampled else (entry.modified, entry.changed)


def _stated(files: Files) -> dict[str, _Entry]:
    found = {}
    for name, path in files.items():
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); make it readable.") from error
        found[name] = _Entry(status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return found


def _sample(entries: Mapping[str, _Entry]) -> set[str]:
    """Names of files, evenly spread over all, whose checksums read about `SAMPLED` bytes."""
    names = list(entries)
    mean = sum(min(entry.size, 2 * END) for entry in entries.values()) / max(len(names), 1)
    count = len(names) if mean == 0 else min(len(names), max(1, int(SAMPLED / mean)), 4096)
    return {names[place * len(names) // count] for place in range(count)} if names else set()


def _with_checksum(entry: _Entry, path: Path, sampled: bool) -> _Entry:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            if sampled and entry.size > 2 * END:
                digest.update(file.read(END))
                file.seek(-END, os.SEEK_END)
                digest.update(file.read(END))
            else:
                for block in iter(lambda: file.read(MIB), b""):
                    digest.update(block)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); make it readable.") from error
    return dataclasses.replace(entry, sha256=digest.hexdigest())


def _listed(entries: Mapping[str, _Entry]) -> FileList:
    lines = "\n".join(
        f"{entry.size} {entry.modified} {entry.changed} {entry.sha256 or '-'} {_encoded(name)}"
        for name, entry in entries.items()
    )
    packed = base64.b64encode(zlib.compress(lines.encode(), 1)).decode()
    return FileList(len(entries), sum(entry.size for entry in entries.values()), packed)


def _encoded(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("latin-1").replace("%", "%25").replace("\n", "%0A")


def _decoded(text: str) -> str:
    return text.replace("%0A", "\n").replace("%25", "%").encode("latin-1").decode("utf-8", "surrogateescape")
