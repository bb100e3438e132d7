"""The cost of a model, as it is or under a plan."""

from __future__ import annotations

from torch import nn

from slimming.core.argument_types import checked_arguments
from slimming.core.completion import complete
from slimming.core.copies import copied
from slimming.core.groups import keep_all
from slimming.core.pruning_plan import Plan
from slimming.counting.measured import count
from slimming.counting.model_cost import Cost, per_group, total
from slimming.masks.attachment import prunable
from slimming.masks.soft_masks import attached
from slimming.models.prunable import PrunableModel
from slimming.pruning.cutting import cut


@checked_arguments
def cost(model: nn.Module, plan: Plan | None = None) -> Cost:
    """Return the cost of ``model``, as it is or under ``plan``, by formula.

    There is no formula for the memory of traced models and of heads of several sizes; it is counted in a forward pass.

    Raises:
        UnsupportedModelError: no family reads the model.
        PlanError: the plan was made for another model.

    >>> import timm, slimming
    >>> slimming.cost(timm.create_model("deit_small_patch16_224")).macs
    4598882304
    """
    return cost_of(prunable(model), plan)


def cost_of(read_model: PrunableModel, plan: Plan | None = None) -> Cost:
    """Return the cost of a model that was already read, see `cost`."""
    model, anatomy = read_model.model, read_model.anatomy
    kept = complete(anatomy, plan) if plan is not None else keep_all(anatomy.groups)
    counts = {name: len(units) for name, units in kept.items()}
    element_bytes = next(model.parameters()).element_size()
    formula = total(anatomy, counts, element_bytes=element_bytes)
    if read_model.family.has_memory_formula(anatomy, kept):
        memory = formula.memory_bytes
    else:
        memory = count(_plain(model) if plan is None else cut(model, plan), read_model.examples()[0]).memory_bytes
    return Cost(params=formula.params, macs=formula.macs, memory_bytes=memory, groups=per_group(anatomy, counts))


def _plain(model: nn.Module) -> nn.Module:
    """The model, or a copy of it without its masks."""
    if attached(model) is None:
        return model
    plain = copied(model)
    if (masks := attached(plain)) is not None:
        masks.detach_()
    return plain
