"""The registry of scores, from which settings, commands, error messages and the docs take their names.

Importing it does not import PyTorch, so that settings are checked and ``--help`` is shown quickly: the functions that
compute scores are imported when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slimming.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from slimming.core.calibration import CalibrationBatch
    from slimming.core.groups import Group
    from slimming.masks.soft_masks import SoftMasks
    from slimming.models.prunable import PrunableModel
    from slimming.scoring.outputs import OutputReader
    from slimming.training.outputs import CountedOutput
    from slimming.training.tasks import Loss


@dataclass(frozen=True, kw_only=True)
class Request:
    """The inputs from which a score is computed.

    Attributes:
        prunable: the model without masks in evaluation mode; it is not changed.
        groups: groups of the model.
        batches: calibration batches, the same on every process.
        masks: the masks of a search with the scores that they collected; None for one-shot scores.
        seed: seed of the drawn labels.
        outputs: the outputs that count in Fisher scores; None means those of `outputs_that_count`.
        reader: gives the outputs; None takes all outputs of the model.
        loss: custom loss, whose derivative is taken instead of that of the outputs; None if there is none.
    """

    prunable: PrunableModel
    groups: Sequence[Group]
    batches: Sequence[CalibrationBatch]
    masks: SoftMasks | None = None
    seed: int = 0
    outputs: Sequence[CountedOutput] | None = None
    reader: OutputReader | None = None
    loss: Loss | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score.

    Attributes:
        function: returns group name -> score of each unit, shape (size,), float32 on the CPU.
        description: definition and source of the score.
        one_shot: whether `slimming.score` offers it.
        needs_labels: whether `slimming.score` needs labels for it.
        needs_training: whether a search collects it during training, so that a search without training steps does not
            have it.
        compares_outputs: whether it is computed from the outputs of the model, or from a custom loss.
        needs_images: whether it is computed on calibration images (in a search: after the training).
        kinds: the kinds for which the score depends on more than the mask; None means all kinds.
    """

    function: Callable[[Request], dict[str, Tensor]]
    description: str
    one_shot: bool = True
    needs_labels: bool = False
    needs_training: bool = False
    compares_outputs: bool = False
    needs_images: bool = True
    kinds: tuple[str, ...] | None = None


def _fisher(request: Request) -> dict[str, Tensor]:
    from slimming.scoring.fisher import fisher_scores

    return fisher_scores(
        request.prunable,
        request.groups,
        request.batches,
        seed=request.seed,
        outputs=request.outputs,
        reader=request.reader,
        loss=request.loss,
    )


def _compensated(request: Request) -> dict[str, Tensor]:
    from slimming.scoring.iterative import iterative_scores

    alone = _fisher(request)
    return iterative_scores(
        request.prunable,
        request.groups,
        alone,
        request.batches,
        seed=request.seed,
        outputs=request.outputs,
        reader=request.reader,
        loss=request.loss,
    )


def _taylor(request: Request) -> dict[str, Tensor]:
    from slimming.masks.soft_masks import taylor_scores
    from slimming.scoring.fisher import fisher_scores

    if request.masks is not None:
        return taylor_scores(request.masks)
    return fisher_scores(
        request.prunable, request.groups, request.batches, drawn=False, seed=request.seed, loss=request.loss
    )


def _contribution(request: Request) -> dict[str, Tensor]:
    from slimming.masks.soft_masks import contribution_scores

    return contribution_scores(_masks(request))


def _mask(request: Request) -> dict[str, Tensor]:
    from slimming.masks.soft_masks import mask_values

    return mask_values(_masks(request))


def _masks(request: Request) -> SoftMasks:
    """The masks of the search, or masks of 1 on a copy of the model."""
    from slimming.masks.soft_masks import attach_

    return request.masks or attach_(request.prunable.copy(), request.groups, penalty={})


SCORES: Mapping[str, Score] = {
    "compensated": Score(
        function=_compensated,
        compares_outputs=True,
        description=(
            "the Fisher score of each unit at the moment of its removal, after other units of its kind were removed "
            "and compensated (ZipLM, NeurIPS 2023; Molchanov et al., ICLR 2017)"
        ),
    ),
    "fisher": Score(
        function=_fisher,
        compares_outputs=True,
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
"""The scores by name, the default first."""


def score_called(name: str, *, one_shot: bool = False) -> Score:
    """Return the score called ``name``.

    Args:
        name: name of the score.
        one_shot: whether to look only among the scores of `slimming.score`.

    Raises:
        ConfigError: there is no such score; the message names the known ones.
    """
    known = [other for other, score in SCORES.items() if score.one_shot or not one_shot]
    if name not in known:
        raise ConfigError(f"There is no score {name!r}; scores are {', '.join(known)}.{nearest(name, known)}")
    return SCORES[name]
