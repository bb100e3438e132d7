"""Fisher scores: mean squared derivatives of the log-likelihood with respect to a factor on each unit.

All outputs of the model that count enter the likelihood: logits by labels drawn from their softmax, other values by
normal noise as large as their spread between images.

Half of this mean approximates, to second order, the KL divergence between the outputs with and without the unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.core.calibration import CalibrationBatch
from slimming.core.groups import Group
from slimming.core.pruning_plan import Plan
from slimming.errors import ConfigError, NonFiniteLossError
from slimming.masks.soft_masks import attach_
from slimming.models.activations import own_share
from slimming.models.hosts import classes_of
from slimming.models.prunable import PrunableModel
from slimming.scoring.outputs import IMAGES_PER_PASS, OutputReader, finite, outputs_that_count
from slimming.training.distributed import add_up
from slimming.training.images import derive_seed
from slimming.training.outputs import BINARY, CLASSES, CountedOutput, class_dim, logits_by_head
from slimming.training.tasks import Loss, scalars

DRAWS = 2
"""Draws of labels per image: more passes reduce the noise."""


@torch.enable_grad()
def fisher_scores(
    prunable: PrunableModel,
    groups: Sequence[Group],
    batches: Sequence[CalibrationBatch],
    *,
    drawn: bool = True,
    seed: int = 0,
    after: Plan | None = None,
    outputs: Sequence[CountedOutput] | None = None,
    reader: OutputReader | None = None,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Return half the mean square, over single images, of the log-likelihood's derivative along each unit's factor.

    Args:
        prunable: a model without masks in evaluation mode; it is not changed.
        groups: groups of the model.
        batches: calibration batches, the same on every process.
        drawn: whether labels are drawn from the model's predictions, or taken from the batches.
        seed: seed of the draws.
        after: a plan for these groups; the scores are those of the model cut by it.
        outputs: the outputs that count; by default those of `outputs_that_count`.
        reader: gives the outputs.
        loss: custom loss, whose derivative is taken instead of that of the log-likelihood.

    Returns:
        Group name -> score of each unit, shape (size,).

    Raises:
        NonFiniteLossError: the model's outputs or their gradients are not finite.
        ConfigError: ``drawn`` is False and the model has no classes.
    """
    copied = prunable.copy()
    model = copied.model.requires_grad_(False)
    masks = attach_(copied, groups, penalty=dict.fromkeys([group.kind for group in groups], 0.0))
    if after is not None:
        masks.apply_(after)
    factors = {name: mask.requires_grad_(True) for name, mask in masks.items()}
    squares = {name: torch.zeros_like(mask, dtype=torch.float64) for name, mask in factors.items()}
    like = next(model.parameters())
    count = torch.zeros((), dtype=torch.float64, device=like.device)
    # Gradients for drawn labels have mean 0, so the expected square of their sum over images is the sum of squares.
    drawn = drawn and loss is None
    size = IMAGES_PER_PASS if drawn else 1
    parts = [part for batch in batches for part in batch.split(size)]
    reader = reader or OutputReader()
    if outputs is None:
        outputs = outputs_that_count(prunable.model, batches, reader) if drawn else ()
    draws = DRAWS if drawn else 1
    for number, part in own_share(list(enumerate(parts))):
        generator = torch.Generator().manual_seed(derive_seed(seed, number))
        batch = part.to(like)
        if loss is not None:
            measure = partial(_own_loss, loss, model, batch)
        elif drawn:
            measure = partial(_drawn_likelihood, reader.read(model, batch), outputs, classes_of(model), generator)
        else:
            measure = partial(_likelihood, batch.run(model), batch.labels, classes_of(model))
        for draw in range(draws):
            grads = torch.autograd.grad(
                measure(), list(factors.values()), retain_graph=draw + 1 < draws, allow_unused=True
            )
            for total, grad in zip(squares.values(), grads, strict=True):
                if grad is not None:
                    total += grad.double().square()
            count += batch.size
    add_up(count, *squares.values())
    result = {name: (total / count / 2).float().cpu() for name, total in squares.items()}
    if not all(bool(torch.isfinite(score).all()) for score in result.values()):
        raise NonFiniteLossError(
            "The gradients of the model's outputs are not finite. Check its weights and the images."
        )
    return result


def _own_loss(loss: Loss, model: nn.Module, batch: CalibrationBatch) -> Tensor:
    """The custom loss of one image."""
    return finite(scalars(loss(model, batch.whole.value))["loss"])


def _likelihood(output: object, labels: Tensor | None, classes: int) -> Tensor:
    """Cross-entropy of the logits of the classes with labels, summed over images."""
    if classes < 2 or labels is None:
        raise ConfigError("Score 'taylor' needs a model with a classifier; take score 'compensated'.")
    return F.cross_entropy(finite(logits_by_head(output)[0]).float(), labels, reduction="sum")


def _drawn_likelihood(
    named: Mapping[str, Tensor], outputs: Sequence[CountedOutput], classes: int, generator: torch.Generator
) -> Tensor:
    """Negative log-likelihood of values drawn from the outputs themselves, summed over images and outputs.

    The labels of logits are drawn from their softmax, yes-or-no answers from their sigmoid. Other values have normal
    noise: their gradient is that of the sum of the values times noise.
    """
    losses = []
    for counted in outputs:
        values = finite(named[counted.name]).float()
        if counted.kind == CLASSES:
            logits = values.movedim(class_dim(values, classes), 1)
            probabilities = logits.detach().softmax(1).movedim(1, -1)
            drawn = torch.multinomial(probabilities.reshape(-1, probabilities.shape[-1]).cpu(), 1, generator=generator)
            labels = drawn.to(logits.device).reshape(probabilities.shape[:-1])
            value = F.cross_entropy(logits, labels, reduction="sum")
        elif counted.kind == BINARY:
            answers = torch.bernoulli(values.detach().sigmoid().cpu(), generator=generator).to(values.device)
            value = F.binary_cross_entropy_with_logits(values, answers, reduction="sum")
        else:
            value = (values * torch.randn(values.shape, generator=generator).to(values.device)).sum()
        losses.append(value if counted.scale == 1 else value / counted.scale)
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()
