"""Cut a model by a plan: `cut` returns a plain module with smaller tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from slimming.core.argument_types import checked_arguments
from slimming.core.completion import complete
from slimming.core.pruning_plan import Plan
from slimming.masks.attachment import prunable
from slimming.masks.soft_masks import attached
from slimming.pruning.compensation import cut_compensated_
from slimming.pruning.resize import cut_


@checked_arguments
def cut(model: nn.Module, plan: Plan, *, images: Sequence[Any] = ()) -> nn.Module:
    """Return the slim model, a plain module with smaller tensors. The given model is not changed.

    Masks that are attached to the model are folded into the weights (or set to 1, if ``plan.fold`` is False).

    Args:
        model: a dense or masked model.
        plan: the units to keep.
        images: batches of shape (B, C, H, W), 128 to 512 images in total, preprocessed for the model; or batches of
            another form, as in `slimming.score`. The layers that read removed units are refitted on them by least
            squares (see `slimming.pruning.compensation`). Without images, the slim model equals the masked one.

    Raises:
        PlanError: the plan was made for another model, or removes more units of a group than its limits allow.

    >>> import timm, slimming
    >>> model = timm.create_model("test_vit")
    >>> plan = slimming.plan(slimming.attach(model), slimming.Budget(macs=0.5))
    >>> small = slimming.cut(model, plan)
    >>> slimming.cost(small).macs <= 0.5 * slimming.cost(model).macs
    True
    """
    dense = prunable(model)
    complete(dense.anatomy, plan)
    batches = [images] if isinstance(images, Tensor) else list(images)
    slim = dense.copy()
    masks = attached(slim.model)
    if masks is not None:
        if plan.fold:
            masks.fold_()
        masks.detach_()
    if batches:
        cut_compensated_(slim, plan, batches)
    else:
        cut_(slim, plan)
    return slim.model
