"""The scores that units can be ranked by: the one registry that functions, settings, commands and docs read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from slimming.core.groups import Group
from slimming.errors import ConfigError, nearest
from slimming.masks.soft_masks import MASK_SCORES, SoftMasks, attach_
from slimming.models.prunable import PrunableModel
from slimming.scoring.fisher import fisher_scores
from slimming.scoring.iterative import iterative_scores
from slimming.training.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a score is computed from.

    Attributes:
        prunable: the model without masks, in evaluation mode; it stays as it is.
        groups: some of its groups.
        batches: calibration images, the same on every process.
        masks: the masks of a search, with what it collected; None in one shot.
        seed: of the labels drawn.
    """

    prunable: PrunableModel
    groups: Sequence[Group]
    batches: Sequence[Batch]
    masks: SoftMasks | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score.

    Attributes:
        function: gives group name -> score of each unit, shape (size,), float32 on the CPU.
        description: what the number is, and its source.
        one_shot: whether `slimming.score` offers it.
        needs_labels: whether `slimming.score` needs the true labels of its images.
        needs_training: whether a search collects it while weights and masks train, so that one without a training step
            does not have it.
        needs_images: whether it takes calibration images (in a search: after the training).
        kinds: the kinds it ranks by more than the mask alone; None: all.
    """

    function: Callable[[Request], dict[str, Tensor]]
    description: str
    one_shot: bool = True
    needs_labels: bool = False
    needs_training: bool = False
    needs_images: bool = True
    kinds: tuple[str, ...] | None = None


def _fisher(request: Request) -> dict[str, Tensor]:
    return fisher_scores(request.prunable, request.groups, request.batches, seed=request.seed)


def _compensated(request: Request) -> dict[str, Tensor]:
    alone = _fisher(request)
    return iterative_scores(request.prunable, request.groups, alone, request.batches, seed=request.seed)


def _taylor(request: Request) -> dict[str, Tensor]:
    if request.masks is not None:
        return MASK_SCORES["taylor"](request.masks)
    return fisher_scores(request.prunable, request.groups, request.batches, drawn=False, seed=request.seed)


def _contribution(request: Request) -> dict[str, Tensor]:
    return MASK_SCORES["contribution"](_masks(request))


def _mask(request: Request) -> dict[str, Tensor]:
    return MASK_SCORES["mask"](_masks(request))


def _masks(request: Request) -> SoftMasks:
    """The masks of the search, or masks of 1 on a copy of the model."""
    return request.masks or attach_(request.prunable.copy(), request.groups, penalty={})


SCORES: Mapping[str, Score] = {
    "compensated": Score(
        function=_compensated,
        description=(
            "the Fisher score of each unit at the moment it is removed, after others of its kind were removed and "
            "compensation has made up for what it can (ZipLM, NeurIPS 2023; Molchanov et al., ICLR 2017)"
        ),
    ),
    "fisher": Score(
        function=_fisher,
        description=(
            "half the mean squared derivative of the log-likelihood along the unit's factor, with labels drawn from "
            "the model's own predictions: to second order, the KL divergence that removing the unit causes"
        ),
    ),
    "taylor": Score(
        function=_taylor,
        description=(
            "the same derivative with the true labels; in a search, averaged over the training steps "
            "(Molchanov et al., CVPR 2019, eq. 8)"
        ),
        needs_labels=True,
        needs_training=True,
    ),
    "contribution": Score(
        function=_contribution,
        description="|factor| times the norms of the weights that produce and consume the unit, over the kind's mean",
        needs_images=False,
        kinds=("head_dim", "head", "mlp", "channel", "block", "width"),
    ),
    "mask": Score(
        function=_mask,
        description="the signed value of the trained mask (ViT-Slim, CVPR 2022, section 3.3; Network Slimming, 2017)",
        one_shot=False,
        needs_training=True,
        needs_images=False,
    ),
}
"""Every score by name, the default first."""


def score_called(name: str, *, one_shot: bool = False) -> Score:
    """The score called ``name``.

    Raises:
        ConfigError: there is none, or not in one shot; the message names those there are.
    """
    known = [other for other, score in SCORES.items() if score.one_shot or not one_shot]
    if name not in known:
        raise ConfigError(f"There is no score {name!r}; scores are {', '.join(known)}.{nearest(name, known)}")
    return SCORES[name]
