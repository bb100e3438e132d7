"""Images from the Hugging Face ``datasets`` library: downloaded and read by index, or streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from slimming.errors import DataError, MissingExtraError
from slimming.training.config import DataConfig
from slimming.training.labels import check_labels, integer_label, integer_labels, stratified_split
from slimming.training.samples import (
    VALIDATION_NAMES,
    Data,
    ImageDataset,
    SampleReader,
    StreamDataset,
    check_classes,
    check_depth,
    validation_fraction,
)
from slimming.training.sources import Record, require_columns

SHUFFLE_BUFFER = 1000


class DatasetsSource:
    """A downloaded split of a data set, read by index."""

    def __init__(self, split: Any, image_key: str, label_key: str, where: str) -> None:
        self.split, self.image_key, self.where = split, image_key, where
        self.labels = integer_labels(np.asarray(split[label_key]), label_key, where)
        self.classes = class_names(split, label_key)

    def read(self, index: int) -> Record:
        """Return the record at ``index``."""
        return _record(self.split[index][self.image_key], int(self.labels[index]), f"{self.where} row {index}")


def open_hf_dataset(config: DataConfig, train_reader: SampleReader, val_reader: SampleReader, seed: int) -> Data:
    """Open ``hf:NAME`` data, see `slimming.training.data.open_data`.

    Raises:
        DataError: the data set, a split or a column does not exist, or the labels are not valid.
        MissingExtraError: the ``datasets`` library is not installed.
    """
    splits = _load(config)
    names = [config.val] if config.val else [name for name in VALIDATION_NAMES if name in splits]
    if "train" not in splits or (config.val and config.val not in splits):
        raise DataError(f"{config.source} has the splits {', '.join(map(repr, splits))}; train and val are needed.")
    for name in ("train", *names[:1]):
        require_columns(config.source, list(splits[name].features or ()), (config.image_key, config.label_key))
    if config.stream:
        if not names:
            raise DataError(f"{config.source} has no validation split, and a stream cannot be split: set val.")
        return _streams(config, splits["train"], splits[names[0]], train_reader, val_reader, seed)
    train = DatasetsSource(_undecoded(splits["train"], config), config.image_key, config.label_key, config.source)
    val, val_indices = train, None
    train_indices = np.arange(len(train.labels))
    if names:
        val_split = _undecoded(splits[names[0]], config)
        val = DatasetsSource(val_split, config.image_key, config.label_key, f"{config.source}[{names[0]}]")
    else:
        train_indices, val_indices = stratified_split(train.labels, validation_fraction(config))
    classes = check_classes(config.source, train, val)
    train_indices = train_indices[: config.train_limit]
    val_indices = (np.arange(len(val.labels)) if val_indices is None else val_indices)[: config.val_limit]
    check_labels(config.source, train.labels[train_indices], classes)
    check_depth(train, config)
    return Data(
        ImageDataset(train, train_indices, train_reader, config.max_unreadable, classes),
        ImageDataset(val, val_indices, val_reader, config.max_unreadable, classes),
        classes,
    )


def class_names(split: Any, label_key: str) -> tuple[str, ...]:
    """Return the class names of a ``ClassLabel`` column; empty for other columns."""
    names = getattr((split.features or {}).get(label_key), "names", None)
    return tuple(names or ())


def _load(config: DataConfig) -> Any:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise MissingExtraError(
            "hf: data needs the datasets library; run: pip install 'slimming[datasets]'."
        ) from error
    name = config.source.removeprefix("hf:")
    try:
        return datasets.load_dataset(name, streaming=config.stream)
    # Those of the hub and the network are OSErrors, those of the readers RuntimeErrors and ValueErrors.
    except (DatasetsError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{config.source} cannot be loaded: {str(error).splitlines()[0]}") from error


def _undecoded(split: Any, config: DataConfig) -> Any:
    """Disable decoding in ``datasets``: images are decoded here, so that unreadable ones can be counted."""
    import datasets

    return split.cast_column(config.image_key, datasets.Image(decode=False))


def _record(value: Any, label: int, name: str) -> Record:
    if isinstance(value, Image.Image):
        return Record(value, label, name)
    if value.get("bytes") is None and value.get("path"):
        from pathlib import Path

        return Record(Path(value["path"]), label, value["path"])
    return Record(value.get("bytes") or b"", label, name)


def _streams(
    config: DataConfig, train: Any, val: Any, train_reader: SampleReader, val_reader: SampleReader, seed: int
) -> Data:
    classes = class_names(train, config.label_key)
    if len(classes) < 2:
        raise DataError(f"The stream {config.source} has no class names; set stream to false.")
    train = _undecoded(train, config).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return Data(
        StreamDataset(
            _epochs(train, config, len(classes), config.train_limit),
            train_reader,
            _length(train, config.train_limit),
            config.max_unreadable,
            classes,
        ),
        StreamDataset(
            _epochs(_undecoded(val, config), config, len(classes), config.val_limit),
            val_reader,
            _length(val, config.val_limit),
            config.max_unreadable,
            classes,
        ),
        classes,
    )


def _length(split: Any, limit: int | None) -> int | None:
    known = split.info.splits or {}
    images = known[split.split].num_examples if split.split in known else None
    return min((n for n in (images, limit) if n), default=None)


def _epochs(split: Any, config: DataConfig, classes: int, limit: int | None) -> Callable[[int], Iterator[Record]]:
    def records(epoch: int) -> Iterator[Record]:
        split.set_epoch(epoch)
        for row, value in enumerate(split):
            if row == limit:
                return
            path = (value[config.image_key] or {}).get("path")
            name = f"{config.source} {path or f'epoch {epoch} row {row}'}"
            label = integer_label(value[config.label_key], name)
            if not 0 <= label < classes:
                raise DataError(f"{name} has label {label}, but there are {classes} classes (0 to {classes - 1}).")
            yield _record(value[config.image_key], label, name)

    return records
