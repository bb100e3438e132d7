"""Where images lie: each reader gives records by index, without decoding them."""

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
    """One image as it is stored: its encoded bytes, path or decoded form; its label; a name for messages."""

    image: bytes | Path | Image.Image
    label: int
    name: str


class Source(Protocol):
    """Images by index. ``labels`` holds all labels, ``classes`` their names, or nothing."""

    labels: np.ndarray
    classes: tuple[str, ...]

    def read(self, index: int) -> Record:
        """Return the record at ``index``."""
        ...


class FolderSource:
    """Class folders: ``root/CLASS/**/image.jpg``; classes in alphabetical order."""

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
            found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise DataError(f"The class folder {folder} holds no images; fill it or remove it.")
            self.paths += found
            labels += [label] * len(found)
        self.labels = np.asarray(labels, dtype=np.int64)

    def read(self, index: int) -> Record:
        """Return the record at ``index``."""
        path = self.paths[index]
        return Record(path, int(self.labels[index]), str(path))


class UnlabelledFolderSource:
    """All images below a folder, without labels.

    Raises:
        DataError: there are none.
    """

    classes = ()

    def __init__(self, root: Path) -> None:
        self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not self.paths:
            raise DataError(f"{root} holds no images, .parquet files or .tar shards; give a folder that does.")
        self.labels = np.zeros(len(self.paths), dtype=np.int64)

    def read(self, index: int) -> Record:
        """Return the record at ``index``; its label says nothing."""
        return Record(self.paths[index], 0, str(self.paths[index]))


class ParquetSource:
    """Parquet in the Hugging Face image layout: a column of {bytes, path} and one of whole-number labels.

    The encoded images are held in memory; decoding happens when one is read. Without a name of the column of labels,
    all are 0.
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
                raise DataError(f"{file} is no readable Parquet file ({error}); it may be truncated.") from error
        if not sum(table.num_rows for table in tables):
            raise DataError(f"{files[0]} holds no rows.")
        images = pyarrow.chunked_array([chunk for table in tables for chunk in table[image_key].chunks])
        if not (pyarrow.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0):
            raise DataError(
                f"Column {image_key!r} of {files[0]} is {images.type}, not images as {{bytes, path}}; set image_key."
            )
        labels = [np.zeros(len(t), np.int64) if label_key is None else t[label_key].to_numpy() for t in tables]
        if not all(np.issubdtype(part.dtype, np.integer) for part in labels):
            raise DataError(
                f"Column {label_key!r} of {files[0]} holds {labels[0].dtype}, not whole numbers without gaps; "
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
    """Check that a table has the wanted columns.

    Raises:
        DataError: one is missing.
    """
    for key in wanted:
        if key not in names:
            raise DataError(
                f"{file} has no column {key!r}, only {', '.join(map(repr, names))}; "
                f"set image_key and label_key.{nearest(key, names)}"
            )


def _class_names(metadata: dict[bytes, bytes] | None, label_key: str) -> tuple[str, ...]:
    """Return the class names that the ``datasets`` library keeps in a Parquet schema, if they are there."""
    try:
        stored = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        feature = stored.get("info", {}).get("features", {}).get(label_key, {})
        return tuple(str(name) for name in feature.get("names") or ())
    except (ValueError, AttributeError):
        return ()


@dataclass(frozen=True)
class _Member:
    """Where one sample lies in a shard."""

    shard: int
    offset: int
    size: int
    name: str


class TarSource:
    """WebDataset tar shards: files that share a name up to the first dot are one sample.

    Each sample holds an image (``.jpg``, ``.png`` ...) and its class number (``.cls``), or a ``.json`` with a
    ``label``. The shards' headers are read once, so that samples are read at random from the open shards and
    no shuffle buffer is needed. A file ``classes.txt`` beside the shards (one name per line) names the
    classes.
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
    """List the samples of one shard with their labels.

    Raises:
        DataError: it is no tar file, is cut short, or a sample lacks its image or label.
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
                    found = content.read() if content else b""
                    if extension == "cls":
                        labels[key] = int(found)
                    else:
                        metadata[key] = found
        for key in metadata.keys() - labels.keys():  # beside a .cls the JSON may say anything
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
        raise DataError(f"{shard} holds no samples of an image with a .cls or .json label.")
    return [(member, labels[key]) for key, member in images.items()]
