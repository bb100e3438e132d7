"""Compensate for removed units in closed form: refit the layers that read them by least squares.

A layer computes W x + b in the dense model. In the slim model it has fewer inputs x', which also differ from x because
of the pruned layers before it. On 128 to 512 calibration images, the difference D between x and x' (all of x for
removed units) is predicted from x' by least squares: D ≈ A x' + c. The layer then gets the weight W' + W A and the bias
b + W c, with W' the columns of W for x'. The layers are processed from first to last, a few at a time, so that later
layers correct the remaining error of earlier ones. No labels and no training are needed. A plan that removes nothing
changes nothing.

For single layers, this is done in ThiNet (ICCV 2017, section 3.2.3) and, from covariances, in SparseGPT (ICML 2023).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from slimming.core.calibration import CalibrationBatch
from slimming.core.completion import complete
from slimming.core.copies import copied
from slimming.core.groups import Anatomy, Group
from slimming.core.modules import in_evaluation
from slimming.core.pruning_plan import Plan
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
from slimming.models.decisions import SameDecisions
from slimming.models.family import Kept, shared_parameters, zero_slices_
from slimming.models.masked_norms import mask_norms
from slimming.models.prunable import PrunableModel, read
from slimming.pruning.resize import cut_
from slimming.training.distributed import agreed

TOGETHER = 4
"""Largest number of layers refitted in one pass over the images; later layers correct the error of earlier ones."""


@agreed()
def cut_compensated_(prunable: PrunableModel, plan: Plan, images: Sequence[Any]) -> None:
    """Cut a model in place with compensation; see `slimming.pruning.resize.cut_`.

    Tokens, features of the embedding and whole branches are removed first, without compensation; the result is the
    dense model for the compensation of the other units.

    Args:
        prunable: a model without masks.
        plan: the units to keep.
        images: batches, see `slimming.core.calibration.CalibrationBatch.of`.

    Raises:
        PlanError: the plan was made for another model, or removes more units of a group than its limits allow.
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
    """The plan restricted to the groups ``names``."""
    kept = {name: units for name, units in plan.kept.items() if name in names}
    return replace(plan, kept=kept, sizes={name: plan.sizes[name] for name in kept})


@torch.no_grad()
def compensate_(prunable: PrunableModel, kept: Kept, images: Sequence[Any]) -> None:
    """Refit the layers that read removed units, in place, and set the weights with which they read these to 0.

    Args:
        prunable: a dense model without masks; its mode is not changed.
        kept: kept units of every group, see `slimming.core.completion.complete`.
        images: batches, see `slimming.core.calibration.CalibrationBatch.of`.
    """
    model, anatomy = prunable.model, prunable.anatomy
    removed_inputs = readers(model, anatomy, kept)
    if not removed_inputs:
        return
    dense = copied(model).eval()
    _silence_(model, anatomy, kept, removed_inputs)
    normed = _normed_groups(model, anatomy, kept, removed_inputs)
    # The statistics of a norm change what the layer after it reads, and this layer is refitted to it at once.
    most = 1 if normed else TOGETHER
    with in_evaluation(model), ExitStack() as masked:
        for part in in_parts(removed_inputs, lambda name: _gigabytes(model.get_submodule(name)), most):
            for group in (group for name in ("", *part) for group in normed.pop(name, ())):
                for remove in mask_norms(model, group, kept[group.name]):
                    masked.callback(remove)
            kept_inputs = {name: _kept_inputs(removed_inputs[name], model.get_submodule(name)) for name in part}
            for name, moments in _gather_moments(dense, model, kept_inputs, images).items():
                refit_(model.get_submodule(name), moments, kept_inputs[name], removed_inputs[name])


def _normed_groups(model: nn.Module, anatomy: Anatomy, kept: Kept, refitted: Collection[str]) -> dict[str, list[Group]]:
    """The groups that lose units and over which norms take statistics, by the first layer that is refitted for them.

    The key is empty if there is no such layer.
    """
    result: dict[str, list[Group]] = {}
    for group, _ in _removed_units(anatomy, kept):
        if group.norms:
            names = (slices.tensor.rpartition(".")[0] for slices in layers_reading(model, group))
            result.setdefault(next((name for name in names if name in refitted), ""), []).append(group)
    return result


def _silence_(model: nn.Module, anatomy: Anatomy, kept: Kept, spared: Collection[str]) -> None:
    """Set the weights that read removed units to 0, except in the layers ``spared``; for QK, those that make them."""
    tensors = dict(model.named_parameters())
    for group, units in _removed_units(anatomy, kept):
        readers = [slices for slices in group.slices if slices.side in ("consumes", "query", "key")]
        for slices in readers or group.slices:
            if slices.tensor in tensors and slices.tensor.rpartition(".")[0] not in spared:
                zero_slices_(tensors[slices.tensor], slices, units)


def _removed_units(anatomy: Anatomy, kept: Kept) -> Iterator[tuple[Group, list[int]]]:
    """The groups that lose units between a layer that produces and one that reads them, with the removed units."""
    for group in anatomy.groups:
        units = sorted(set(range(group.size)).difference(kept.get(group.name, range(group.size))))
        if units and feeds_layers(group):
            yield group, units


def readers(model: nn.Module, anatomy: Anatomy, kept: Kept) -> dict[str, list[int]]:
    """Return the layers that read removed units, in the order of the model: name -> indices of the removed inputs."""
    removed: defaultdict[str, set[int]] = defaultdict(set)
    for group, units in _removed_units(anatomy, kept):
        for slices in layers_reading(model, group):
            removed[slices.tensor.rpartition(".")[0]].update(index for unit in units for index in slices.index[unit])
    shared = {name.rpartition(".")[0] for names in shared_parameters(model) for name in names}
    # A layer without any kept input is not refitted, nor one that shares its weight, which would be refitted twice.
    return {
        name: sorted(removed[name])
        for name, module in model.named_modules()
        if name in removed and name not in shared and len(removed[name]) < module.get_parameter("weight").shape[1]
    }


def _kept_inputs(removed: Sequence[int], module: nn.Module) -> list[int]:
    excluded = set(removed)
    return [index for index in range(module.get_parameter("weight").shape[1]) if index not in excluded]


def _gigabytes(module: nn.Module) -> float:
    return 16 * module.get_parameter("weight").shape[1] ** 2 / 2**30


def _gather_moments(
    dense: nn.Module, slim: nn.Module, kept_inputs: Mapping[str, Sequence[int]], images: Sequence[Any]
) -> dict[str, Moments]:
    """Return the moments of the inputs of the layers in ``kept_inputs``: of x' and of D."""
    like = next(slim.parameters())
    gathered = {}
    for name, indices in kept_inputs.items():
        weight = slim.get_submodule(name).get_parameter("weight")
        gathered[name] = Moments(len(indices), weight.device, weight.shape[1])
    with inputs_of(dense, kept_inputs) as of_dense, inputs_of(slim, kept_inputs) as of_slim:
        for given in own_share(images):
            batch, decisions = CalibrationBatch.of(slim, given).to(like), SameDecisions()
            for model in (dense, slim):
                with decisions:
                    batch.run(model)
            for name, moments in gathered.items():
                for dense_rows, slim_rows in zip(of_dense[name], of_slim[name], strict=True):
                    x = precise(slim_rows[:, kept_inputs[name]])
                    d = dense_rows.to(x.dtype, copy=True)
                    d[:, kept_inputs[name]] -= x
                    moments.add(x, d)
                of_dense[name].clear()
                of_slim[name].clear()
    return gathered


def refit_(module: Any, moments: Moments, kept: Sequence[int], removed: Sequence[int]) -> None:
    """Add the predicted contribution of the difference to the kept columns and the bias."""
    weight, bias = module.weight, module.bias
    moments.add_up()
    count = moments.count
    if count == 0:  # the layer did not run
        weight[:, removed] = 0
        return
    x, d, xx, dx = (total / count for total in (moments.x, moments.y, moments.xx, moments.yx))
    if bias is not None:  # without a bias, the prediction has no constant term
        xx, dx = xx - torch.outer(x, x), dx - torch.outer(d, x)
    scale = xx.diagonal().mean()
    old = weight.double()
    predicted = torch.zeros_like(dx)
    if scale > 0:
        xx.diagonal().add_(ridge(len(kept), count) * scale)
        predicted = torch.cholesky_solve(dx.T, torch.linalg.cholesky(xx)).T  # (all inputs, those that are kept)
        weight[:, kept] += torch.einsum("oi...,is->os...", old, predicted).to(weight.dtype)
    if bias is not None:
        bias += ((old.flatten(2).sum(2) if old.dim() > 2 else old) @ (d - predicted @ x)).to(bias.dtype)
    weight[:, removed] = 0
