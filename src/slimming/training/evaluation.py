"""Top-1 and loss of a model, exact over all processes."""

from __future__ import annotations

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn

from slimming.core.modules import in_evaluation
from slimming.errors import DataError
from slimming.training.batches import validation_batches
from slimming.training.distributed import rank_and_world_size
from slimming.training.guards import explain_out_of_memory
from slimming.training.samples import ImageDataset, Loader, StreamDataset, UnreadableCounter
from slimming.training.tasks import logits_by_head


def evaluate(
    model: nn.Module,
    images: ImageDataset | StreamDataset | Loader,
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    workers: int = 0,
    precision: str = "no",
) -> dict[str, float]:
    """Return ``{"top1": share correct, "loss": mean cross-entropy, "images": how many were counted}``.

    Every image counts once, whatever the batch size and the number of processes. The model's mode is given
    back as it was; it is not moved unless ``device`` is given.

    Args:
        model: gives logits (B, K), or an object that holds ``logits``.
        images: the validation part of `Data`.
        batch_size: images per forward pass.
        device: where to compute; None means where the model's first parameter is.
        workers: processes that read images.
        precision: autocast, as in `TrainConfig`.

    Raises:
        DataError: more images are unreadable than the data allows, none is left, or a label is none of the model's.
        ConfigError: out of memory.

    >>> import timm, slimming
    >>> from slimming.demo import settings
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=8, val_limit=8)
    >>> data = slimming.open_data(images, model)
    >>> sorted(slimming.evaluate(model, data.val))
    ['images', 'loss', 'top1']
    """
    dtype, place = next(model.parameters()).dtype, torch.device(device or next(model.parameters()).device)
    rank, world_size = rank_and_world_size()
    unreadable = UnreadableCounter.of(images)
    sums = torch.zeros(3, dtype=torch.float64)
    model.to(place)
    advice = f"in evaluation, with {batch_size} images at once: make batch_size smaller, or accumulate in a run larger"
    with in_evaluation(model), torch.no_grad(), explain_out_of_memory(advice), autocast(place, precision):
        for batch in validation_batches(images, batch_size, rank, world_size, workers):
            unreadable.add(batch.unreadable)
            if not len(batch.labels):
                continue
            labels = batch.labels.to(place)
            logits = logits_by_head(model(batch.images.to(place, dtype)))[0].float()
            if not 0 <= int(batch.labels.min()) <= int(batch.labels.max()) < logits.shape[1]:
                raise DataError(f"Validation labels lie outside 0 to {logits.shape[1] - 1}, the model's classes.")
            correct = (logits.argmax(1) == labels).sum()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.tensor([correct.item(), loss.item(), len(labels)], dtype=torch.float64)
    if world_size > 1:
        sums = sums.to(place)
        torch.distributed.all_reduce(sums)
    correct, loss, count = sums.tolist()
    if not count:
        raise DataError("No validation image could be read; there is nothing to evaluate on.")
    return {"top1": correct / count, "loss": loss / count, "images": int(count)}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a precision; ``"no"`` leaves everything in float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "no")
