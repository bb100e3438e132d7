"""Which files of a data set are images, and a note on what was passed over.

One rule for all layouts: a file is an image if Pillow can decode files with its extension. Hidden files and folders,
and folders that systems write beside images, are passed over. Linked folders are followed; each folder is read once.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from PIL import Image, ImageFile, UnidentifiedImageError

from slimming.core.plain_text import on_one_line
from slimming.errors import DataError

_log = logging.getLogger(__name__)

NOT_DECODED = ("EPS", "MPEG")
"""Formats that Pillow opens but that are not read as images: it starts Ghostscript for EPS, and cannot decode MPEG."""
SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})
"""Folders that archives, network disks and file systems write beside images, with copies or small versions of them."""
NAMES_SHOWN = 3
MAX_PIXELS = 2**26
"""Largest number of pixels that is decoded, 8192 x 8192; JPEG images are counted at the scale of their decoding."""
MAX_BYTES = 2**29
"""Largest encoded image that is read."""


DAMAGED = (
    ArithmeticError, AssertionError, AttributeError, EOFError, Image.DecompressionBombError, LookupError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip
"""What Pillow raises on damaged files."""


class UnreadableImageError(DataError):
    """An image cannot be decoded. The readers of batches catch this error, then count and skip the image."""


@contextmanager
def decoding() -> Iterator[None]:
    """Turn the errors of Pillow in this block into `UnreadableImageError`.

    Raises:
        UnreadableImageError: an image is truncated, damaged or not an image.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns above 89 megapixels and raises an error above 179; MAX_PIXELS is checked when decoding.
            warnings.simplefilter("ignore")
            yield
    except UnidentifiedImageError as error:
        # Pillow's message contains the address of a buffer, but the same image must always give the same message.
        raise UnreadableImageError("not an image in a format that Pillow reads") from error
    except DAMAGED as error:
        raise UnreadableImageError(str(error) or type(error).__name__) from error


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Names of the formats that the installed Pillow decodes."""
    Image.init()
    factories = {name: opener[0] for name, opener in Image.OPEN.items() if name not in NOT_DECODED}
    return tuple(
        name
        for name, factory in factories.items()
        if not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))
    )


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Extensions of image files, in lower case, from Pillow's registry.

    >>> {".jpg", ".jpe", ".jfif", ".png", ".webp", ".tiff"} <= image_suffixes()
    True
    """
    known = {*image_formats(), "MPO"}  # Pillow opens MPO files, which hold several JPEG images, as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def is_hidden(name: str) -> bool:
    """Whether a path relative to a data set, with ``/``, is hidden or in a folder that is passed over.

    >>> [is_hidden(name) for name in ("cat/1.jpg", "cat/.ipynb_checkpoints/1.jpg", "__MACOSX/cat/1.jpg")]
    [False, True, True]
    """
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in PurePosixPath(name).parts)


class PassedOver:
    """What was passed over in a data set, by reason.

    Args:
        where: the data set, for the note.
    """

    def __init__(self, where: object) -> None:
        self.where = where
        self.count: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: object) -> None:
        """Count a file or folder."""
        self.count[reason] = self.count.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < NAMES_SHOWN:
            names.append(on_one_line(str(name)))

    def log(self) -> None:
        """Log one warning with the number of files and folders and their first names, if there are any."""
        if self.count:
            parts = (
                f"{count} {reason} ({', '.join(self.names[reason])}{', ...' if count > NAMES_SHOWN else ''})"
                for reason, count in self.count.items()
            )
            _log.warning("passed over in %s: %s", on_one_line(str(self.where)), "; ".join(parts))


def find_images(folder: Path, root: Path, passed: PassedOver) -> list[Path]:
    """Return the images in ``folder`` and its sub-folders, sorted.

    Args:
        folder: the data set or one of its class folders.
        root: the data set; links back to it or to a folder above it are passed over.
        passed: collects what is passed over.

    Raises:
        DataError: a folder cannot be read.
    """
    found: list[Path] = []
    above = Path(os.path.realpath(root))
    seen, stack = {str(above), *map(str, above.parents)}, [str(folder)]
    if folder == root:
        seen.remove(str(above))
    while stack:
        place = stack.pop()
        real = os.path.realpath(place)
        if real in seen:
            passed.add("linked folders that are read already", os.path.relpath(place, root))
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"The folder {place} cannot be read: {error.strerror}.") from error
        for entry in entries:
            name = os.path.relpath(entry.path, root)
            if is_hidden(entry.name):
                passed.add("hidden", name)
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                stack.append(entry.path)
            elif not _is_image(entry):
                passed.add("not images", name)
            else:
                found.append(Path(entry.path))
    return sorted(found)


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether a file is an image; a link to a missing image is one, so that it is counted as unreadable."""
    if os.path.splitext(entry.name)[1].lower() not in image_suffixes():
        return False
    return entry.is_file() if not entry.is_symlink() else os.path.isfile(entry.path) or not os.path.exists(entry.path)


def class_folders(root: Path, passed: PassedOver) -> list[Path]:
    """Return the folders of classes in ``root``, sorted.

    Raises:
        DataError: there are none, or ``root`` cannot be read.
    """
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise DataError(f"The folder {root} cannot be read: {error.strerror}.") from error
    folders = []
    for path in entries:
        if is_hidden(path.name):
            passed.add("hidden", path.name)
        elif path.is_dir():
            folders.append(path)
        else:
            passed.add("outside the class folders", path.name)
    if not folders:
        raise DataError(f"{root} holds no class folders, .parquet files or .tar shards; give a folder that does.")
    return folders


def table_files(folder: Path) -> list[Path]:
    """Return the Parquet files and tar shards in ``folder``, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".parquet", ".tar") and not is_hidden(path.name))
