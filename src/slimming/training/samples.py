"""Images as training sees them: decoded samples by index or in order, and the checks of their labels."""

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
    """One image (C, H, W), its label and its name for messages."""

    image: Tensor
    label: int
    name: str


class SampleReader:
    """Turn stored records into samples; the random numbers of each depend only on (seed, epoch, index)."""

    def __init__(self, spec: ImageSpec, augment: str | None, seed: int = 0) -> None:
        self.channels = spec.input_size[0]
        self.largest = 4 * max(spec.input_size[1:])
        self.transform: Callable[[Image.Image], Tensor] = make_transform(spec, augment)
        self.seed = seed

    def __call__(self, record: Record, epoch: int, index: int) -> Sample:
        """Decode and augment one record.

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
        source: where they lie.
        indices: which of the source's records, in which order.
        reader: how they become tensors.
        max_unreadable: share of the images that may be skipped before reading stops with an error.
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
        """Return image ``index`` as it is augmented in ``epoch``.

        Raises:
            UnreadableImageError: the image cannot be decoded; its text begins with the image's name.
        """
        record = self.source.read(int(self.indices[index]))
        try:
            return self.reader(record, epoch, index)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{record.name}: {error}") from error


class StreamDataset:
    """Images that can only be read in order, from the start.

    Args:
        epochs: ``epochs(epoch)`` gives the records of that epoch, in the same order whenever it is called.
        reader: how they become tensors.
        length: images per epoch, or None where nobody knows.
        max_unreadable: share of the images that may be skipped before reading stops with an error.
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


# A user's own loader: any iterable, each pass over it one epoch, each item (images, labels) for one global
# batch.
Loader = Iterable[Any]


@dataclass(frozen=True)
class Data:
    """Training and validation images and the names of their classes."""

    train: ImageDataset | StreamDataset | Loader
    val: ImageDataset | StreamDataset | Loader
    classes: tuple[str, ...]


class UnreadableCounter:
    """Names and counts the images that were skipped, and stops at the limit.

    Args:
        total: images there are, or None for a stream of unknown length (then the limit is a share of 1000).
        share: largest share of them that may be skipped.
    """

    def __init__(self, total: int | None, share: float) -> None:
        self.names: set[str] = set()
        self.total = total
        self.limit = int(share * (1000 if total is None else total))

    @classmethod
    def of(cls, images: ImageDataset | StreamDataset | Loader) -> UnreadableCounter:
        """The counter that a part of the data calls for."""
        if isinstance(images, ImageDataset):
            return cls(len(images), images.max_unreadable)
        if isinstance(images, StreamDataset):
            return cls(images.length, images.max_unreadable)
        return cls(None, 0.0)

    def add(self, names: Sequence[str]) -> None:
        """Count images by name; one that comes again counts once.

        Raises:
            DataError: more are unreadable than the limit allows.
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
    """Return the class names that both parts share, numbered names where none are stored.

    Raises:
        DataError: they name different classes, there is only one class, or a label lies outside.
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
            raise DataError(f"The {part} data of {where} holds no images.")
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
    """Check that training would see more than one class.

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
    """Return the share of the images to hold out.

    Raises:
        DataError: there is no validation part, and none is to be held out.
    """
    if config.split_fraction is None:
        raise DataError(
            f"{config.source} has no validation part (looked for {', '.join(VALIDATION_NAMES)}); name one "
            "with val, or hold some images out with split_fraction, such as 0.1."
        )
    return config.split_fraction


def stratified_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into (training, validation), the same share of each class; always the same split.

    The split does not follow the seed of a run: runs with different seeds stay comparable.
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
    mixed = np.random.default_rng(1)
    return mixed.permutation(np.concatenate(train)), mixed.permutation(np.concatenate(val))
