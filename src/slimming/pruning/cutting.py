"""Cut a model by a plan: its tensors get smaller and an ordinary module is left."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from slimming.core.completion import complete
from slimming.core.pruning_plan import Plan
from slimming.masks.attachment import prunable
from slimming.masks.soft_masks import attached
from slimming.pruning.compensation import cut_compensated_
from slimming.pruning.resize import cut_


def cut(model: nn.Module, plan: Plan, *, images: Sequence[Tensor] = ()) -> nn.Module:
    """Make the slim model: a plain module with smaller tensors. The model given stays as it was.

    Masks that are attached to the model are folded into the weights (or set to 1, if the plan says so).

    Args:
        model: dense or masked.
        plan: which units stay.
        images: batches of shape (B, C, H, W), 128 to 512 images in all, preprocessed as the model takes them. The
            layers that read removed units are then refitted by least squares so that what stays makes up for them
            (see `slimming.pruning.compensation`). Without images the slim model equals the masked one.

    Raises:
        PlanError: the plan was made for another model, or leaves a group without a unit.

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
    found = attached(slim.model)
    if found is not None:
        if plan.fold:
            found.fold_()
        found.detach_()
    if batches:
        cut_compensated_(slim, plan, batches)
    else:
        cut_(slim, plan)
    return slim.model
