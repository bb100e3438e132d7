"""Evaluate a model: top-1 accuracy and loss over all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from slimming.core.argument_types import checked_arguments
from slimming.core.modules import check_whole, in_evaluation, run_on_images
from slimming.errors import ConfigError, DataError
from slimming.training.batches import validation_batches
from slimming.training.distributed import add_up, agreed, rank_and_world_size
from slimming.training.guards import explain_out_of_memory
from slimming.training.outputs import logits_by_head
from slimming.training.samples import ImageDataset, Loader, StreamDataset, UnreadableCounter


@agreed()
@checked_arguments
def evaluate(
    model: nn.Module,
    images: ImageDataset | StreamDataset | Loader,
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    workers: int = 0,
    precision: str = "no",
) -> dict[str, float]:
    """Return ``{"top1": accuracy in [0, 1], "loss": mean cross-entropy, "images": number of evaluated images}``.

    Each image counts exactly once for any batch size and number of processes. The mode of the model is restored. The
    model is not moved unless ``device`` is given.

    Args:
        model: returns logits (B, K), alone or called ``logits`` among other outputs.
        images: the validation images of a `Data`.
        batch_size: images per forward pass.
        device: device to evaluate on; None is the device of the first parameter.
        workers: number of worker processes that read images.
        precision: autocast of the forward pass, as in `TrainConfig`.

    Raises:
        DataError: too many or all images are unreadable, a label is not a class of the model, or the images are of
            other classes than the model.
        ConfigError: out of memory, or the model does not return one row of logits per image.

    >>> import timm, slimming
    >>> from slimming.demo import settings
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=8, val_limit=8)
    >>> data = slimming.open_data(images, model)
    >>> sorted(slimming.evaluate(model, data.val))
    ['images', 'loss', 'top1']
    """
    check_whole(model)
    parameter = next(model.parameters())
    dtype, device = parameter.dtype, torch.device(device or parameter.device)
    rank, world_size = rank_and_world_size()
    unreadable = UnreadableCounter.of(images)
    sums = torch.zeros(3, dtype=torch.float64)
    model.to(device)
    advice = f"in evaluation with {batch_size} images per forward pass: make batch_size smaller, or accumulate larger"
    with in_evaluation(model), torch.no_grad(), explain_out_of_memory(advice), autocast(device, precision):
        for batch in validation_batches(images, batch_size, rank, world_size, workers):
            unreadable.add(batch.unreadable)
            if not len(batch.labels):
                continue
            labels = batch.labels.to(device)
            logits = logits_by_head(run_on_images(model, batch.images.to(device, dtype)))[0].float()
            if logits.ndim != 2:
                raise ConfigError(
                    f"The model gives logits of shape {tuple(logits.shape)}, but top-1 needs one row per image. "
                    "Measure it with your own function, which slimming.train and slimming.search take as evaluate."
                )
            check_classes_of_model("The model", model, logits.shape[1], images)
            if not 0 <= int(batch.labels.min()) <= int(batch.labels.max()) < logits.shape[1]:
                raise DataError(f"Validation labels lie outside 0 to {logits.shape[1] - 1}, the model's classes.")
            correct = (logits.argmax(1) == labels).sum()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.tensor([correct.item(), loss.item(), len(labels)], dtype=torch.float64)
    if world_size > 1:
        sums = sums.to(device)
        add_up(sums)
    correct, loss, count = sums.tolist()
    if not count:
        raise DataError("None of the validation images could be read; repair them, or give other validation data.")
    return {"top1": correct / count, "loss": loss / count, "images": int(count)}


def check_classes_of_model(
    who: str, model: nn.Module, known: int, images: ImageDataset | StreamDataset | Loader
) -> None:
    """Check that the classes of ``images`` are those of the model: their number, and their names if both have names.

    Nothing is checked for a custom loader, whose classes are unknown.

    Args:
        who: the model in messages.
        model: its class names are those of ``label_names`` in its ``pretrained_cfg``, if they fit.
        known: number of classes of the model.
        images: the images.

    Raises:
        DataError: the classes differ.
    """
    classes = images.classes if isinstance(images, (ImageDataset, StreamDataset)) else ()
    if not classes:
        return
    if known != len(classes):
        raise DataError(
            f"{who} knows {known} classes, the data has {len(classes)} ({_first(classes)}); give the data that it was "
            "trained for."
        )
    names = tuple((getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ())
    if len(names) == known and names != classes:
        raise DataError(
            f"{who} was trained for other classes ({_first(names)}) than those of the data ({_first(classes)}); give "
            "the data that it was trained for."
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a precision: ``"no"``, ``"bf16"`` or ``"fp16"``; ``"no"`` keeps float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "no")
