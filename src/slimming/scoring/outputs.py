"""The outputs of a model that count in scores, their spreads, and the distance between outputs.

All scores, and the sensitivity of kinds, take the outputs from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.core.calibration import CalibrationBatch
from slimming.errors import ConfigError, NonFiniteLossError
from slimming.models.activations import own_share
from slimming.models.hosts import classes_of
from slimming.models.raw_outputs import raw_kind, raw_output_modules
from slimming.training.distributed import add_up
from slimming.training.outputs import (
    BINARY,
    CLASSES,
    VALUES,
    CountedOutput,
    class_dim,
    kind_of,
    named_outputs,
    named_tensors,
)

IMAGES_PER_PASS = 8
"""Images per pass with drawn labels."""
CONVEX = {
    VALUES: torch.square,
    CLASSES: lambda p: 2 * torch.xlogy(p, p),
    BINARY: lambda p: 2 * (torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)),
}
"""For each kind of output, the function that gives its spread, see `_spreads`."""

Outputs = Callable[[Any], Any] | Sequence[str]
"""Which outputs count: a function that gets what the model returns and gives those that count, in any nested form; or
the names of modules whose outputs count instead."""


@dataclass(frozen=True)
class OutputReader:
    """Runs a model and gives its outputs that count, by name.

    Attributes:
        choice: the outputs that count; None takes what the model returns, or what the heads of a detector return whose
            own outputs are selected boxes, see `slimming.models.raw_outputs`.
    """

    choice: Outputs | None = None

    def modules(self, model: nn.Module) -> tuple[str, ...]:
        """The names of the modules whose outputs count; empty if the outputs of the model do.

        Raises:
            ConfigError: the model has no such module.
        """
        if self.choice is None:
            return raw_output_modules(model)
        if callable(self.choice):
            return ()
        known = dict(model.named_modules())
        names = (self.choice,) if isinstance(self.choice, str) else tuple(self.choice)
        for name in names:
            if name not in known:
                raise ConfigError(f"outputs names {name!r}, which is no module of this {type(model).__name__}.")
        return names

    def read(self, model: nn.Module, batch: CalibrationBatch) -> dict[str, Tensor]:
        """Run ``model`` on ``batch``, which is in its dtype and on its device.

        Raises:
            ConfigError: no output counts.
            DataError: the model fails on the batch.
        """
        modules = self.modules(model)
        if not modules:
            output = batch.run(model)
            return named_outputs(self.choice(output) if callable(self.choice) else output, batch.size)
        found: dict[str, Any] = {name: [] for name in modules}
        handles = [
            model.get_submodule(name).register_forward_hook(lambda _, args, output, to=found[name]: to.append(output))
            for name in modules
        ]
        try:
            batch.run(model)
        finally:
            for handle in handles:
                handle.remove()
        by_name = {name: outputs[0] if len(outputs) == 1 else outputs for name, outputs in found.items()}
        named = {name: tensor for name, tensor in named_tensors(by_name).items() if tensor.is_floating_point()}
        if not named:
            raise ConfigError(f"The modules {', '.join(modules)} give no floating-point tensor.")
        return named

    def kinds(self, model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, str]:
        """The kind of each output, see `CountedOutput`."""
        if self.choice is None and self.modules(model):
            return {name: raw_kind(name) for name in named}
        classes, single = classes_of(model), len(named) == 1
        return {name: kind_of(name, tensor, single=single, classes=classes) for name, tensor in named.items()}


def outputs_that_count(
    model: nn.Module, batches: Sequence[CalibrationBatch], reader: OutputReader | None = None
) -> tuple[CountedOutput, ...]:
    """Return the outputs of a model that count in its scores, see `named_outputs`, with their scales.

    Outputs that are the same for all images do not count.

    Args:
        model: a model in evaluation mode; it is not changed.
        batches: calibration batches, the same on every process.
        reader: gives the outputs.

    Raises:
        ConfigError: the model has no such output, or several that are the same for all images or change in shape.
    """
    reader = reader or OutputReader()
    with torch.no_grad():
        named = reader.read(model, batches[0].split(IMAGES_PER_PASS)[0].to(next(model.parameters())))
    kinds = reader.kinds(model, named)
    if len(named) == 1:
        [(name, kind)] = kinds.items()
        return (CountedOutput(name=name, kind=kind),)
    spreads = _spreads(model, named, kinds, batches, reader)
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
    model: nn.Module,
    named: Mapping[str, Tensor],
    kinds: Mapping[str, str],
    batches: Sequence[CalibrationBatch],
    reader: OutputReader,
) -> dict[str, float]:
    """Return the spread of each output, see `CountedOutput`; 0 if it is rounding noise.

    Variance and mean divergence are both the mean of a convex function of the values minus its value at their mean. The
    mean is taken over the images; for the outputs of modules, whose number of rows may change, over rows and positions.
    """
    classes, like = classes_of(model), next(model.parameters())
    rows = bool(reader.modules(model))

    def entries(name: str, tensor: Tensor) -> Tensor:
        """The values (N, ...), whose mean over N is taken."""
        values = finite(tensor).double()
        dim = class_dim(values, classes) if values.ndim > 1 else 0
        values = _predicted(values, kinds[name], dim)
        return values.movedim(dim, -1).flatten(0, -2) if rows else values

    sums = {name: torch.zeros(2, *entries(name, tensor).shape[1:]) for name, tensor in named.items()}
    sums = {name: total.to(like.device, torch.float64) for name, total in sums.items()}
    counts = {name: torch.zeros((), dtype=torch.float64, device=like.device) for name in ("", *named)}
    for part in own_share([part for batch in batches for part in batch.split(IMAGES_PER_PASS)]):
        found = reader.read(model, part.to(like))
        for name, total in sums.items():
            values = entries(name, found[name]) if name in found else None
            if values is None or values.shape[1:] != total.shape[1:]:
                raise ConfigError(
                    f"Output {name} of the model does not have the same shape for all images, so that its spread is "
                    "unknown. Name the outputs that count with outputs, or wrap the model in a module that returns "
                    "outputs of one shape."
                )
            total += torch.stack([values.sum(0), CONVEX[kinds[name]](values).sum(0)])
            counts[name] += len(values)
        counts[""] += part.size
    add_up(*counts.values(), *sums.values())
    result = {}
    for name, (total, convex) in sums.items():
        count = counts[name].clamp_min(1)
        spread = float((convex / count - CONVEX[kinds[name]](total / count)).sum())
        result[name] = spread if spread > 1e-12 * float((convex / count).abs().sum()) else 0.0
        result[name] *= float(count / counts[""])
    return result


def _predicted(values: Tensor, kind: str, dim: int) -> Tensor:
    """The predicted probabilities of logits; other values as they are."""
    return values.softmax(dim) if kind == CLASSES else values.sigmoid() if kind == BINARY else values


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
            elif output.kind == BINARY:
                cross, own = (F.binary_cross_entropy_with_logits(x, before.sigmoid(), reduction="sum")
                              for x in (value, before))  # fmt: skip
                error = (cross - own) / len(value)
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
