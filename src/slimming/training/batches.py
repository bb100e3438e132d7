"""The order of a run: which images each process sees at which step.

Everything here is a function of the seed and the step. The order of an epoch is a permutation of (seed,
epoch); a global batch is cut into contiguous shares, one per process, and each share into contiguous parts
when gradients are accumulated. So a run that starts at step s sees what an undisturbed run sees, and two
processes see together what one would see alone.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from slimming.errors import ConfigError, DataError
from slimming.training.images import UnreadableImageError, derive_seed
from slimming.training.samples import Data, ImageDataset, Loader, Sample, StreamDataset, UnreadableCounter


class Batch(NamedTuple):
    """Images (B, C, H, W), labels (B,), the images' names, and the names of images that could not be read."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class BatchShard:
    """What part of each global batch one process takes.

    Raises:
        ConfigError: the batch cannot be cut into equal parts.
    """

    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.world_size * self.accumulate):
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be cut into {self.world_size} process(es) times {self.accumulate} "
                f"accumulated parts; make it a multiple of {self.world_size * self.accumulate}."
            )

    @property
    def micro_batch_size(self) -> int:
        """Images of one part."""
        return self.batch_size // (self.world_size * self.accumulate)

    def micro_batch(self, micro: int) -> slice:
        """Return the places of part ``micro`` of this process within the global batch."""
        first = (self.rank * self.accumulate + micro) * self.micro_batch_size
        return slice(first, first + self.micro_batch_size)


def steps_per_epoch(train: ImageDataset | StreamDataset | Loader, batch_size: int) -> int | None:
    """Return the optimizer steps of one epoch, or None where the data does not know its length.

    Raises:
        ConfigError: there are fewer images than one batch takes.
    """
    if isinstance(train, StreamDataset):
        images = train.length
    elif isinstance(train, ImageDataset):
        images = len(train)
    else:
        return len(train) if isinstance(train, DataLoader) else None
    if images is not None and images < batch_size:
        raise ConfigError(f"batch_size {batch_size} is more than the {images} training images; make it smaller.")
    return None if images is None else images // batch_size


def train_batches(data: Data, shard: BatchShard, seed: int, start: int, workers: int) -> Iterator[Batch]:
    """Yield this process's parts of every batch from step ``start`` on, ``accumulate`` per step."""
    if not isinstance(data.train, (ImageDataset, StreamDataset)):
        yield from _loader_batches(data, shard, start)
        return
    train = data.train
    plan = _ShuffledBatches(train, shard, seed) if isinstance(train, ImageDataset) else _StreamedBatches(train, shard)
    yield from _loader(_MicroBatches(plan, start * shard.accumulate), workers)


def first_batches(data: Data, images: int, batch_size: int, seed: int, workers: int) -> Iterator[Batch]:
    """The first ``images`` of the training with this seed, the same in every process.

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


def calibration_images(data: Data, images: int = 256, *, batch_size: int = 64, seed: int = 0) -> list[Tensor]:
    """Return some training images as batches of shape (B, C, H, W), the same for the same seed.

    For `slimming.cut`, which uses no labels. Of data of one's own that cannot be read twice, they are the next images.

    Args:
        data: the training part is read.
        images: how many, or all if there are fewer.
        batch_size: images per batch, at most.
        seed: of the order, and of the augmentation where there is one.

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
    """The same images as `calibration_images`, with their labels and names.

    Raises:
        ConfigError: ``images`` is below 1.
        DataError: more images are unreadable than the data allows.
    """
    if images < 1:
        raise ConfigError(f"{images} calibration images: give 1 or more.")
    if isinstance(data.train, ImageDataset):
        images = min(images, len(data.train))
        batch_size = -(-images // -(-images // batch_size))  # equal batches, so that no image comes twice
        batch_size = batch_size if -(-images // batch_size) * batch_size <= len(data.train) else 1
    return list(first_batches(data, images, batch_size, seed, workers=0))


def validation_batches(
    val: ImageDataset | StreamDataset | Loader,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yield every image of ``val`` once, each ``world``-th batch beginning with number ``rank``."""
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
    """Numbered parts of batches of data that can be read in any order."""

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
    """Numbered parts of batches of data that must be read in order; what is not wanted is not decoded."""

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
        """The first image of the batch that can be read, for a part that has none."""
        for record in batch:
            found = _collate(self.dataset, [record], whole=False)
            if found.names:
                images = found.images.expand(self.shard.micro_batch_size, -1, -1, -1)
                names, labels = (
                    found.names * self.shard.micro_batch_size,
                    found.labels.expand(self.shard.micro_batch_size),
                )
                return Batch(images, labels, names, part.unreadable)
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
    """Parts number ``first``, ``first + 1`` ...

    With several workers each makes every n-th, and torch's loader takes from them in turn: the order stays.
    """

    def __init__(self, plan: _ShuffledBatches | _StreamedBatches, first: int) -> None:
        self.plan, self.first = plan, first

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        return self.plan.micro_batches(count(self.first + offset, stride))


class _EvaluationBatches(torch.utils.data.Dataset[Batch]):
    """Whole batches of a data set in its own order, by number."""

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
        generator=torch.Generator(),  # for the workers' seed, which would come from the run's generator
    )


def _init_worker(_: int) -> None:
    """Leave Ctrl-C to the main process, which wants to finish its step and save; spare the other cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _read_batch(dataset: ImageDataset, indices: Sequence[int], epoch: int | None) -> Batch:
    """Read images by index.

    In training (``epoch`` is given) the next readable image takes an unreadable one's place, so that batches
    stay whole; in evaluation it is left out.
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
    if whole and samples:  # a stream cannot reach for another image, so readable ones of this part come twice
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
    """Share out the batches of a user's own loader, passing over those before step ``start``."""
    step = 0
    while True:
        before = step
        for item in data.train:  # type: ignore[union-attr]
            if step >= start:
                yield from _split_batch(item, step, shard, len(data.classes))
            step += 1
        if step == before:
            raise DataError("The training loader gave no batch; give one that can be iterated anew for each epoch.")


def _split_batch(item: Any, step: int, shard: BatchShard, classes: int) -> Iterator[Batch]:
    images, labels, names, _ = _checked_batch(item, step)
    parts = shard.world_size * shard.accumulate
    if len(images) % parts:
        raise DataError(
            f"Batch {step} of the training loader has {len(images)} images, not a multiple of {parts}; if it is a "
            "smaller last batch, make the loader with drop_last=True."
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(f"Batch {step} of the training loader has labels outside 0 to {classes - 1}.")
    mine = BatchShard(len(images), shard.accumulate, shard.rank, shard.world_size)
    for micro in range(shard.accumulate):
        part = mine.micro_batch(micro)
        yield Batch(images[part], labels[part], names[part])


def _checked_batch(item: Any, number: int) -> Batch:
    if not (isinstance(item, (tuple, list)) and len(item) >= 2 and all(isinstance(x, Tensor) for x in item[:2])):
        raise DataError("A loader of your own must give (images, labels) tensors, or (images, labels, names).")
    names = (
        tuple(map(str, item[2])) if len(item) > 2 else tuple(f"batch {number} image {i}" for i in range(len(item[0])))
    )
    if item[1].is_floating_point():
        raise DataError(
            f"Batch {number} of a loader has labels of {item[1].dtype}; give class numbers. Soft labels are made by "
            "mixup, cutmix and label_smoothing."
        )
    return Batch(item[0], item[1].long(), names)
