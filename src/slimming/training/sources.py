"""Sources of images: records by index from class folders, Parquet files and tar shards, without decoding."""

from __future__ import annotations

import bisect
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from slimming.errors import DataError, nearest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


@dataclass(frozen=True)
class Record:
    """A stored image: its encoded bytes, path or decoded image; its label; and a name for messages."""

    image: bytes | Path | Image.Image
    label: int
    name: str


class Source(Protocol):
    """Records by index.

    Attributes:
        labels: label of every record, int64.
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
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise DataError(f"{root} holds no class folders, .parquet files or .tar shards; give a folder that does.")
        self.classes = tuple(folder.name for folder in folders)
        for name in self.classes:
            if name != name.encode("utf-8", "replace").decode():
                raise DataError(f"The name of the class folder {name!a} in {root} is not UTF-8; rename this folder.")
        self.paths: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            if not paths:
                raise DataError(f"The class folder {folder} holds no images; add some or remove the folder.")
            self.paths += paths
            labels += [label] * len(paths)
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
        self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not self.paths:
            raise DataError(f"{root} holds no images, .parquet files or .tar shards; give a folder that does.")
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
        labels = [np.zeros(len(t), np.int64) if label_key is None else t[label_key].to_numpy() for t in tables]
        if not all(np.issubdtype(part.dtype, np.integer) for part in labels):
            raise DataError(
                f"Column {label_key!r} of {files[0]} holds {labels[0].dtype}, not integers without missing values; "
                "set label_key."
            )
        self.images = images
        self.labels = np.concatenate(labels).astype(np.int64)
        self.classes = () if label_key is None else _class_names(tables[0].schema.metadata, label_key)
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


def _class_names(metadata: dict[bytes, bytes] | None, label_key: str) -> tuple[str, ...]:
    """Return the class names that the ``datasets`` library stores in a Parquet schema; empty if there are none."""
    try:
        stored = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        feature = stored.get("info", {}).get("features", {}).get(label_key, {})
        return tuple(str(name) for name in feature.get("names") or ())
    except (ValueError, AttributeError):
        return ()


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
        for number, shard in enumerate(self.shards):
            for member, label in _scan(number, shard):
                self.members.append(member)
                labels.append(label)
        self.labels = np.asarray(labels, dtype=np.int64)
        names = self.shards[0].parent / "classes.txt"
        self.classes = tuple(names.read_text("utf-8").split("\n")) if names.is_file() else ()
        self.classes = tuple(name.strip() for name in self.classes if name.strip())

    def read(self, index: int) -> Record:
        """Return the record at ``index``."""
        member = self.members[index]
        with open(self.shards[member.shard], "rb") as file:
            file.seek(member.offset)
            data = file.read(member.size)
        return Record(data, int(self.labels[index]), f"{self.shards[member.shard]}:{member.name}")


def _scan(number: int, shard: Path) -> list[tuple[_Member, int]]:
    """Return the images of one shard with their labels.

    Raises:
        DataError: the file is not a tar file or is truncated, or a sample lacks its image or label.
    """
    images: dict[str, _Member] = {}
    labels: dict[str, int] = {}
    metadata: dict[str, bytes] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for entry in tar:
                folder, _, base = entry.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}"
                if not entry.isfile() or not extension:
                    continue
                if f".{extension.lower()}" in IMAGE_SUFFIXES:
                    images[key] = _Member(number, entry.offset_data, entry.size, entry.name)
                elif extension in ("cls", "json"):
                    content = tar.extractfile(entry)
                    data = content.read() if content else b""
                    if extension == "cls":
                        labels[key] = int(data)
                    else:
                        metadata[key] = data
        for key in metadata.keys() - labels.keys():  # a .cls file takes precedence over a .json file
            labels[key] = int(json.loads(metadata[key])["label"])
        if shard.stat().st_size < max((m.offset + m.size for m in images.values()), default=0):
            raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{shard} cannot be read as a WebDataset shard ({error}); it may be truncated or compressed."
        ) from error
    for key in images.keys() ^ labels.keys():
        raise DataError(f"Sample {key.strip('/')!r} of {shard} has no {'label' if key in images else 'image'}.")
    if not images:
        raise DataError(f"{shard} holds no samples; a sample is an image with a label in a .cls or .json file.")
    return [(member, labels[key]) for key, member in images.items()]
