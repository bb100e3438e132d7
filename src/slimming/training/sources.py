"""Sources of images: records by index from class folders, Parquet files and tar shards, without decoding."""

from __future__ import annotations

import bisect
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from PIL import Image

from slimming.core.limits import LARGEST_LIST
from slimming.core.records import converted, decode_json, read_bytes
from slimming.errors import DataError, nearest
from slimming.training.image_files import (
    MAX_BYTES,
    PassedOver,
    class_folders,
    find_images,
    image_suffixes,
    is_hidden,
)
from slimming.training.labels import integer_label, integer_labels

MAX_METADATA = 2**24
"""Largest ``.json`` file of a sample, in bytes."""


@dataclass(frozen=True)
class Record:
    """A stored image: its encoded bytes, path or decoded image; its label; and a name for messages."""

    image: bytes | Path | Image.Image
    label: int
    name: str


class Source(Protocol):
    """Records by index.

    Attributes:
        labels: label of every record, int64; may be replaced.
        classes: names of the classes; empty if they are unknown.
    """

    labels: np.ndarray
    classes: tuple[str, ...]

    def read(self, index: int) -> Record:
        """Return the record at ``index``."""
        ...


class FolderSource:
    """Class folders ``root/CLASS/**/image.jpg``, with the classes in alphabetical order.

    Raises:
        DataError: there is no class folder, one is empty, or its name is not UTF-8.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        passed = PassedOver(root)
        folders = class_folders(root, passed)
        self.classes = tuple(folder.name for folder in folders)
        for name in self.classes:
            if name != name.encode("utf-8", "replace").decode():
                raise DataError(f"The name of the class folder {name!a} in {root} is not UTF-8; rename this folder.")
        self.paths: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            paths = find_images(folder, root, passed)
            if not paths:
                raise DataError(f"The class folder {folder} holds no images; add some or remove the folder.")
            self.paths += paths
            labels += [label] * len(paths)
        passed.log()
        self.labels = np.asarray(labels, dtype=np.int64)

    def read(self, index: int) -> Record:
        """Return the record at ``index``."""
        path = self.paths[index]
        return Record(path, int(self.labels[index]), str(path))


class UnlabelledFolderSource:
    """All images in a folder and its subfolders, without labels.

    Raises:
        DataError: there are no images.
    """

    classes = ()

    def __init__(self, root: Path) -> None:
        self.root = root
        passed = PassedOver(root)
        self.paths = find_images(root, root, passed)
        if not self.paths:
            raise DataError(f"{root} holds no images, .parquet files or .tar shards; give a folder that does.")
        passed.log()
        self.labels = np.zeros(len(self.paths), dtype=np.int64)

    def read(self, index: int) -> Record:
        """Return the record at ``index``, with label 0."""
        return Record(self.paths[index], 0, str(self.paths[index]))


class ParquetSource:
    """Parquet files in the Hugging Face image layout: a column of {bytes, path} and a column of integer labels.

    The encoded images are held in memory and decoded when they are read. If ``label_key`` is None, all labels are 0.

    Raises:
        DataError: a file is not a readable Parquet file, has no rows, or lacks a column of the expected type.
    """

    def __init__(self, files: Sequence[Path], image_key: str, label_key: str | None) -> None:
        import pyarrow
        import pyarrow.parquet

        tables = []
        columns = [image_key] if label_key is None else [image_key, label_key]
        for file in files:
            try:
                schema = pyarrow.parquet.read_schema(file)
                require_columns(file, schema.names, columns)
                tables.append(pyarrow.parquet.read_table(file, columns=columns))
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{file} is not a readable Parquet file ({error}); it may be truncated.") from error
        if not sum(table.num_rows for table in tables):
            raise DataError(f"{files[0]} holds no rows; give a file with images.")
        images = pyarrow.chunked_array([chunk for table in tables for chunk in table[image_key].chunks])
        if not (pyarrow.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0):
            raise DataError(
                f"Column {image_key!r} of {files[0]} is {images.type}, not images as {{bytes, path}}; set image_key."
            )
        self.images = images
        self.labels = np.zeros(len(images), np.int64)
        self.classes: tuple[str, ...] = ()
        if label_key is not None:
            columns = [table[label_key].to_numpy() for table in tables]
            self.labels = np.concatenate([integer_labels(part, label_key, files[0]) for part in columns])
            self.classes = _class_names(tables[0].schema.metadata, label_key, files[0]) or _listed_classes(
                files[0].parent
            )
        self.ends = np.cumsum([table.num_rows for table in tables]).tolist()
        self.files = [str(file) for file in files]

    def read(self, index: int) -> Record:
        """Return the record at ``index``."""
        value = self.images[index].as_py()
        part = bisect.bisect_right(self.ends, index)
        row = index - (self.ends[part - 1] if part else 0)
        name = f"{self.files[part]} row {row}" + (f" ({value['path']})" if value and value.get("path") else "")
        return Record((value and value["bytes"]) or b"", int(self.labels[index]), name)


def require_columns(file: object, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Check that a table has the columns ``wanted``.

    Raises:
        DataError: a column is missing.
    """
    for key in wanted:
        if key not in names:
            raise DataError(
                f"{file} has no column {key!r}, only {', '.join(map(repr, names))}; "
                f"set image_key and label_key.{nearest(key, names)}"
            )


def _class_names(metadata: dict[bytes, bytes] | None, label_key: str, file: Path) -> tuple[str, ...]:
    """Return the class names that the ``datasets`` library stores in a Parquet schema; empty if there are none."""
    stored = (metadata or {}).get(b"huggingface")
    if stored is None:
        return ()
    mend = "Write the Parquet file again."
    value = decode_json(stored, f"The metadata of {file}", mend=mend, error=DataError)
    schema = converted(value, _Metadata, f"The metadata of {file}", mend=mend, error=DataError)
    feature = schema.info.features.get(label_key)
    names = feature.get("names") if isinstance(feature, dict) else None
    return () if names is None else converted(names, tuple[str, ...], f"The class names in {file}", error=DataError)


class _Info(msgspec.Struct, frozen=True):
    features: dict[str, Any] = {}


class _Metadata(msgspec.Struct, frozen=True):
    """What the ``datasets`` library stores in the schema of a Parquet file."""

    info: _Info = _Info()


@dataclass(frozen=True)
class _Member:
    """Position of an image in a shard."""

    shard: int
    offset: int
    size: int
    name: str


class TarSource:
    """WebDataset tar shards: files with the same name up to the first dot form a sample.

    A sample consists of an image (``.jpg``, ``.png``, ...) and its class number, in a ``.cls`` file or as ``label`` in
    a ``.json`` file. The headers of the shards are read once, which gives random access without a shuffle buffer. The
    names of the classes are read from a file ``classes.txt`` in the same directory, one per line.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = list(shards)
        self.members: list[_Member] = []
        labels: list[int] = []
        passed = PassedOver(self.shards[0].parent)
        for number, shard in enumerate(self.shards):
            for member, label in _scan(number, shard, passed):
                self.members.append(member)
                labels.append(label)
        passed.log()
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = _listed_classes(self.shards[0].parent)

    def read(self, index: int) -> Record:
        """Return the record at ``index``."""
        member = self.members[index]
        with open(self.shards[member.shard], "rb") as file:
            file.seek(member.offset)
            data = file.read(min(member.size, MAX_BYTES + 1))  # `decode` refuses more than MAX_BYTES
        return Record(data, int(self.labels[index]), f"{self.shards[member.shard]}:{member.name}")


def _listed_classes(folder: Path) -> tuple[str, ...]:
    """Return the lines of ``classes.txt``; empty if there is no such file."""
    names = folder / "classes.txt"
    if not names.exists():
        return ()
    try:
        text = read_bytes(names, "a list of class names", largest=LARGEST_LIST, error=DataError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{names} is not UTF-8 ({error}). Write one class name per line as UTF-8.") from error
    lines = text.split("\n")
    return tuple(line.strip() for line in lines if line.strip())


def _scan(number: int, shard: Path, passed: PassedOver) -> list[tuple[_Member, int]]:
    """Return the images of one shard with their labels.

    Raises:
        DataError: the file is not a tar file or is truncated, or a sample lacks its image or label or has two.
    """
    images: dict[str, _Member] = {}
    labels: dict[str, dict[str, tuple[object, str]]] = {".cls": {}, ".json": {}}
    try:
        with tarfile.open(shard, "r:") as tar:
            for entry in tar:
                key, suffix = _split_name(entry.name)
                name = f"{shard}:{entry.name}"
                if is_hidden(entry.name):
                    passed.add("hidden", name)
                elif entry.isfile() and suffix in image_suffixes():
                    _add(images, key, _Member(number, entry.offset_data, entry.size, entry.name), shard)
                elif entry.isfile() and suffix in labels:
                    content = tar.extractfile(entry)
                    data = content.read(MAX_METADATA + 1) if content else b""
                    _add(labels[suffix], key, (data if suffix == ".cls" else _json_label(data), name), shard)
                elif not entry.isdir():
                    passed.add("neither images nor labels", name)
        if shard.stat().st_size < max((m.offset + m.size for m in images.values()), default=0):
            raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{shard} cannot be read as a WebDataset shard ({error}); it may be truncated or compressed."
        ) from error
    labelled = {**labels[".json"], **labels[".cls"]}  # a .cls file takes precedence
    for key in images.keys() ^ labelled.keys():
        raise DataError(f"Sample {key.strip('/')!r} of {shard} has no {'label' if key in images else 'image'}.")
    if not images:
        raise DataError(f"{shard} holds no samples; a sample is an image with a label in a .cls or .json file.")
    return [(member, integer_label(*labelled[key])) for key, member in images.items()]


def _split_name(name: str) -> tuple[str, str]:
    """Return the sample to which a member of a shard belongs, and its extension in lower case."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}", f".{extension.lower()}"


def _add(members: dict[str, Any], key: str, member: object, shard: Path) -> None:
    """Add the image or the label of a sample.

    Raises:
        DataError: the sample has one already.
    """
    if key in members:
        raise DataError(f"Sample {key.strip('/')!r} of {shard} is stored twice; the first dot ends the sample's name.")
    members[key] = member


def _json_label(data: bytes) -> object:
    """Return the field ``label`` of an object in JSON; None if there is no such field or no such object."""
    try:
        value = json.loads(data) if len(data) <= MAX_METADATA else None
    except (ValueError, RecursionError):
        return None
    return value.get("label") if isinstance(value, dict) else None
