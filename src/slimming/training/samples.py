"""Data sets of decoded samples, with random access or as a stream; train/validation split and checks of labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from slimming.core.plain_text import on_one_line
from slimming.errors import DataError
from slimming.training.config import DataConfig
from slimming.training.image_files import UnreadableImageError
from slimming.training.images import (
    ImageSpec,
    decode,
    derive_seed,
    fork_rng,
    make_transform,
    open_image,
    seed_cpu_generators,
)
from slimming.training.labels import LARGEST, named_by_label
from slimming.training.sources import Record, Source
from slimming.training.value_range import check_values

_log = logging.getLogger(__name__)
LOOKED_AT = 16
"""Images that are looked at when a data set is opened, to check how those with more than 8 bits are scaled."""
VALIDATION_NAMES = ("val", "validation", "valid", "test")


class Sample(NamedTuple):
    """An image (C, H, W), its label, and its name for messages."""

    image: Tensor
    label: int
    name: str


class SampleReader:
    """Decode and augment stored records; the augmentation depends only on (seed, epoch, index).

    Args:
        spec: input of the model.
        augment: one of ``AUGMENTATIONS``, or None for evaluation.
        seed: seed of the augmentation.
        value_range: see `DataConfig`.
    """

    def __init__(
        self, spec: ImageSpec, augment: str | None, seed: int = 0, value_range: tuple[float, ...] | None = None
    ) -> None:
        self.spec = spec
        self.channels = spec.input_size[0]
        self.largest = 4 * max(spec.input_size[1:])
        self.transform: Callable[[Image.Image], Tensor] = make_transform(spec, augment)
        self.seed = seed
        self.value_range = value_range

    def without_augmentation(self) -> SampleReader:
        """Return a reader that resizes and crops images as in evaluation."""
        return SampleReader(self.spec, None, self.seed, self.value_range)

    def __call__(self, record: Record, epoch: int, index: int) -> Sample:
        """Decode and augment a record.

        Raises:
            UnreadableImageError: the image cannot be decoded.
        """
        image = decode(record.image, self.channels, self.largest, self.value_range)
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
        classes: names of the classes; empty if they are unknown.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        reader: SampleReader,
        max_unreadable: float = 0.01,
        classes: tuple[str, ...] = (),
    ) -> None:
        self.source = source
        self.indices = indices
        self.reader = reader
        self.max_unreadable = max_unreadable
        self.classes = classes

    def __len__(self) -> int:
        return len(self.indices)

    def without_augmentation(self) -> ImageDataset:
        """Return the same images, read as in evaluation."""
        reader = self.reader.without_augmentation()
        return ImageDataset(self.source, self.indices, reader, self.max_unreadable, self.classes)

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
        classes: names of the classes; empty if they are unknown.
    """

    def __init__(
        self,
        epochs: Callable[[int], Iterable[Record]],
        reader: SampleReader,
        length: int | None,
        max_unreadable: float,
        classes: tuple[str, ...] = (),
    ) -> None:
        self.epochs = epochs
        self.reader = reader
        self.length = length
        self.max_unreadable = max_unreadable
        self.classes = classes

    def without_augmentation(self) -> StreamDataset:
        """Return the same images, read as in evaluation."""
        reader = self.reader.without_augmentation()
        return StreamDataset(self.epochs, reader, self.length, self.max_unreadable, self.classes)


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
                _log.warning("skipped an unreadable image: %s", on_one_line(name))
        if len(self.names) > self.limit:
            of = "" if self.total is None else f" of {self.total}"
            raise DataError(
                f"{len(self.names)}{of} images could not be read, more than the {self.limit} that max_unreadable "
                f"allows; the last: {sorted(names)[-1]}. Repair or remove them, or raise max_unreadable."
            )


def check_classes(where: str, train: Source, val: Source) -> tuple[str, ...]:
    """Return the class names of training and validation data.

    If the data names no classes, the labels that occur are the classes, and the labels of both sources are replaced by
    the numbers of their classes.

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
    for part, source in (("training", train), ("validation", val)):
        if not len(source.labels):
            raise DataError(f"The {part} data of {where} holds no images; add some.")
        highest = len(classes) - 1 if classes else LARGEST
        wrong = np.flatnonzero((source.labels < 0) | (source.labels > highest))
        if len(wrong):
            record = source.read(int(wrong[0]))
            known = f"there are {len(classes)} classes (0 to {highest})" if classes else "labels are 0 or more"
            ones = "; labels count from 0, so subtract 1 from each" if source.labels.min() == 1 else ""
            raise DataError(
                f"{record.name} has label {record.label}, but {known}; {len(wrong)} labels of the {part} data of "
                f"{where} are out of range{ones}."
            )
    if not classes:
        classes, (train.labels, val.labels) = named_by_label(where, train.labels, val.labels)
    if len(classes) < 2:
        raise DataError(f"The data of {where} has one class only ({', '.join(classes)}); at least two are needed.")
    return classes


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


def check_depth(source: Source, config: DataConfig) -> None:
    """Check on a few images that those with more than 8 bits per channel can be scaled.

    Raises:
        DataError: see `slimming.training.value_range.check_values`.
    """
    places = np.unique(np.linspace(0, len(source.labels) - 1, LOOKED_AT).astype(np.int64))
    check_values(_opened(source.read(int(place)) for place in places), config.value_range, config.source)


def _opened(records: Iterable[Record]) -> Iterator[tuple[str, Image.Image]]:
    """Yield names and images whose header can be read."""
    for record in records:
        try:
            image = record.image if isinstance(record.image, Image.Image) else open_image(record.image)
        except UnreadableImageError:  # it is counted when it is used
            continue
        yield record.name, image
