"""Open data sets: find the source, the splits and the class names, and check that they are consistent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slimming.errors import DataError
from slimming.training.config import DataConfig
from slimming.training.image_files import table_files
from slimming.training.images import ImageSpec
from slimming.training.labels import check_labels, stratified_split
from slimming.training.samples import (
    VALIDATION_NAMES,
    Data,
    ImageDataset,
    SampleReader,
    check_classes,
    check_depth,
    validation_fraction,
)
from slimming.training.sources import FolderSource, ParquetSource, Source, TarSource, UnlabelledFolderSource


def open_data(config: DataConfig, spec: ImageSpec, seed: int = 0) -> Data:
    """Open the training and validation data of ``config`` for a model with the input ``spec``.

    Args:
        config: location of the images.
        spec: input of the model, see `ImageSpec.of_model`.
        seed: seed of the augmentation, combined with the epoch and the index of a sample.

    Raises:
        DataError: the data does not exist, has no validation part, has an empty class or only one, has labels out of
            range, or has different classes in training and validation.
        MissingExtraError: ``hf:`` data is named but the ``datasets`` library is not installed.
    """
    train_reader, val_reader = (
        SampleReader(spec, augment, seed, config.value_range) for augment in (config.augment, None)
    )
    if config.source.startswith("hf:"):
        from slimming.training.hf_datasets import open_hf_dataset

        return open_hf_dataset(config, train_reader, val_reader, seed)
    train, val = _open_sources(config)
    train_indices, val_indices = _limit_order(train), None
    if val is None:
        train_indices, val_indices = stratified_split(train.labels, validation_fraction(config))
        val = train
    classes = check_classes(config.source, train, val)
    train_indices = train_indices[: config.train_limit]
    val_indices = (_limit_order(val) if val_indices is None else val_indices)[: config.val_limit]
    check_labels(config.source, train.labels[train_indices], classes)
    check_depth(train, config)
    return Data(
        ImageDataset(train, train_indices, train_reader, config.max_unreadable, classes),
        ImageDataset(val, val_indices, val_reader, config.max_unreadable, classes),
        classes,
    )


def open_unlabelled(config: DataConfig, spec: ImageSpec) -> ImageDataset | None:
    """Open the training images without labels: images anywhere in a folder, in Parquet files or in tar shards.

    Returns:
        None if the training images are only known with their labels, so that `open_data` is needed: ``hf:`` data,
        ``split_fraction`` or ``train_limit``.

    Raises:
        DataError: there are no images.
    """
    root = Path(config.source)
    if config.source.startswith("hf:") or config.split_fraction or config.train_limit:
        return None
    _check_exists(root)
    paths = _find_split(root, ("train",)) or [root]
    files = paths[0].is_file() or table_files(paths[0])
    source = _open_source(config, paths, labelled=False) if files else UnlabelledFolderSource(paths[0])
    check_depth(source, config)
    reader = SampleReader(spec, "none", 0, config.value_range)
    return ImageDataset(source, np.arange(len(source.labels)), reader, config.max_unreadable)


def _check_exists(root: Path) -> None:
    if not root.exists():
        raise DataError(f"There is no data at {root}; give an existing folder or file, or hf:NAME.")


def _limit_order(source: Source) -> np.ndarray:
    """Return the order in which a limit takes images: the stored order, but shuffled for class folders."""
    count = len(source.labels)
    return np.random.default_rng(0).permutation(count) if isinstance(source, FolderSource) else np.arange(count)


def _open_sources(config: DataConfig) -> tuple[Source, Source | None]:
    """Open the training source and, if there is one, the validation source."""
    root = Path(config.source)
    _check_exists(root)
    if config.val is not None:
        validation = Path(config.val)
        if not validation.exists():
            raise DataError(f"There is no validation data at {validation}; give an existing folder or file.")
        return _open_source(config, _find_split(root, ("train",)) or [root]), _open_source(config, [validation])
    train = _find_split(root, ("train",))
    val = _find_split(root, VALIDATION_NAMES)
    if train and val and config.split_fraction is None:
        return _open_source(config, train), _open_source(config, val)
    return _open_source(config, train or [root]), None


def _find_split(root: Path, names: Sequence[str]) -> list[Path] | None:
    """Return the folder or the files of the first split in ``names`` that ``root`` contains, or None."""
    if root.is_file():
        return None
    for name in names:
        if (root / name).is_dir():
            return [root / name]
        for folder in (root, root / "data"):  # data sets on the Hugging Face hub store Parquet files in data/
            files = [*folder.glob(f"{name}*.parquet"), *folder.glob(f"{name}*.tar")]
            if files:
                return sorted(files)
    return None


def _open_source(config: DataConfig, paths: list[Path], *, labelled: bool = True) -> Source:
    files = paths
    if len(paths) == 1 and paths[0].is_dir():
        files = table_files(paths[0])
        if not files:
            return FolderSource(paths[0])
    suffixes = {file.suffix for file in files}
    if suffixes == {".parquet"}:
        return ParquetSource(files, config.image_key, config.label_key if labelled else None)
    if suffixes == {".tar"}:
        return TarSource(files)
    if len(suffixes) > 1:
        raise DataError(f"{paths[0]} mixes {' and '.join(sorted(suffixes))} files; keep one kind, or name one file.")
    raise DataError(
        f"{paths[0]} is in no format that slimming reads: give a folder of class folders, .parquet files or "
        "uncompressed .tar shards."
    )
