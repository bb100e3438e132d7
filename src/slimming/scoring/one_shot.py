"""One-shot scores: rank units without training, from 128 to 512 unlabelled images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from slimming.core.argument_types import checked_arguments
from slimming.core.calibration import NO_LABEL, CalibrationBatch, given_batches, labelled
from slimming.core.layout import Layout
from slimming.errors import ConfigError, DataError, PlanError
from slimming.masks.attachment import independent, prunable, select_kinds
from slimming.masks.soft_masks import attached
from slimming.models.prunable import PrunableModel
from slimming.planning.scores import HasScores, ScoredModel
from slimming.scoring.outputs import OutputReader, Outputs, outputs_that_count
from slimming.scoring.registry import Request, score_called
from slimming.scoring.rotation import rotate_
from slimming.training.batches import calibration_batches
from slimming.training.distributed import agreed
from slimming.training.outputs import CountedOutput
from slimming.training.samples import Data
from slimming.training.tasks import Loss


@dataclass(frozen=True, kw_only=True)
class OneShot(HasScores):
    """The result of `score`: a model to cut, the scores of its units, and the images that were used.

    Attributes:
        prunable: a copy of the given model, with its anatomy.
        scores: group name -> score of each unit, shape (size,): the estimated increase of the loss without the unit.
        how: name of the score.
        images: the batches as the model takes them, for the compensation in `slimming.cut`: tensors of shape
            (B, C, H, W), or the arguments of the model.
        layout: sizes that plans may give to the layers.
        outputs: the outputs of the model that counted; empty for a custom loss, and for scores that do not compare
            outputs.
    """

    prunable: PrunableModel
    scores: Mapping[str, Tensor]
    how: str
    images: Sequence[Any] = field(repr=False)
    layout: Layout = field(default_factory=Layout)
    outputs: tuple[CountedOutput, ...] = ()

    @property
    def model(self) -> nn.Module:
        """The copy in evaluation mode, with rotated attention heads if ``rotate`` was True."""
        return self.prunable.model

    @property
    def scored(self) -> ScoredModel:
        """The scores, for `slimming.plan`."""
        return ScoredModel(anatomy=self.prunable.anatomy, scores=self.scores, layout=self.layout)


@agreed()
@checked_arguments
def score(
    model: nn.Module,
    data: Data | Iterable[Any],
    *,
    how: str = "compensated",
    images: int = 512,
    kinds: Sequence[str] | None = None,
    rotate: bool = True,
    layout: Layout | None = None,
    seed: int = 0,
    loss: Loss | None = None,
    outputs: Outputs | None = None,
) -> OneShot:
    """Score every unit without training, which takes minutes on 128 to 512 images without labels.

    Every floating-point output of the model counts: tensors in nested tuples, dicts, dataclasses and the outputs of
    transformers. Several outputs are scaled by their own spread between images. `OneShot.outputs` names them.

    Cut the model of the result with ``images=result.images``, so that the removed units are compensated. With several
    processes, each must call this function, and `slimming.cut` with images, with the same arguments.

    Args:
        model: a dense or slim model without masks; it is not changed.
        data: data whose training images are used, see `slimming.open_data`; or batches, of which a loader is read up to
            ``images`` images. A batch is a tensor of images (B, C, H, W), a list of images, a dict of the arguments of
            the model's forward (as for transformers), or a tuple. Of a tuple, the model gets as many entries as its
            example inputs have positional arguments, or one; the others are targets for ``loss``.
        how: one of `slimming.scoring.registry.SCORES`: ``"compensated"``, ``"fisher"``, ``"taylor"`` (needs labels) or
            ``"contribution"`` (from the weights alone). For a model without a classifier, Fisher scores are those of
            its features.
        images: number of training images.
        kinds: kinds of units to score; None selects the default kinds of `slimming.attach`.
        rotate: whether to change the bases of attention heads first, see `slimming.scoring.rotation`.
        layout: sizes that plans may give to the layers.
        seed: seed of the choice of images and of the drawn labels.
        loss: custom loss, see `slimming.training.tasks.Loss`: its derivative for single images replaces that of the
            outputs. It gets the batch as it was given, cut to one image; for batches that are tensors, a pair of images
            and labels, which are -1.
        outputs: which outputs count: a function that gets what the model returns and gives those that count, such as
            ``lambda out: (out.logits, out.pred_boxes)``; or names of modules whose outputs count instead. None takes
            all outputs; for the detectors of torchvision, those of their heads.

    Raises:
        UnsupportedModelError: no family reads the model.
        PlanError: the model has masks.
        ConfigError: there is no such score, the model has no such kind or no output that counts, ``images`` is below
            1, or the score does not use ``loss`` or ``outputs``.
        DataError: the score needs labels and the data has none.
        NonFiniteLossError: the model's outputs or their gradients are not finite.

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
    if loss is not None and not chosen.needs_images:
        raise ConfigError(f"Score {how!r} is computed from the weights alone and does not use a loss; drop it.")
    if outputs is not None and (loss is not None or not chosen.compares_outputs):
        raise ConfigError(f"Score {how!r}{' with a loss' if loss else ''} does not compare outputs; drop outputs.")
    copied = prunable(model).copy()
    batches = _batches(data, copied, images, seed)
    unlabelled = any(batch.labels is None or bool((batch.labels == NO_LABEL).any()) for batch in batches)
    if chosen.needs_labels and loss is None and unlabelled:
        raise DataError(f"Score {how!r} needs labels: give data that has them, or take score 'compensated'.")
    copied.model.eval()
    if rotate:
        rotate_(copied, batches)
    groups = select_kinds(independent(copied.anatomy.groups), kinds)
    reader, compares = OutputReader(outputs), chosen.compares_outputs and loss is None
    counted = outputs_that_count(copied.model, batches, reader) if compares else ()
    request = Request(
        prunable=copied, groups=groups, batches=batches, seed=seed, outputs=counted, reader=reader, loss=loss
    )
    return OneShot(
        prunable=copied,
        scores=chosen.function(request),
        how=how,
        images=[batch.call.value for batch in batches],
        layout=layout or Layout(),
        outputs=counted,
    )


def _batches(data: Data | Iterable[Any], model: PrunableModel, images: int, seed: int) -> list[CalibrationBatch]:
    """Calibration images of the data, or the given batches."""
    if isinstance(data, Data):
        return [labelled(batch.images, batch.labels) for batch in calibration_batches(data, images, seed=seed)]
    return given_batches(model.model, data, images, len(model.anatomy.input_shape) + 1)
