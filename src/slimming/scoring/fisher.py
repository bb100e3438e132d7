"""Slopes of the log-likelihood along the factor of each unit: to second order, what cutting it does to the outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slimming.core.groups import Group
from slimming.core.pruning_plan import Plan
from slimming.errors import ConfigError, NonFiniteLossError
from slimming.masks.soft_masks import attach_
from slimming.models.activations import add_up, own_share
from slimming.models.hosts import classes_of
from slimming.models.prunable import PrunableModel
from slimming.training.batches import Batch
from slimming.training.images import derive_seed
from slimming.training.tasks import logits_by_head

AT_ONCE, DRAWS = 8, 2
"""Images per backward pass where labels are drawn, and how often they are: more passes make less noise."""


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
    """Half the mean square of the log-likelihood's slope along the factor of each unit, over single images.

    Args:
        prunable: a plain model in evaluation mode; it stays as it is.
        groups: some of its groups.
        batches: the same on every process.
        drawn: take labels drawn from what the model says, in place of those of the batches.
        seed: of the draws.
        after: a plan of those groups; the slopes are those of the model that it has cut.

    Returns:
        Group name -> one number per unit, shape (size,).

    Raises:
        NonFiniteLossError: the model's outputs or their slopes are not finite.
    """
    own_copy = prunable.copy()
    model = own_copy.model.requires_grad_(False)
    masks = attach_(own_copy, groups, penalty=dict.fromkeys([group.kind for group in groups], 0.0))
    if after is not None:
        masks.apply_(after)
    own = {name: mask.requires_grad_(True) for name, mask in masks.items()}
    squares = {name: torch.zeros_like(mask, dtype=torch.float64) for name, mask in own.items()}
    like = next(model.parameters())
    count = torch.zeros((), dtype=torch.float64, device=like.device)
    # Slopes for drawn labels are 0 on average, so the square of their sum over images is the sum of squares.
    at_once = AT_ONCE if drawn else 1
    parts = [
        pair for one in batches for pair in zip(one.images.split(at_once), one.labels.split(at_once), strict=False)
    ]
    draws = DRAWS if drawn else 1
    loss = _log_likelihood if classes_of(model) > 1 else _projection
    for number, (images, labels) in own_share(list(enumerate(parts))):
        dice = torch.Generator().manual_seed(derive_seed(seed, number))
        output, _ = logits_by_head(model(images.to(like.device, like.dtype)))
        if not bool(torch.isfinite(output).all()):
            raise NonFiniteLossError("The model's outputs are not finite. Check its weights and the images.")
        for draw in range(draws):
            value = loss(output.float(), None if drawn else labels.to(like.device), dice)
            found = torch.autograd.grad(value, list(own.values()), retain_graph=draw + 1 < draws, allow_unused=True)
            for total, slope in zip(squares.values(), found, strict=True):
                if slope is not None:
                    total += slope.double().square()
            count += len(images)
    add_up(count, *squares.values())
    result = {name: (total / count / 2).float().cpu() for name, total in squares.items()}
    if not all(bool(torch.isfinite(one).all()) for one in result.values()):
        raise NonFiniteLossError("The slopes of the model's outputs are not finite. Check its weights and the images.")
    return result


def _log_likelihood(logits: Tensor, labels: Tensor | None, dice: torch.Generator) -> Tensor:
    """Sum over images of the cross-entropy with their labels, or with labels drawn as the logits (B, K, …) say."""
    if labels is None:
        shares = logits.detach().softmax(1).movedim(1, -1)
        drawn = torch.multinomial(shares.reshape(-1, shares.shape[-1]).cpu(), 1, generator=dice)
        labels = drawn.to(logits.device).reshape(shares.shape[:-1])
    return F.cross_entropy(logits, labels, reduction="sum")


def _projection(features: Tensor, labels: Tensor | None, dice: torch.Generator) -> Tensor:
    """Sum of features along a drawn direction: the log-likelihood's slope where features have normal noise."""
    if labels is not None:
        raise ConfigError("Score 'taylor' needs a model that tells classes apart; take score 'compensated'.")
    return (features * torch.randn(features.shape, generator=dice).to(features.device)).sum()
