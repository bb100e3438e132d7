"""Closed-form compensation at the cut: what goes is predicted from what stays and folded into the layers that read it.

A layer that reads units gives W x + b in the dense model. In the slim one it sees fewer inputs x', which the layers in
front have changed as well. Over some images the difference D between x and x' (all of x where a unit goes) is predicted
from x' by least squares, D ≈ A x' + c. Then W' + W A and b + W c give what the dense layer gave, as nearly as can be.
The layers are done from the first to the last, a few at a time, so that later ones make up for what earlier ones could
not. It needs no labels and no training. A plan that takes nothing changes nothing.

The same idea for single layers is in ThiNet (ICCV 2017, section 3.2.3) and, by covariances, in SparseGPT (ICML 2023).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimming.core.completion import complete
from slimming.core.groups import Anatomy, Group
from slimming.core.modules import in_evaluation
from slimming.core.pruning_plan import Plan
from slimming.errors import NonFiniteLossError
from slimming.models.activations import (
    Moments,
    feeds_layers,
    in_parts,
    inputs_of,
    layers_reading,
    own_share,
    precise,
    ridge,
)
from slimming.models.family import Kept, zero_slices_
from slimming.models.prunable import PrunableModel, read
from slimming.pruning.resize import cut_

TOGETHER = 4
"""At most so many layers in one pass over the images: later ones make up for what earlier ones could not."""


def cut_compensated_(prunable: PrunableModel, plan: Plan, images: Sequence[Tensor]) -> None:
    """`slimming.pruning.cutting.cut_` with compensation.

    Tokens, features of the embedding and whole branches go first, uncompensated: what is left is then what counts as
    dense.

    Args:
        prunable: the model, without masks.
        plan: which units stay.
        images: batches of shape (B, C, H, W).

    Raises:
        PlanError: the plan was made for another model, or leaves a group without a unit.
        NonFiniteLossError: the images or the weights are not finite.
    """
    complete(prunable.anatomy, plan)
    first = {name for name in plan.kept if prunable.anatomy.group(name).kind in ("token", "width", "block")}
    if first:
        cut_(prunable, _restricted(plan, first))
        prunable = read(prunable.model)
    rest = _restricted(plan, {group.name for group in prunable.anatomy.groups} - first)
    compensate_(prunable, complete(prunable.anatomy, rest), images)
    cut_(prunable, rest)


def _restricted(plan: Plan, names: Collection[str]) -> Plan:
    """The plan for some of its groups."""
    kept = {name: units for name, units in plan.kept.items() if name in names}
    return replace(plan, kept=kept, sizes={name: plan.sizes[name] for name in kept})


@torch.no_grad()
def compensate_(prunable: PrunableModel, kept: Kept, images: Sequence[Tensor]) -> None:
    """Change the layers of ``model`` that read units that go, such that cutting them changes as little as can be.

    Everything that reads a unit that goes does so with weight 0 then.

    Args:
        prunable: a plain, dense model; it stays in the mode that it is in.
        kept: the units that stay, see `slimming.core.completion.complete`.
        images: batches of shape (B, C, H, W).
    """
    model, anatomy = prunable.model, prunable.anatomy
    wanted = readers(model, anatomy, kept)
    if not wanted:
        return
    dense = copy.deepcopy(model).eval()
    _silence_(model, anatomy, kept, wanted)
    with in_evaluation(model):
        for part in in_parts(wanted, lambda name: _gigabytes(model.get_submodule(name)), TOGETHER):
            stays = {name: _others(wanted[name], model.get_submodule(name)) for name in part}
            for name, moments in _gathered(dense, model, stays, images).items():
                _fold_(model.get_submodule(name), moments, stays[name], wanted[name])


def _silence_(model: nn.Module, anatomy: Anatomy, kept: Kept, spared: Collection[str]) -> None:
    """Set to 0 what reads units that go, but for the layers in ``spared``; QK that nothing reads, where it is made."""
    tensors = dict(model.named_parameters())
    for group, units in _gone(anatomy, kept):
        outside = [one for one in group.slices if one.side in ("consumes", "key")]
        for one in outside or group.slices:
            if one.tensor in tensors and one.tensor.rpartition(".")[0] not in spared:
                zero_slices_(tensors[one.tensor], one, units)


def _gone(anatomy: Anatomy, kept: Kept) -> Iterator[tuple[Group, list[int]]]:
    """The groups that lose units between a layer that makes them and one that reads them, with those units."""
    for group in anatomy.groups:
        units = sorted(set(range(group.size)).difference(kept.get(group.name, range(group.size))))
        if units and feeds_layers(group):
            yield group, units


def readers(model: nn.Module, anatomy: Anatomy, kept: Kept) -> dict[str, list[int]]:
    """The layers that read units that go, in the order of the model: name -> places of their inputs that go."""
    gone: defaultdict[str, set[int]] = defaultdict(set)
    for group, units in _gone(anatomy, kept):
        for one in layers_reading(model, group):
            gone[one.tensor.rpartition(".")[0]].update(place for unit in units for place in one.index[unit])
    found = {}
    for name, module in model.named_modules():
        if name in gone and len(gone[name]) < module.get_parameter("weight").shape[1]:
            found[name] = sorted(gone[name])
    return found


def _others(gone: Sequence[int], module: nn.Module) -> list[int]:
    dropped = set(gone)
    return [place for place in range(module.get_parameter("weight").shape[1]) if place not in dropped]


def _gigabytes(module: nn.Module) -> float:
    return 16 * module.get_parameter("weight").shape[1] ** 2 / 2**30


def _gathered(
    dense: nn.Module, slim: nn.Module, stays: Mapping[str, Sequence[int]], images: Sequence[Tensor]
) -> dict[str, Moments]:
    """The moments of what the layers in ``stays`` read: of x', what stays of it in ``slim``, and of D."""
    like = next(slim.parameters())
    found = {}
    for name, places in stays.items():
        weight = slim.get_submodule(name).get_parameter("weight")
        found[name] = Moments(len(places), weight.device, weight.shape[1])
    with inputs_of(dense, stays) as of_dense, inputs_of(slim, stays) as of_slim:
        for batch in own_share(images):
            for model in (dense, slim):
                model(batch.to(like.device, like.dtype))
            for name, moments in found.items():
                for one, other in zip(of_dense[name], of_slim[name], strict=True):
                    x = precise(other[:, stays[name]])
                    d = one.to(x.dtype, copy=True)
                    d[:, stays[name]] -= x
                    moments.add(x, d)
                of_dense[name].clear()
                of_slim[name].clear()
    return found


def _fold_(module: Any, moments: Moments, stays: Sequence[int], gone: Sequence[int]) -> None:
    """Give the columns that stay, and the bias, what the difference can be predicted to add."""
    weight, bias = module.weight, module.bias
    moments.add_up()
    count = moments.count
    if count == 0:  # the layer did not run
        weight[:, gone] = 0
        return
    x, d, xx, dx = (total / count for total in (moments.x, moments.y, moments.xx, moments.yx))
    if not bool(torch.isfinite(d).all() & torch.isfinite(xx).all()):
        raise NonFiniteLossError(
            "What the layers read while compensating is not finite. Check the images and the weights of the model."
        )
    if bias is not None:  # without one to take the constant, the prediction goes through the origin
        xx, dx = xx - torch.outer(x, x), dx - torch.outer(d, x)
    scale = xx.diagonal().mean()
    old = weight.double()
    predicted = torch.zeros_like(dx)
    if scale > 0:
        xx.diagonal().add_(ridge(len(stays), count) * scale)
        predicted = torch.cholesky_solve(dx.T, torch.linalg.cholesky(xx)).T  # (all inputs, those that stay)
        weight[:, stays] += torch.einsum("oi...,is->os...", old, predicted).to(weight.dtype)
    if bias is not None:
        bias += ((old.flatten(2).sum(2) if old.dim() > 2 else old) @ (d - predicted @ x)).to(bias.dtype)
    weight[:, gone] = 0
