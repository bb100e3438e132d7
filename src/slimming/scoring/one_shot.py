"""One-shot scores: rank the units of a trained model on 128 to 512 unlabelled images, without a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slimming.core.layout import Layout
from slimming.errors import DataError, PlanError
from slimming.masks.attachment import independent, prunable, searched
from slimming.masks.soft_masks import attached
from slimming.models.prunable import PrunableModel
from slimming.planning.scores import Scored, Scores
from slimming.scoring.registry import Request, score_called
from slimming.scoring.rotation import rotate_
from slimming.training.batches import Batch, calibration_batches
from slimming.training.samples import Data

NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class OneShot(Scored):
    """The result of `score`: the model to cut, one score per unit, and the images that were used.

    Attributes:
        prunable: a copy of the model that was given, with what was read in it.
        scores: group name -> score of each unit, shape (size,): an estimate of how much the loss grows without it.
        how: which score.
        images: the batches, shape (B, C, H, W), for `slimming.cut` to compensate with.
        layout: which sizes plans give to the layers.
    """

    prunable: PrunableModel
    scores: Mapping[str, Tensor]
    how: str
    images: Sequence[Tensor] = field(repr=False)
    layout: Layout = field(default_factory=Layout)

    @property
    def model(self) -> nn.Module:
        """The copy: in evaluation mode, with attention heads in the bases in which they are best cut."""
        return self.prunable.model

    @property
    def rating(self) -> Scores:
        """The scores, for `slimming.plan`."""
        return Scores(anatomy=self.prunable.anatomy, scores=self.scores, layout=self.layout)


def score(
    model: nn.Module,
    data: Data | Sequence[Tensor],
    *,
    how: str = "compensated",
    images: int = 512,
    kinds: Sequence[str] | None = None,
    rotate: bool = True,
    layout: Layout | None = None,
    seed: int = 0,
) -> OneShot:
    """Score every unit of a trained model in one shot: on unlabelled images, without training.

    Cut the model in the result, and give `slimming.cut` the images there, so that what stays makes up for what goes.
    Under several processes each must call this, and `slimming.cut` with images, with the same arguments.

    Args:
        model: a dense or slim model without masks, which stays as it is.
        data: its training part is read, see `slimming.open_data`; or batches of images, shape (B, C, H, W).
        how: one of `slimming.scoring.registry.SCORES`: ``"compensated"``, ``"fisher"``, ``"taylor"`` (needs labels) or
            ``"contribution"`` (of the weights alone). Without a classifier, Fisher scores are those of its features.
        images: how many of the training images.
        kinds: kinds of units to score; None takes those that `slimming.attach` takes.
        rotate: give attention heads other bases first, see `slimming.scoring.rotation`.
        layout: which sizes plans give to the layers.
        seed: of the choice of images and of the labels drawn.

    Raises:
        UnsupportedModelError: no family reads the model.
        PlanError: the model has masks.
        ConfigError: no such score, no such kind in the model, or ``images`` below 1.
        DataError: labels are needed and not there.
        NonFiniteLossError: the model's outputs or their slopes are not finite.

    >>> import timm, torch, slimming
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> scored = slimming.score(model, [torch.randn(8, 3, 32, 32)])
    >>> plan = slimming.plan(scored, slimming.Budget(macs=0.5))
    >>> small = slimming.cut(scored.model, plan, images=scored.images)
    >>> slimming.cost(small).macs <= 0.5 * slimming.cost(model).macs
    True
    """
    chosen = score_called(how, one_shot=True)
    if attached(model) is not None:
        raise PlanError("The model has masks; call masks.fold_() or masks.detach_() first, or plan with the masks.")
    batches = _batches(data, images, seed)
    if chosen.needs_labels and any(bool((batch.labels == NO_LABEL).any()) for batch in batches):
        raise DataError(f"Score {how!r} needs labels: give data that has them, or take score 'compensated'.")
    own = prunable(model).copy()
    own.model.eval()
    pictures = [batch.images for batch in batches]
    if rotate:
        rotate_(own, pictures)
    groups = searched(independent(own.anatomy.groups), kinds)
    scores = chosen.function(Request(prunable=own, groups=groups, batches=batches, seed=seed))
    return OneShot(prunable=own, scores=scores, how=how, images=pictures, layout=layout or Layout())


def _batches(data: Data | Sequence[Tensor], images: int, seed: int) -> list[Batch]:
    """The first training images, or all that were given."""
    if isinstance(data, Data):
        return calibration_batches(data, images, seed=seed)
    given = [data] if isinstance(data, Tensor) else list(data)
    if not given or any(not isinstance(batch, Tensor) or batch.dim() != 4 for batch in given):
        raise DataError("Give data of slimming.open_data, or batches of images of shape (B, C, H, W).")
    return [Batch(batch, torch.full((len(batch),), NO_LABEL), ()) for batch in given]
