"""Read files of weights: safetensors, and PyTorch's files of plain tensors. Nothing in them is executed."""

from __future__ import annotations

import hashlib
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from slimming.core.records import FileKind
from slimming.errors import CheckpointError

HOST_WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_FILE = FileKind(name="the index of weights", schema=dict[str, Any], sealed=False, numbered=False)
STATE_KEYS = ("state_dict", "model", "module", "state_dict_ema", "model_ema")
"""Keys of the state dict in files that training scripts write."""
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
_HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+")
"""The start of the SHA-256 in the names of files on PyTorch's servers."""


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files in a directory of timm or transformers, or in a repository that was downloaded.

    Raises:
        CheckpointError: there are none; or a file, or a name in the index, leads out of the directory.
    """
    if (directory / HOST_WEIGHTS).exists():
        names = [HOST_WEIGHTS]
    elif (directory / INDEX).exists():
        names = _names_in_index(directory / INDEX)
    else:
        names = sorted(file.name for file in directory.glob("*.safetensors"))[:1]
    if not names:
        raise CheckpointError(
            f"{directory} has no {HOST_WEIGHTS}; weights in other formats are not read from a directory."
        )
    for name in names:
        check_inside(directory / name, directory)
    return [directory / name for name in names]


def _names_in_index(index: Path) -> list[str]:
    check_inside(index, index.parent)
    places = INDEX_FILE.read(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map; it is damaged. Take an intact copy.")
    for name in places.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CheckpointError(
                f"{index} names the file {str(name)[:100]!r}; only safetensors files in the same directory are read. "
                "Do not use this model, or take an intact copy."
            )
    return sorted(set(places.values()))


def check_inside(file: Path, directory: Path) -> None:
    """Check that ``file`` is a file in ``directory``, and no link that leads out of it.

    In the cache of the hub, files of a snapshot are links to the repository's blobs; these are allowed.

    Raises:
        CheckpointError: it is not.
    """
    try:
        target, root = file.resolve(strict=True), directory.resolve(strict=True)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}). Take an intact copy of {directory}."
        ) from error
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not target.is_file() or target.parent not in allowed:
        raise CheckpointError(f"{file} is a link that leads out of {directory}, which is not followed. Copy the file.")


def read_directory(directory: Path) -> dict[str, Tensor]:
    """Read all tensors of a directory, see `weight_files`.

    Raises:
        CheckpointError: a file is missing, damaged or outside, or two files hold the same tensor.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(directory):
        part = read_tensors(file)
        if twice := state.keys() & part.keys():
            raise CheckpointError(f"Two files in {directory} hold {min(twice)!r}. Take an intact copy.")
        state |= part
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    with _damage_explained(path):
        # load_file maps the file into memory. Copy: overwriting the file would change or crash the model, and the
        # tensors in the file are not aligned as others are.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    with _damage_explained(path), safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


@contextmanager
def _damage_explained(source: Path) -> Iterator[None]:
    with readable(source):
        source.open("rb").close()
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{source} is truncated or not a safetensors file ({error}). Take an intact copy."
        ) from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Explain errors of the operating system while ``path`` is read.

    Raises:
        CheckpointError: the file is missing or not readable.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). Give a path that slimming wrote.") from error


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict of plain tensors from a ``.safetensors`` file or a file of PyTorch.

    The checksums in a file of PyTorch are verified. Files of PyTorch before 1.6 have none; they are read only if their
    name contains the start of their SHA-256, as on PyTorch's servers.

    Raises:
        CheckpointError: the file is missing or damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file. Give a .safetensors file or a .pth of plain tensors.")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickled_tensors(path)
    except UnpicklingError as error:
        called = re.search(r"(?:GLOBAL|global) ([\w.]+\.\w+)", str(error))
        what = f": it names {called[1]}" if called else ""
        raise CheckpointError(
            f"{path} is a pickle of more than plain tensors, which is never executed{what}. "
            "Save model.state_dict() with safetensors instead."
        ) from error
    except _DAMAGES as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is truncated or damaged: {reason}. Take an intact copy.") from error
    return _state_in(content, path)


_DAMAGES = (
    *(SafetensorError, RuntimeError, EOFError, ValueError, OSError, zipfile.BadZipFile, zlib.error, struct.error),
    *(KeyError, IndexError, TypeError, AttributeError, AssertionError, OverflowError),  # of malformed pickles
)


def _state_in(content: Any, path: Path) -> dict[str, Tensor]:
    for key in STATE_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict of tensors.")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path} holds {key!r}, a {type(value).__name__}; only plain tensors are taken.")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _unpickled_tensors(path: Path) -> Any:
    """The content of a file of PyTorch, after its checksums were verified."""
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # as torch.load decides
    if is_zip:
        _check_zip(path)
    else:
        _check_name(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about pickles before it rejects them
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(names) != len(set(names)) or any(entry.compress_type for entry in archive.infolist()):
            raise zipfile.BadZipFile("its entries are repeated or compressed, which torch.save does not do")
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of its entry {damaged!r} differs")


def _check_name(path: Path) -> None:
    """Verify the start of the SHA-256 in the name of a file without checksums."""
    with path.open("rb") as file:
        first = file.read(1)
        if first != b"\x80":
            raise zipfile.BadZipFile("it is not a file of torch.save")
        digest = hashlib.sha256(first)
        while block := file.read(1 << 20):
            digest.update(block)
    named = _HASH.search(path.name)
    if named is None or not digest.hexdigest().startswith(named[1]):
        raise CheckpointError(
            f"{path} is a file without checksums, as PyTorch wrote before version 1.6, or a damaged one. If you trust "
            "it, write its tensors with safetensors.torch.save_file, and give that file."
        )
