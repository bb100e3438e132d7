"""Fisher scores: mean squared derivatives of the log-likelihood with respect to a factor on each unit.

Half of this mean approximates, to second order, the KL divergence between the outputs with and without the unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slimming.core.groups import Group
from slimming.core.pruning_plan import Plan
from slimming.errors import ConfigError, NonFiniteLossError
from slimming.masks.soft_masks import attach_
from slimming.models.activations import own_share
from slimming.models.hosts import classes_of
from slimming.models.prunable import PrunableModel
from slimming.training.batches import Batch
from slimming.training.distributed import add_up
from slimming.training.images import derive_seed
from slimming.training.tasks import logits_by_head

IMAGES_PER_PASS, DRAWS = 8, 2
"""Images per backward pass with drawn labels, and number of draws per image: more passes reduce the noise."""


@torch.enable_grad()
def fisher_scores(
    prunable: PrunableModel,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    *,
    drawn: bool = True,
    seed: int = 0,
    after: Plan | None = None,
) -> dict[str, Tensor]:
    """Return half the mean square, over single images, of the log-likelihood's derivative along each unit's factor.

    Args:
        prunable: a model without masks in evaluation mode; it is not changed.
        groups: groups of the model.
        batches: calibration images, the same on every process.
        drawn: whether labels are drawn from the model's predictions, or taken from the batches.
        seed: seed of the draws.
        after: a plan for these groups; the scores are those of the model cut by it.

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
    size = IMAGES_PER_PASS if drawn else 1
    parts = [
        part for batch in batches for part in zip(batch.images.split(size), batch.labels.split(size), strict=False)
    ]
    draws = DRAWS if drawn else 1
    loss = _negative_log_likelihood if classes_of(model) > 1 else _random_projection
    for number, (images, labels) in own_share(list(enumerate(parts))):
        generator = torch.Generator().manual_seed(derive_seed(seed, number))
        output, _ = logits_by_head(model(images.to(like.device, like.dtype)))
        if not bool(torch.isfinite(output).all()):
            raise NonFiniteLossError("The model's outputs are not finite. Check its weights and the images.")
        for draw in range(draws):
            value = loss(output.float(), None if drawn else labels.to(like.device), generator)
            grads = torch.autograd.grad(value, list(factors.values()), retain_graph=draw + 1 < draws, allow_unused=True)
            for total, grad in zip(squares.values(), grads, strict=True):
                if grad is not None:
                    total += grad.double().square()
            count += len(images)
    add_up(count, *squares.values())
    result = {name: (total / count / 2).float().cpu() for name, total in squares.items()}
    if not all(bool(torch.isfinite(score).all()) for score in result.values()):
        raise NonFiniteLossError(
            "The gradients of the model's outputs are not finite. Check its weights and the images."
        )
    return result


def _negative_log_likelihood(logits: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """Sum over images of the cross-entropy with the labels, or with labels drawn from the logits (B, K, …)."""
    if labels is None:
        probabilities = logits.detach().softmax(1).movedim(1, -1)
        drawn = torch.multinomial(probabilities.reshape(-1, probabilities.shape[-1]).cpu(), 1, generator=generator)
        labels = drawn.to(logits.device).reshape(probabilities.shape[:-1])
    return F.cross_entropy(logits, labels, reduction="sum")


def _random_projection(features: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """Sum of features times normal noise: its gradient is that of the log-likelihood of features with normal noise."""
    if labels is not None:
        raise ConfigError("Score 'taylor' needs a model with a classifier; take score 'compensated'.")
    return (features * torch.randn(features.shape, generator=generator).to(features.device)).sum()
