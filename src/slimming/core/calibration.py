"""Calibration batches: what a model is run on to score its units and to refit its layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.example_inputs import ExampleCall, given_calls
from slimming.core.modules import explain_input_errors
from slimming.errors import DataError

NO_LABEL = -1
"""Label of images that were given without labels."""


@dataclass(frozen=True)
class CalibrationBatch:
    """A batch in the form in which a loader gives it: images, images with targets, or the arguments of the model.

    Attributes:
        whole: all entries of the batch, which a custom loss gets.
        arguments: number of positional entries that the model gets; the others are targets.
    """

    whole: ExampleCall
    arguments: int = 1

    @staticmethod
    def of(model: nn.Module, batch: Any) -> CalibrationBatch:
        """The batch ``batch`` for ``model``.

        Args:
            model: the model; it gets as many entries of a tuple as its example inputs have positional arguments, or one
                if it has no example inputs.
            batch: a tensor, a list of images, a tuple of positional or a mapping of keyword arguments; or the result of
                this function.

        Raises:
            DataError: there is no floating-point tensor in the batch.
        """
        if isinstance(batch, CalibrationBatch):
            return batch
        whole, examples = ExampleCall.of(batch), given_calls(model)
        if not any(tensor.is_floating_point() and tensor.dim() for tensor in whole.tensors):
            raise DataError(
                f"A batch of type {type(batch).__name__} has no floating-point tensor. Give batches of images of shape "
                "(B, C, H, W), or the arguments of the model's forward: a tuple, a dict, or a list of images."
            )
        return CalibrationBatch(whole, max(1, len(examples[0].args)) if examples else 1)

    @property
    def call(self) -> ExampleCall:
        """The call of the model."""
        return ExampleCall(self.whole.args[: self.arguments], self.whole.kwargs)

    @property
    def size(self) -> int:
        """Number of images."""
        return self.call.size

    @property
    def labels(self) -> Tensor | None:
        """The labels of the classes (B,); None if the batch has no such targets."""
        targets = self.whole.args[self.arguments :]
        first = targets[0] if targets else None
        return first if isinstance(first, Tensor) and first.dim() == 1 and not first.is_floating_point() else None

    def to(self, like: Tensor) -> CalibrationBatch:
        """The batch in the dtype and on the device of ``like``."""
        return CalibrationBatch(self.whole.to(like.dtype, like.device), self.arguments)

    def split(self, size: int) -> list[CalibrationBatch]:
        """The batch in parts of at most ``size`` images."""
        return [CalibrationBatch(part, self.arguments) for part in self.whole.split(size)]

    def run(self, model: nn.Module) -> Any:
        """Return what ``model`` gives for the batch.

        Raises:
            DataError: the model fails on it, for example because images have another size.
        """
        call = self.call
        what = "images" if call.is_batched else "a list of images, the first"
        with explain_input_errors(f"{what} of shape {tuple(call.main.shape)}"):
            return call.run(model)


def labelled(images: Tensor, labels: Tensor | None = None) -> CalibrationBatch:
    """The batch of images (B, C, H, W) and labels (B,), which are `NO_LABEL` if there are none."""
    labels = torch.full((len(images),), NO_LABEL) if labels is None else labels
    return CalibrationBatch(ExampleCall((images, labels)))


def given_batches(model: nn.Module, data: Any, images: int, dims: int) -> list[CalibrationBatch]:
    """The batches that a user gave.

    Args:
        model: the model that takes them.
        data: one tensor of images; or batches, see `CalibrationBatch.of`. A sequence is used as a whole; of another
            iterable, such as a loader, the first batches.
        images: number of images after which an iterable that is no sequence is not read any further.
        dims: number of dimensions of a batch of images.

    Raises:
        DataError: there is no batch, or one has no images of the model.
    """
    expected = "Give data of slimming.open_data, or batches of images of shape (B, C, H, W)"
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, dict)):
        raise DataError(f"{expected}, or a list of what the model's forward takes; this is {type(data).__name__}.")
    found: list[CalibrationBatch] = []
    for batch in [data] if isinstance(data, Tensor) else data:
        if isinstance(batch, Tensor):
            if batch.dim() != dims:
                raise DataError(f"{expected}; this one has shape {tuple(batch.shape)}.")
            found.append(labelled(batch))
        else:
            found.append(CalibrationBatch.of(model, batch))
        if not isinstance(data, Sequence) and sum(each.size for each in found) >= images:
            break
    if not found:
        raise DataError(f"{expected}; there is none.")
    return found
