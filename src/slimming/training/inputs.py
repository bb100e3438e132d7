"""What a training was started with: its models by their weights, its data by the files that it is read from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from slimming.core.inputs import Inputs
from slimming.training.distributed import distributed_state
from slimming.training.hf_datasets import DatasetsSource
from slimming.training.samples import Data, ImageDataset, Loader, StreamDataset
from slimming.training.sources import FolderSource, ParquetSource, Source, TarSource, UnlabelledFolderSource


def training_inputs(directory: Path | None, models: Mapping[str, nn.Module | None], data: Data) -> Inputs | None:
    """Return the models and the data that a training in ``directory`` starts with; `fit` compares and records them.

    Models are compared by the SHA-256 of their parameters and buffers, data that is read from files by these files (see
    `slimming.core.inputs.check_inputs`), data of the ``datasets`` library by its fingerprint, and other loaders not at
    all, since reading them would consume them.

    Args:
        directory: directory of the training.
        models: models by name, such as ``"the teacher"``.
        data: training and validation images.

    Returns:
        None without a directory, and on processes other than the main one, which write no files.
    """
    if directory is None or not distributed_state().is_main_process:
        return None
    images: dict[str, dict[str, Path]] = {}
    checksums = {f"the weights of {name}": weights_checksum(model) for name, model in models.items() if model}
    for name, part in (("the training images", data.train), ("the validation images", data.val)):
        files, checksum = _files_and_checksum(part)
        images |= {name: files} if files else {}
        checksums |= {f"the choice of {name}": checksum} if checksum else {}
    return Inputs(images=images, checksums=checksums)


def weights_checksum(model: nn.Module) -> str:
    """Return the SHA-256 of the names, types, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _files_and_checksum(images: ImageDataset | StreamDataset | Loader) -> tuple[dict[str, Path], str]:
    """Return the files of a data set, and the checksum of its labels and of what else identifies it."""
    if not isinstance(images, ImageDataset):
        return {}, ""
    digest = hashlib.sha256(images.labels.tobytes())
    digest.update("\n".join(images.classes).encode("utf-8", "surrogateescape"))
    if isinstance(images.source, DatasetsSource):
        digest.update(str(images.source.split._fingerprint).encode())
    return _files(images.source), digest.hexdigest()


def _files(source: Source) -> dict[str, Path]:
    """The files of a source by their name relative to the folder that holds all of them."""
    if isinstance(source, (FolderSource, UnlabelledFolderSource)):
        paths = source.paths
        root = str(source.root)
        return {str(path)[len(root) :].lstrip("/\\"): path for path in paths}
    if isinstance(source, ParquetSource):
        return {Path(file).name: Path(file) for file in source.files}
    return {shard.name: shard for shard in source.shards} if isinstance(source, TarSource) else {}
