"""Progressive pruning: train the plans from the largest to the smallest, cutting each model from the one before.

Each model starts from the weights that were trained at the next larger size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from slimming.core.argument_types import checked_arguments
from slimming.core.completion import complete
from slimming.core.groups import Group, Slices
from slimming.core.pruning_plan import Plan
from slimming.errors import ConfigError, PlanError
from slimming.masks.attachment import prunable
from slimming.masks.soft_masks import attached
from slimming.models.family import Kept
from slimming.models.prunable import PrunableModel
from slimming.pruning.costs import cost
from slimming.pruning.cutting import cut
from slimming.retraining.config import DistilConfig
from slimming.retraining.retrain import train
from slimming.scoring.one_shot import OneShot
from slimming.searching.mask_search import SearchResult
from slimming.training.config import TrainConfig
from slimming.training.distributed import agreed
from slimming.training.samples import Data
from slimming.training.tasks import Loss


@checked_arguments
@agreed()
def train_progressive(
    result: SearchResult | OneShot,
    data: Data,
    plans: Sequence[Plan],
    config: TrainConfig | None = None,
    teacher: nn.Module | None = None,
    *,
    distil: DistilConfig | None = None,
    images: Sequence[Tensor] = (),
    directory: str | Path | None = None,
    resume: bool = False,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    loss: Loss | None = None,
) -> list[nn.Module]:
    """Cut and train the largest plan, then cut the next smaller one from the trained model and train it, and so on.

    A plan with units that no trained model has is cut from ``result``.

    Args:
        result: result of `slimming.search` or `slimming.score`; it is not changed.
        data: training images, see `slimming.open_data`.
        plans: plans made from ``result``, in any order; use nested plans (solver ``"nested"``), each of which can be
            cut from the one before.
        config: settings of the training of each model.
        teacher: model to distil from, see `slimming.train`.
        distil: settings of the distillation.
        images: images for the compensation at every cut, see `slimming.cut`.
        directory: directory for states and logs; the model of plan ``i`` uses the subdirectory ``i``.
        resume: resume from the states in ``directory``.
        evaluate: called with the model every ``config.eval_every`` epochs; the result is written to the log.
        loss: custom loss, see `slimming.train`.

    Returns:
        One trained model per plan, in the order of ``plans``; with ``config.ema``, the averaged models.

    Raises:
        ConfigError: there are no plans; for other causes see `slimming.train`.
        PlanError: a plan was made for another model.

    >>> import timm, slimming
    >>> from slimming.demo import settings
    >>> model = timm.create_model("test_vit", img_size=32, num_classes=10)
    >>> images = slimming.DataConfig(source=settings()["data"]["source"], train_limit=8, val_limit=8)
    >>> data = slimming.open_data(images, model)
    >>> few = slimming.TrainConfig(steps=2, batch_size=4)
    >>> scored = slimming.score(model, data)
    >>> plans = slimming.plans(scored, [slimming.Budget(macs=m) for m in (0.8, 0.5)], solver="nested")
    >>> large, small = slimming.train_progressive(scored, data, plans, few, images=scored.images)
    >>> slimming.cost(small).macs < slimming.cost(large).macs
    True
    """
    if not plans:
        raise ConfigError("Give the plans to train for, such as those of slimming.plans.")
    order = order_by_macs(result.model, plans)
    done: list[tuple[Plan, nn.Module]] = []
    trained: dict[int, nn.Module] = {}
    for index in order:
        small = cut_from_last(result.model, plans[index], done, images=images)
        history = train(
            small,
            data,
            config,
            teacher,
            distil=distil,
            directory=Path(directory) / str(index) if directory is not None else None,
            resume=resume,
            evaluate=evaluate,
            loss=loss,
        )
        trained[index] = small if history.averaged is None else history.averaged
        done.append((plans[index], trained[index]))
    return [trained[index] for index in range(len(plans))]


def order_by_macs(model: nn.Module, plans: Sequence[Plan]) -> list[int]:
    """Return the indices of ``plans`` in descending order of their MACs."""
    macs = [cost(model, plan).macs for plan in plans]
    return sorted(range(len(plans)), key=lambda index: macs[index], reverse=True)


def cut_from_last(
    model: nn.Module, plan: Plan, done: Sequence[tuple[Plan, nn.Module]], *, images: Sequence[Tensor] = ()
) -> nn.Module:
    """Cut ``plan`` from the last model in ``done`` that has all units of the plan (`rebase_plan`), else from ``model``.

    Args:
        model: the model for which ``plan`` and the plans in ``done`` were made.
        plan: the units to keep.
        done: plans with the models that were cut by them, the largest first.
        images: see `slimming.cut`.

    Raises:
        PlanError: ``plan`` was made for another model.
    """
    complete(prunable(model).anatomy, plan)
    for larger, small in reversed(done):
        try:
            rest = rebase_plan(model, larger, plan, small)
        except PlanError:
            continue
        return cut(small, rest, images=images)
    return cut(model, plan, images=images)


def _contains(larger: Kept, smaller: Kept) -> bool:
    return all(set(units) <= set(larger[name]) for name, units in smaller.items())


def rebase_plan(model: nn.Module, larger: Plan, plan: Plan, small: nn.Module) -> Plan:
    """Convert ``plan`` for ``model`` to a plan for ``small``, which is ``model`` cut by ``larger``.

    Cutting ``small`` by the result gives the same architecture as cutting ``model`` by ``plan``, and the same weights
    if ``small`` was not trained.

    Raises:
        PlanError: ``plan`` keeps units that ``larger`` removes, or removes units of a group that ``small`` lacks.
    """
    dense = prunable(model)
    anatomy, now = dense.anatomy, {group.name: group for group in prunable(small).anatomy.groups}
    before, after = complete(anatomy, larger), complete(anatomy, plan)
    if not _contains(before, after):
        raise PlanError("The plan keeps units that were already removed; cut it from the searched model.")
    origins = {dim: _origins(dense, before, dim) for dim in (0, 1)}
    kept: dict[str, tuple[int, ...]] = {}
    for name in plan.kept:
        if name in now:
            units = _units(anatomy.group(name), now[name], origins)
            kept[name] = tuple(place for place, unit in enumerate(units) if unit in set(after[name]))
        elif len(after[name]) < len(before[name]):
            raise PlanError(
                f"{name!r} can be pruned in the searched model, but not in the model that was cut from it; cut the "
                "plan from the searched model."
            )
    return replace(plan, kept=kept, sizes={name: now[name].size for name in kept})


def _origins(prunable: PrunableModel, kept: Kept, dim: int) -> Mapping[str, Tensor]:
    """The state dict of the slim model, with the index of each element along ``dim`` in the dense one as its value."""
    masks = attached(prunable.model)
    state = prunable.model.state_dict() if masks is None else masks.weights()
    indices = {name: _indices_like(tensor, dim) for name, tensor in state.items()}
    return prunable.family.select(prunable.anatomy, kept, indices)


def _indices_like(tensor: Tensor, dim: int) -> Tensor:
    """A tensor of the same shape on the CPU whose elements are their indices along ``dim``."""
    if tensor.dim() <= dim:
        return torch.zeros(tensor.shape)
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return torch.arange(tensor.shape[dim], dtype=torch.float32).view(shape).expand(tensor.shape)


def _units(group: Group, now: Group, origins: Mapping[int, Mapping[str, Tensor]]) -> list[int]:
    """For each unit of ``now``, the unit of ``group`` from which it comes: a cut may change the order of heads."""
    if group.token is not None and now.token is not None:
        unit_of = {position: unit for unit, position in enumerate(group.token.positions)}
        return [unit_of[position] for position in now.token.positions]
    before = _copied_slices(group)
    after = next(s for s in now.slices if (s.tensor, s.dim, s.side) == (before.tensor, before.dim, before.side))
    owner = {index: unit for unit, indices in enumerate(before.index) for index in indices}
    # The first line of the tensor: the indices are the same on all others.
    line = origins[before.dim][before.tensor].movedim(before.dim, 0).flatten(1)[:, 0]
    return [owner[int(line[indices[0]])] for indices in after.index]


def _copied_slices(group: Group) -> Slices:
    """Slices of the units that a cut copies unchanged; those that produce queries are scaled."""
    return next((slices for slices in group.slices if slices.side in ("consumes", "key")), group.slices[0])
