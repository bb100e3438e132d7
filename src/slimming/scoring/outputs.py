"""The outputs of a model that count in scores, their spreads, and the distance between outputs.

All scores, and the sensitivity of kinds, take the outputs from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.core.modules import run_on_images
from slimming.errors import ConfigError, NonFiniteLossError
from slimming.models.activations import own_share
from slimming.models.hosts import classes_of
from slimming.training.batches import Batch
from slimming.training.distributed import add_up
from slimming.training.outputs import CLASSES, VALUES, CountedOutput, class_dim, kind_of, named_outputs

IMAGES_PER_PASS = 8
"""Images per pass with drawn labels."""
CONVEX = {VALUES: torch.square, CLASSES: lambda p: 2 * torch.xlogy(p, p)}
"""For each kind of output, the function that gives its spread, see `_spreads`."""


def outputs_that_count(model: nn.Module, batches: Sequence[Batch]) -> tuple[CountedOutput, ...]:
    """Return the outputs of a model that count in its scores, see `named_outputs`, with their scales.

    Outputs that are the same for all images do not count.

    Args:
        model: a model in evaluation mode; it is not changed.
        batches: calibration images, the same on every process.

    Raises:
        ConfigError: the model has no such output, or several that are the same for all images or change in shape.
    """
    classes = classes_of(model)
    like = next(model.parameters())
    first = batches[0].images[:IMAGES_PER_PASS].to(like.device, like.dtype)
    with torch.no_grad():
        named = named_outputs(run_on_images(model, first), len(first))
    if len(named) == 1:
        [(name, tensor)] = named.items()
        return (CountedOutput(name=name, kind=kind_of(name, tensor, single=True, classes=classes)),)
    kinds = {name: kind_of(name, tensor, single=False, classes=classes) for name, tensor in named.items()}
    spreads = _spreads(model, named, kinds, batches)
    counted = [
        CountedOutput(name=name, kind=kinds[name], scale=spread**0.5) for name, spread in spreads.items() if spread > 0
    ]
    if not counted:
        raise ConfigError(
            f"The outputs of the model ({', '.join(named)}) are the same for all images; give two images or more that "
            "differ."
        )
    return tuple(counted)


@torch.no_grad()
def _spreads(
    model: nn.Module, named: Mapping[str, Tensor], kinds: Mapping[str, str], batches: Sequence[Batch]
) -> dict[str, float]:
    """Return the spread of each output, see `CountedOutput`; 0 if it is rounding noise.

    Variance and mean divergence are both the mean of a convex function of the values minus its value at their mean.
    """
    classes, like = classes_of(model), next(model.parameters())
    sums = {name: torch.zeros(2, *tensor.shape[1:], dtype=torch.float64) for name, tensor in named.items()}
    sums = {name: total.to(like.device) for name, total in sums.items()}
    count = torch.zeros((), dtype=torch.float64, device=like.device)
    parts = [images for batch in batches for images in batch.images.split(IMAGES_PER_PASS)]
    for images in own_share(parts):
        found = named_outputs(run_on_images(model, images.to(like.device, like.dtype)), len(images))
        for name, total in sums.items():
            if name not in found or found[name].shape[1:] != total.shape[1:]:
                raise ConfigError(
                    f"Output {name} of the model does not have the same shape for all images, so that its spread is "
                    "unknown. Wrap the model in a module that returns outputs of one shape."
                )
            values = finite(found[name]).double()
            if kinds[name] == CLASSES:
                values = values.softmax(class_dim(values, classes))
            total += torch.stack([values.sum(0), CONVEX[kinds[name]](values).sum(0)])
        count += len(images)
    add_up(count, *sums.values())
    result = {}
    for name, (total, convex) in sums.items():
        spread = float((convex / count - CONVEX[kinds[name]](total / count)).sum())
        result[name] = spread if spread > 1e-12 * float((convex / count).abs().sum()) else 0.0
    return result


def divergence(
    model: nn.Module, images: Sequence[Tensor], outputs: Sequence[CountedOutput]
) -> Callable[[nn.Module], float]:
    """Return a function that computes how far the outputs of a model are from those of ``model``, per image.

    It is the sum over the outputs of the KL divergence of predictions, or half the squared error of other values,
    each over its squared scale. It is exactly 0 for the unchanged model, so that few images suffice, and it is
    informative even if the model fits its training images perfectly.

    Args:
        model: the model to compare with.
        images: batches of images.
        outputs: the outputs that count.
    """
    classes = classes_of(model)

    def compared(other: nn.Module) -> list[Tensor]:
        batches = [named_outputs(other(batch), len(batch)) for batch in images]
        values = [torch.cat([batch[output.name].double() for batch in batches]) for output in outputs]
        return [
            value.log_softmax(class_dim(value, classes)) if output.kind == CLASSES else value
            for value, output in zip(values, outputs, strict=True)
        ]

    reference = compared(model)

    def distance(trial: nn.Module) -> float:
        total = 0.0
        for output, value, before in zip(outputs, compared(trial), reference, strict=True):
            if output.kind == CLASSES:
                error = F.kl_div(value, before, reduction="batchmean", log_target=True)
            else:
                error = (value - before).square().sum() / (2 * len(value))
            total += error.item() / output.scale**2
        return total

    return distance


def finite(values: Tensor) -> Tensor:
    """Return an output of the model.

    Raises:
        NonFiniteLossError: it is NaN or infinite.
    """
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteLossError("The model's outputs are not finite. Check its weights and the images.")
    return values
