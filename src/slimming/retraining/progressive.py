"""Progressive cutting: one training that goes from the largest plan to the smallest, cutting on its way.

Each model is cut from the retrained one before it, so that what was learned at a larger size is there at the smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

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
from slimming.retraining.retrain import DistilConfig, train
from slimming.scoring.one_shot import OneShot
from slimming.searching.mask_search import SearchResult
from slimming.training.config import TrainConfig
from slimming.training.samples import Data
from slimming.training.tasks import Loss


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
    """Cut and train the largest plan, cut the next one out of the trained model and train on, down to the smallest.

    A plan that no trained model has all the units of is cut from ``result`` again.

    Args:
        result: what `slimming.search` or `slimming.score` gave; it stays as it is.
        data: training images, see `slimming.open_data`.
        plans: from that result, in any order; nested ones (solver ``"nested"``) follow from one another.
        config: of the training of each model.
        teacher: to distil from, as for `slimming.train`; so are ``distil``, ``resume``, ``evaluate`` and ``loss``.
        distil: what of the teacher.
        resume: go on from the states in ``directory``.
        evaluate: called now and then with the model; what it returns goes to the log.
        loss: of your own, in place of the labels.
        images: for `slimming.cut` to compensate with, at every cut.
        directory: each model's state and log go into ``0``, ``1``, … in it, by the place of its plan.

    Returns:
        One trained model per plan, in the order of ``plans``; the averaged ones where the config asks for averages.

    Raises:
        ConfigError: there are no plans; else see `slimming.train`.
        PlanError: a plan is of another model.

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
    order = largest_first(result.model, plans)
    done: list[tuple[Plan, nn.Module]] = []
    found: dict[int, nn.Module] = {}
    for place in order:
        small = cut_on(result.model, plans[place], done, images=images)
        history = train(
            small,
            data,
            config,
            teacher,
            distil=distil,
            directory=Path(directory) / str(place) if directory is not None else None,
            resume=resume,
            evaluate=evaluate,
            loss=loss,
        )
        found[place] = small if history.averaged is None else history.averaged
        done.append((plans[place], found[place]))
    return [found[place] for place in range(len(plans))]


def largest_first(model: nn.Module, plans: Sequence[Plan]) -> list[int]:
    """The places of ``plans`` by what they cost in MACs, the most first."""
    macs = [cost(model, plan).macs for plan in plans]
    return sorted(range(len(plans)), key=lambda place: macs[place], reverse=True)


def cut_on(
    model: nn.Module, plan: Plan, done: Sequence[tuple[Plan, nn.Module]], *, images: Sequence[Tensor] = ()
) -> nn.Module:
    """Cut ``plan`` out of the last of the models in ``done`` that has all it needs (`onward`), or else of ``model``.

    Args:
        model: what ``plan`` and the plans in ``done`` were made for.
        plan: which units stay.
        done: plans and the models that were cut by them, the largest first.
        images: see `slimming.cut`.

    Raises:
        PlanError: ``plan`` is of another model.
    """
    complete(prunable(model).anatomy, plan)
    for larger, small in reversed(done):
        try:
            rest = onward(model, larger, plan, small)
        except PlanError:
            continue
        return cut(small, rest, images=images)
    return cut(model, plan, images=images)


def _contains(larger: Kept, smaller: Kept) -> bool:
    return all(set(units) <= set(larger[name]) for name, units in smaller.items())


def onward(model: nn.Module, larger: Plan, plan: Plan, small: nn.Module) -> Plan:
    """Make of ``plan`` for ``model`` the plan for ``small``, which is ``model`` cut by ``larger``.

    Cutting ``small`` by it gives what cutting ``model`` by ``plan`` gives, but for what was trained in between.

    Raises:
        PlanError: ``plan`` keeps what ``larger`` cut, or takes from a group that ``small`` no longer offers.
    """
    dense = prunable(model)
    anatomy, now = dense.anatomy, {group.name: group for group in prunable(small).anatomy.groups}
    before, after = complete(anatomy, larger), complete(anatomy, plan)
    if not _contains(before, after):
        raise PlanError("The plan keeps units that the model was cut of before; cut it from the searched model.")
    origins = {dim: _origins(dense, before, dim) for dim in (0, 1)}
    kept: dict[str, tuple[int, ...]] = {}
    for name in plan.kept:
        if name in now:
            units = _units(anatomy.group(name), now[name], origins)
            kept[name] = tuple(place for place, unit in enumerate(units) if unit in set(after[name]))
        elif len(after[name]) < len(before[name]):
            raise PlanError(f"{name!r} can be cut in the searched model, but no longer in the one cut from it.")
    return replace(plan, kept=kept, sizes={name: now[name].size for name in kept})


def _origins(prunable: PrunableModel, kept: Kept, dim: int) -> Mapping[str, Tensor]:
    """The state dict of the slim model with each number's place along ``dim`` in the tensor of ``model`` it is from."""
    found = attached(prunable.model)
    state = prunable.model.state_dict() if found is None else found.weights()
    places = {name: _counted(tensor, dim) for name, tensor in state.items()}
    return prunable.family.select(prunable.anatomy, kept, places)


def _counted(tensor: Tensor, dim: int) -> Tensor:
    """A tensor of the same shape that holds places along ``dim``, on the CPU."""
    if tensor.dim() <= dim:
        return torch.zeros(tensor.shape)
    shape = [1] * tensor.dim()
    shape[dim] = -1
    return torch.arange(tensor.shape[dim], dtype=torch.float32).view(shape).expand(tensor.shape)


def _units(group: Group, now: Group, origins: Mapping[int, Mapping[str, Tensor]]) -> list[int]:
    """Unit by unit of ``now``, which unit of ``group`` it was: a cut may put heads into another order."""
    if group.token is not None and now.token is not None:
        unit_of = {position: unit for unit, position in enumerate(group.token.positions)}
        return [unit_of[position] for position in now.token.positions]
    one = _read_side(group)
    other = next(s for s in now.slices if (s.tensor, s.dim, s.side) == (one.tensor, one.dim, one.side))
    owner = {place: unit for unit, places in enumerate(one.index) for place in places}
    # Along the first line: the places are the same on every other.
    line = origins[one.dim][one.tensor].movedim(one.dim, 0).flatten(1)[:, 0]
    return [owner[int(line[places[0]])] for places in other.index]


def _read_side(group: Group) -> Slices:
    """A slice of every unit that a cut copies as it is; what makes queries is scaled on the way."""
    return next((one for one in group.slices if one.side in ("consumes", "key")), group.slices[0])
