"""Data sets of decoded samples, with random access or as a stream; train/validation split and checks of labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from slimming.errors import DataError
from slimming.training.config import DataConfig
from slimming.training.images import (
    ImageSpec,
    UnreadableImageError,
    decode,
    derive_seed,
    fork_rng,
    make_transform,
    seed_cpu_generators,
)
from slimming.training.sources import Record, Source

_log = logging.getLogger(__name__)
VALIDATION_NAMES = ("val", "validation", "valid", "test")


class Sample(NamedTuple):
    """An image (C, H, W), its label, and its name for messages."""

    image: Tensor
    label: int
    name: str


class SampleReader:
    """Decode and augment stored records; the augmentation depends only on (seed, epoch, index)."""

    def __init__(self, spec: ImageSpec, augment: str | None, seed: int = 0) -> None:
        self.channels = spec.input_size[0]
        self.largest = 4 * max(spec.input_size[1:])
        self.transform: Callable[[Image.Image], Tensor] = make_transform(spec, augment)
        self.seed = seed

    def __call__(self, record: Record, epoch: int, index: int) -> Sample:
        """Decode and augment a record.

        Raises:
            UnreadableImageError: the image cannot be decoded.
        """
        image = decode(record.image, self.channels, self.largest)
        with fork_rng():
            seed_cpu_generators(derive_seed(self.seed, epoch, index))
            return Sample(self.transform(image), record.label, record.name)


class ImageDataset(torch.utils.data.Dataset[Sample]):
    """Images by index: ``dataset[i]`` is ``(image, label, name)``.

    Args:
        source: source of the records.
        indices: indices of the records to use, in order.
        reader: decodes and augments the records.
        max_unreadable: fraction of the images that may be skipped before reading stops with an error.
    """

    def __init__(self, source: Source, indices: np.ndarray, reader: SampleReader, max_unreadable: float = 0.01) -> None:
        self.source = source
        self.indices = indices
        self.reader = reader
        self.max_unreadable = max_unreadable

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        """The label of every image, int64 (len,)."""
        return self.source.labels[self.indices]

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index, epoch=0)

    def sample(self, index: int, epoch: int) -> Sample:
        """Return image ``index`` with the augmentation of ``epoch``.

        Raises:
            UnreadableImageError: the image cannot be decoded; the message begins with the name of the image.
        """
        record = self.source.read(int(self.indices[index]))
        try:
            return self.reader(record, epoch, index)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{record.name}: {error}") from error


class StreamDataset:
    """Images that can only be read in order.

    Args:
        epochs: function from the number of an epoch to its records; the order must be the same at each call.
        reader: decodes and augments the records.
        length: images per epoch, or None if unknown.
        max_unreadable: fraction of the images that may be skipped before reading stops with an error.
    """

    def __init__(
        self,
        epochs: Callable[[int], Iterable[Record]],
        reader: SampleReader,
        length: int | None,
        max_unreadable: float,
    ) -> None:
        self.epochs = epochs
        self.reader = reader
        self.length = length
        self.max_unreadable = max_unreadable


Loader = Iterable[Any]
"""A custom loader: an iterable that yields the global batches (images, labels) of one epoch per iteration."""


@dataclass(frozen=True)
class Data:
    """Training images, validation images, and the names of the classes."""

    train: ImageDataset | StreamDataset | Loader
    val: ImageDataset | StreamDataset | Loader
    classes: tuple[str, ...]


class UnreadableCounter:
    """Count unreadable images and raise an error when there are too many.

    Args:
        total: number of images, or None if unknown; the limit is then a fraction of 1000.
        fraction: maximum fraction of unreadable images.
    """

    def __init__(self, total: int | None, fraction: float) -> None:
        self.names: set[str] = set()
        self.total = total
        self.limit = int(fraction * (1000 if total is None else total))

    @classmethod
    def of(cls, images: ImageDataset | StreamDataset | Loader) -> UnreadableCounter:
        """Return a counter with the limit of ``images``; a custom loader allows no unreadable image."""
        if isinstance(images, ImageDataset):
            return cls(len(images), images.max_unreadable)
        if isinstance(images, StreamDataset):
            return cls(images.length, images.max_unreadable)
        return cls(None, 0.0)

    def add(self, names: Sequence[str]) -> None:
        """Count unreadable images by name; repeated names count once.

        Raises:
            DataError: the limit is exceeded.
        """
        for name in names:
            if name not in self.names:
                self.names.add(name)
                _log.warning("skipped an unreadable image: %s", name)
        if len(self.names) > self.limit:
            of = "" if self.total is None else f" of {self.total}"
            raise DataError(
                f"{len(self.names)}{of} images could not be read, more than the {self.limit} that max_unreadable "
                f"allows; the last: {sorted(names)[-1]}. Repair or remove them, or raise max_unreadable."
            )


def check_classes(where: str, train: Source, val: Source) -> tuple[str, ...]:
    """Return the class names of training and validation data; the label numbers if no names are stored.

    Raises:
        DataError: the classes of the two differ, there are no images or only one class, or a label is out of range.
    """
    if train.classes and val.classes and train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        difference = (
            f"only in training: {', '.join(only_train) or 'none'}; only in validation: {', '.join(only_val) or 'none'}"
            if only_train or only_val
            else "the same names in another order"
        )
        raise DataError(f"Training and validation data of {where} have different classes ({difference}).")
    classes = train.classes or val.classes
    if not classes:
        highest = int(max(train.labels.max(initial=-1), val.labels.max(initial=-1)))
        classes = tuple(str(label) for label in range(highest + 1))
    for part, source in (("training", train), ("validation", val)):
        if not len(source.labels):
            raise DataError(f"The {part} data of {where} holds no images; add some.")
        wrong = np.flatnonzero((source.labels < 0) | (source.labels >= len(classes)))
        if len(wrong):
            record = source.read(int(wrong[0]))
            raise DataError(
                f"{record.name} has label {record.label}, but there are {len(classes)} classes (0 to "
                f"{len(classes) - 1}); {len(wrong)} labels of the {part} data of {where} are out of range."
            )
    if len(classes) < 2:
        raise DataError(f"The data of {where} has one class only ({', '.join(classes)}); at least two are needed.")
    return classes


def check_labels(where: str, labels: np.ndarray, classes: Sequence[str]) -> None:
    """Check that the training images belong to more than one class.

    Raises:
        DataError: all labels are the same.
    """
    seen = np.unique(labels)
    if len(seen) < 2:
        which = ", ".join(classes[int(label)] for label in seen)
        raise DataError(
            f"All {len(labels)} training images of {where} are of one class ({which}); at least two are needed."
        )


def validation_fraction(config: DataConfig) -> float:
    """Return the fraction of the images to hold out for validation.

    Raises:
        DataError: ``split_fraction`` is not set.
    """
    if config.split_fraction is None:
        raise DataError(
            f"{config.source} has no validation part (looked for {', '.join(VALIDATION_NAMES)}); set val to "
            "validation data, or hold out images with split_fraction, such as 0.1."
        )
    return config.split_fraction


def stratified_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split the indices into (training, validation), with the same fraction of each class.

    The split does not depend on the seed of a run, so that runs with different seeds are comparable.

    Raises:
        DataError: a class has a single image.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    train, val = [], []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        count = max(1, round(fraction * len(members)))
        if count == len(members):
            raise DataError(f"Class number {label} has {len(members)} image; at least two are needed to hold some out.")
        val.append(members[:count])
        train.append(members[count:])
    rng = np.random.default_rng(1)
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(val))
