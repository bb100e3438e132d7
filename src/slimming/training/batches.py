"""Batches: which images each process sees at each step.

The images of a step depend only on the seed and the step. Each epoch is shuffled with a permutation that is seeded by
(seed, epoch). A global batch is split into contiguous shards, one per process, and each shard into contiguous
micro-batches for gradient accumulation. A run that is resumed at a step therefore sees the same images as an
uninterrupted run, and several processes together see the same images as one.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from slimming.core.argument_types import checked_arguments
from slimming.errors import ConfigError, DataError
from slimming.training.image_files import UnreadableImageError
from slimming.training.images import derive_seed
from slimming.training.samples import Data, ImageDataset, Loader, Sample, StreamDataset, UnreadableCounter

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Types of the labels of a custom loader."""


class Batch(NamedTuple):
    """Images (B, C, H, W), labels (B,), names of the images, and names of images that could not be read."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class BatchShard:
    """The part of each global batch that one process takes, split into micro-batches.

    Attributes:
        batch_size: images of the global batch.
        accumulate: micro-batches per process and step.
        rank: index of the process.
        world_size: number of processes.

    Raises:
        ConfigError: the batch cannot be split into equal micro-batches.
    """

    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.world_size * self.accumulate):
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be split equally over {self.world_size} process(es) with "
                f"{self.accumulate} accumulated part(s) each; make it a multiple of "
                f"{self.world_size * self.accumulate}."
            )

    @property
    def micro_batch_size(self) -> int:
        """Number of images of one micro-batch."""
        return self.batch_size // (self.world_size * self.accumulate)

    def micro_batch(self, micro: int) -> slice:
        """Return the slice of the global batch that is micro-batch ``micro`` of this process."""
        first = (self.rank * self.accumulate + micro) * self.micro_batch_size
        return slice(first, first + self.micro_batch_size)


def train_batches(data: Data, shard: BatchShard, seed: int, start: int, workers: int) -> Iterator[Batch]:
    """Yield the micro-batches of this process, ``shard.accumulate`` per step, from step ``start`` on, without end."""
    if not isinstance(data.train, (ImageDataset, StreamDataset)):
        yield from _loader_batches(data, shard, start)
        return
    train = data.train
    plan = _ShuffledBatches(train, shard, seed) if isinstance(train, ImageDataset) else _StreamedBatches(train, shard)
    yield from _loader(_MicroBatches(plan, start * shard.accumulate), workers)


def first_batches(data: Data, images: int, batch_size: int, seed: int, workers: int) -> Iterator[Batch]:
    """Yield the first ``images`` images of a training run with this seed, the same ones in every process.

    Raises:
        DataError: more images are unreadable than the data allows.
    """
    unreadable = UnreadableCounter.of(data.train)
    for batch in train_batches(data, BatchShard(min(batch_size, images)), seed, 0, workers):
        unreadable.add(batch.unreadable)
        yield batch._replace(images=batch.images[:images], labels=batch.labels[:images])
        images -= len(batch.images)
        if images <= 0:
            return


@checked_arguments
def calibration_images(data: Data, images: int = 256, *, batch_size: int = 64, seed: int = 0) -> list[Tensor]:
    """Return training images as batches of shape (B, C, H, W), the same for the same seed.

    They serve as calibration images for `slimming.cut`, which needs no labels. They are resized and cropped as in
    evaluation, whatever the augmentation of the data, since the statistics of augmented images differ from those of the
    images that the model will see. A custom loader yields what it yields; one that can be iterated only once, its next
    images.

    Args:
        data: its training images are used.
        images: number of images; all images if there are fewer.
        batch_size: maximum number of images per batch.
        seed: seed of the order.

    Raises:
        ConfigError: ``images`` is below 1.
        DataError: more images are unreadable than the data allows.

    >>> import timm, slimming
    >>> from slimming.demo import settings
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> config = slimming.DataConfig(source=settings()["data"]["source"], train_limit=8, val_limit=8)
    >>> [batch.shape for batch in slimming.calibration_images(slimming.open_data(config, model), 6, batch_size=4)]
    [torch.Size([3, 3, 32, 32]), torch.Size([3, 3, 32, 32])]
    """
    return [batch.images for batch in calibration_batches(data, images, batch_size=batch_size, seed=seed)]


def calibration_batches(data: Data, images: int, *, batch_size: int = 64, seed: int = 0) -> list[Batch]:
    """Return the images of `calibration_images` with their labels and names.

    Raises:
        ConfigError: ``images`` is below 1.
        DataError: more images are unreadable than the data allows.
    """
    if images < 1:
        raise ConfigError(f"The number of calibration images is {images}; it must be at least 1.")
    if isinstance(data.train, ImageDataset | StreamDataset):
        data = replace(data, train=data.train.without_augmentation())
    if isinstance(data.train, ImageDataset):
        images = min(images, len(data.train))
        batch_size = -(-images // -(-images // batch_size))  # equal batches, so that no image is repeated
        batch_size = batch_size if -(-images // batch_size) * batch_size <= len(data.train) else 1
    return list(first_batches(data, images, batch_size, seed, workers=0))


def validation_batches(
    val: ImageDataset | StreamDataset | Loader,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yield the batches of ``val`` in order for one process: number ``rank``, ``rank + world_size``, and so on."""
    if isinstance(val, ImageDataset):
        yield from _loader(_EvaluationBatches(val, batch_size, rank, world_size), workers)
    elif isinstance(val, StreamDataset):
        records = enumerate(val.epochs(0))
        for number in count():
            chunk = list(islice(records, batch_size))
            if not chunk:
                return
            if number % world_size == rank:
                yield _collate(val, [(record, 0, index) for index, record in chunk], whole=False)
    else:
        for number, item in enumerate(val):
            if number % world_size == rank:
                yield _checked_batch(item, number)


class _ShuffledBatches:
    """Micro-batches, by number, of a shuffled data set with random access."""

    def __init__(self, dataset: ImageDataset, shard: BatchShard, seed: int) -> None:
        self.dataset, self.shard, self.seed = dataset, shard, seed
        self.steps = len(dataset) // shard.batch_size
        self.epoch = -1
        self.permutation = torch.empty(0, dtype=torch.int64)

    def micro_batches(self, numbers: Iterator[int]) -> Iterator[Batch]:
        for number in numbers:
            step, micro = divmod(number, self.shard.accumulate)
            epoch, place = divmod(step, self.steps)
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
                self.permutation = torch.randperm(len(self.dataset), generator=generator)
                self.epoch = epoch
            batch = self.permutation[place * self.shard.batch_size :][: self.shard.batch_size]
            yield _read_batch(self.dataset, batch[self.shard.micro_batch(micro)].tolist(), epoch)


class _StreamedBatches:
    """Micro-batches, by number, of a stream that is read in order; skipped images are not decoded."""

    def __init__(self, dataset: StreamDataset, shard: BatchShard) -> None:
        self.dataset, self.shard = dataset, shard

    def micro_batches(self, numbers: Iterator[int]) -> Iterator[Batch]:
        batches = self._global_batches()
        at, batch = -1, []
        for number in numbers:
            step, micro = divmod(number, self.shard.accumulate)
            while at < step:
                at, batch = at + 1, next(batches)
            part = _collate(self.dataset, batch[self.shard.micro_batch(micro)], whole=True)
            yield part if part.names else self._repeat_readable(batch, part)

    def _repeat_readable(self, batch: list[tuple[Any, int, int]], part: Batch) -> Batch:
        """Fill a micro-batch without readable images with the first readable image of the global batch."""
        size = self.shard.micro_batch_size
        for record in batch:
            first = _collate(self.dataset, [record], whole=False)
            if first.names:
                images = first.images.expand(size, -1, -1, -1)
                return Batch(images, first.labels.expand(size), first.names * size, part.unreadable)
        return part

    def _global_batches(self) -> Iterator[list[tuple[Any, int, int]]]:
        for epoch in count():
            records, complete = enumerate(self.dataset.epochs(epoch)), 0
            while True:
                batch = [(record, epoch, index) for index, record in islice(records, self.shard.batch_size)]
                if len(batch) < self.shard.batch_size:
                    break
                complete += 1
                yield batch
            if not complete:
                raise DataError(f"The stream holds fewer images than one batch of {self.shard.batch_size}.")


class _MicroBatches(IterableDataset[Batch]):
    """Micro-batches number ``first``, ``first + 1``, ...

    With n workers, each reads every n-th micro-batch. `DataLoader` takes from the workers in turn, which keeps the
    order.
    """

    def __init__(self, plan: _ShuffledBatches | _StreamedBatches, first: int) -> None:
        self.plan, self.first = plan, first

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        return self.plan.micro_batches(count(self.first + offset, stride))


class _EvaluationBatches(torch.utils.data.Dataset[Batch]):
    """Batches of a data set in its stored order, by number."""

    def __init__(self, dataset: ImageDataset, batch_size: int, rank: int, world_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.starts = range(0, len(dataset), batch_size)[rank::world_size]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Batch:
        start = self.starts[number]
        return _read_batch(self.dataset, range(start, min(start + self.batch_size, len(self.dataset))), None)


def _loader(dataset: torch.utils.data.Dataset[Batch], workers: int) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_init_worker if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # otherwise drawing the workers' seed would advance the global generator
    )


def _init_worker(_: int) -> None:
    """Leave Ctrl-C and a first SIGTERM to the main process, which finishes its step; use one thread per worker."""

    def ignore_once(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # the main process stops its workers by this signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, ignore_once)
    torch.set_num_threads(1)


def _read_batch(dataset: ImageDataset, indices: Sequence[int], epoch: int | None) -> Batch:
    """Read a batch by index.

    In training (``epoch`` is given) an unreadable image is replaced by the next readable one, so that batches keep
    their size. In evaluation it is left out.
    """
    samples: list[Sample] = []
    unreadable: list[str] = []
    for wanted in indices:
        for index in range(wanted, wanted + (1 if epoch is None else min(len(dataset), 100))):
            try:
                samples.append(dataset.sample(index % len(dataset), epoch or 0))
                break
            except UnreadableImageError as error:
                unreadable.append(str(error))
    return _stack(samples, unreadable)


def _collate(dataset: StreamDataset, batch: Sequence[tuple[Any, int, int]], whole: bool) -> Batch:
    samples: list[Sample] = []
    unreadable: list[str] = []
    for record, epoch, index in batch:
        try:
            samples.append(dataset.reader(record, epoch, index))
        except UnreadableImageError as error:
            unreadable.append(f"{record.name}: {error}")
    if whole and samples:  # a stream has no random access: repeat readable images of this micro-batch
        samples += [samples[i % len(samples)] for i in range(len(batch) - len(samples))]
    return _stack(samples, unreadable)


def _stack(samples: Sequence[Sample], unreadable: Sequence[str]) -> Batch:
    if not samples:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), (), tuple(unreadable))
    return Batch(
        torch.stack([sample.image for sample in samples]),
        torch.tensor([sample.label for sample in samples]),
        tuple(sample.name for sample in samples),
        tuple(unreadable),
    )


def _loader_batches(data: Data, shard: BatchShard, start: int) -> Iterator[Batch]:
    """Yield this process's micro-batches of a custom loader, skipping the batches before step ``start``."""
    step = 0
    while True:
        before = step
        for item in data.train:  # type: ignore[union-attr]
            if step >= start:
                yield from _split_batch(item, step, shard, len(data.classes))
            step += 1
        if step == before:
            raise DataError("The training loader yielded no batch; it must allow one iteration per epoch.")


def _split_batch(item: Any, step: int, shard: BatchShard, classes: int) -> Iterator[Batch]:
    images, labels, names, _ = _checked_batch(item, step)
    parts = shard.world_size * shard.accumulate
    if len(images) % parts:
        raise DataError(
            f"Batch {step} of the training loader has {len(images)} images, not a multiple of {parts}; if it is a "
            "smaller last batch, create the loader with drop_last=True."
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(f"Batch {step} of the training loader has labels outside 0 to {classes - 1}.")
    resized = BatchShard(len(images), shard.accumulate, shard.rank, shard.world_size)
    for micro in range(shard.accumulate):
        part = resized.micro_batch(micro)
        yield Batch(images[part], labels[part], names[part])


def _checked_batch(item: Any, number: int) -> Batch:
    if not (isinstance(item, (tuple, list)) and len(item) >= 2 and all(isinstance(x, Tensor) for x in item[:2])):
        raise DataError("A custom loader must give (images, labels) tensors, or (images, labels, names).")
    if len(item[0]) != len(item[1]) or not len(item[0]):
        raise DataError(
            f"Batch {number} of a loader has {len(item[0])} images and {len(item[1])} labels; give one label for each "
            "image, and at least one image."
        )
    names = (
        tuple(map(str, item[2])) if len(item) > 2 else tuple(f"batch {number} image {i}" for i in range(len(item[0])))
    )
    if item[1].dtype not in INTEGERS:
        raise DataError(
            f"Batch {number} of a loader has labels of {item[1].dtype}; give class numbers. For soft labels set mixup, "
            "cutmix or label_smoothing."
        )
    return Batch(item[0], item[1].long(), names)
