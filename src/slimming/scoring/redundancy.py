"""Redundancy scores: order units for removal, assuming that the layers that read them are refitted after each step.

If a unit can be predicted from other units, removing it costs little once the layers that read it are compensated (see
`slimming.pruning.compensation`): only the unpredictable part is lost, so the importance of the unit is multiplied by
the share of this part in its second moment. Of two identical units, which predict each other, only one can be removed
at this low cost. Units are therefore removed a few at a time, and the inverse covariance of the remaining units is
updated after each step: the reciprocals of the entries of its diagonal are the unpredicted variances (Hassibi and
Stork, NeurIPS 1992; for structures, ZipLM, NeurIPS 2023).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimming.core.calibration import CalibrationBatch
from slimming.core.groups import Group, Slices
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

STEPS = 40
"""Number of steps in which the units of a group are removed."""
READERS = 4
"""Largest number of the layers that read a group to evaluate, spread over the model."""


@torch.no_grad()
def redundancy_scores(
    model: nn.Module, groups: Sequence[Group], importance: Mapping[str, Tensor], batches: Sequence[Any]
) -> dict[str, Tensor]:
    """Return the cost of each unit at the moment of its removal, with the units of a group removed one after the other.

    Args:
        model: a model without masks in evaluation mode.
        groups: groups of the model.
        importance: cost of removing each unit alone without compensation, at least 0, shape (size,) per group.
        batches: calibration batches, see `CalibrationBatch.of`, the same on every process.

    Returns:
        Group name -> costs, shape (size,). For units that no layer reads directly, such as queries, tokens, features of
        the embedding and whole branches, these are the importance.
    """
    result = {group.name: importance[group.name] for group in groups}
    readers = {group.name: _readers(model, group) for group in groups}

    def gigabytes(group: Group) -> float:
        return sum(8 * model.get_parameter(slices.tensor).shape[1] ** 2 for slices in readers[group.name]) / 2**30

    for part in in_parts((group for group in groups if readers[group.name]), gigabytes):
        # A list: the order of a set of strings differs between processes.
        names = list(
            dict.fromkeys(slices.tensor.rpartition(".")[0] for group in part for slices in readers[group.name])
        )
        covariances = _covariances(model, names, batches)
        for group in part:
            layers = [
                ReadLayer(covariances[name], slices.index)
                for slices in readers[group.name]
                if (name := slices.tensor.rpartition(".")[0]) in covariances
            ]
            if layers:
                result[group.name] = _costs(importance[group.name], layers)
    return result


def _readers(model: nn.Module, group: Group) -> list[Slices]:
    """The slices by which layers read the units of ``group``, at most about `READERS` of them."""
    if not feeds_layers(group):
        return []
    reading = [slices for slices in layers_reading(model, group) if all(slices.index)]
    return reading[:: -(-len(reading) // READERS)] if reading else []


def _covariances(
    model: nn.Module, names: Iterable[str], batches: Sequence[Any]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Covariance (C, C) with its ridge, second moments (C,), and the ridge, of the inputs of each layer that ran."""
    like = next(model.parameters())
    sums: dict[str, Moments] = {}
    for name in names:
        weight = model.get_submodule(name).get_parameter("weight")
        sums[name] = Moments(weight.shape[1], weight.device)
    with inputs_of(model, sums) as read:
        for batch in own_share(batches):
            CalibrationBatch.of(model, batch).to(like).run(model)
            for name, moments in sums.items():
                for rows in map(precise, read[name]):
                    moments.add(rows)
                read[name].clear()
    result = {}
    for name, moments in sums.items():
        moments.add_up()
        count, x, xx = moments.count, moments.x, moments.xx
        if count > 0:
            power = xx.diagonal() / count
            # The bias compensates for the mean, if there is one.
            centred = getattr(model.get_submodule(name), "bias", None) is not None
            covariance = xx / count - torch.outer(x, x) / count**2 if centred else xx / count
            # The inverse exists too where all inputs are constant, up to rounding, or 0.
            scale = covariance.diagonal().mean().clamp_min(_CONSTANT * float(power.mean()) + 1e-200)
            added = ridge(len(x), count) * scale
            covariance.diagonal().add_(added)
            result[name] = covariance, power, added
    return result


_CONSTANT = 1e-10
"""Share of its second moment that the variance of an input has at least."""


class ReadLayer:
    """How well each unit of a group is predicted from all other inputs of one layer.

    Args:
        statistics: covariance (C, C) with its ridge, second moments (C,), and the ridge, of the inputs.
        index: indices of each unit among the inputs.
    """

    def __init__(self, statistics: tuple[Tensor, Tensor, Tensor], index: Sequence[Sequence[int]]) -> None:
        covariance, power, self._ridge = statistics
        self._inverse = torch.linalg.inv(covariance)
        self._row = torch.arange(len(power), device=power.device)  # of the inverse, for each input
        self._longest = max(map(len, index))
        padded = [[*places, *[len(power)] * (self._longest - len(places))] for places in index]
        self._inputs = torch.tensor(padded, device=power.device)  # (units, inputs of each)
        self._power = F.pad(power, (0, 1))[self._inputs].sum(1)

    def unpredicted(self, units: Tensor) -> Tensor:
        """Return the unpredicted share of the second moment of each of ``units``, 0 to 1, shape (units,)."""
        inputs = self._inputs[units]
        there = inputs < len(self._row)
        rows = self._row[inputs.clamp_max(len(self._row) - 1)]
        if self._longest == 1:
            left = 1 / self._inverse[rows[:, 0], rows[:, 0]] - self._ridge
        else:
            both = there[:, :, None] & there[:, None, :]
            inside = torch.where(both, self._inverse[rows[:, :, None], rows[:, None, :]], 0.0)
            inside.diagonal(dim1=1, dim2=2).masked_fill_(~there, 1.0)  # where a unit has fewer inputs than others
            left = torch.linalg.inv(inside).diagonal(dim1=1, dim2=2) - self._ridge
            left = torch.where(there, left, 0.0).sum(1)
        power = self._power[units]
        tiny = torch.finfo(power.dtype).tiny
        return torch.where(power > 0, left / power.clamp_min(tiny), 0.0).clamp(0.0, 1.0).cpu()

    def remove(self, units: Tensor) -> None:
        """Remove units, so that they no longer predict others."""
        removed = torch.zeros(len(self._inverse), dtype=torch.bool, device=self._inverse.device)
        removed[self._rows(units)] = True
        kept, dropped = (~removed).nonzero()[:, 0], removed.nonzero()[:, 0]
        cross = self._inverse[dropped][:, kept]
        known = torch.linalg.solve(self._inverse[dropped][:, dropped], cross)
        self._inverse = self._inverse[kept][:, kept] - cross.T @ known
        moved = (torch.cumsum(~removed, 0) - 1).clamp_min(0)
        self._row = moved[self._row]  # rows of removed inputs are not used again

    def restricted_to(self, units: Tensor) -> ReadLayer:
        """Return the layer restricted to a few units, from which units can be removed quickly."""
        result = copy.copy(self)
        rows = self._rows(units)
        result._inverse = self._inverse[rows][:, rows]
        new_row = torch.zeros(len(self._inverse), dtype=torch.int64, device=rows.device)
        new_row[rows] = torch.arange(len(rows), device=rows.device)
        result._row = new_row[self._row]
        return result

    def _rows(self, units: Tensor) -> Tensor:
        """Rows of the inverse that belong to ``units``."""
        inputs = self._inputs[units].flatten()
        return self._row[inputs[inputs < len(self._row)]]


def _costs(importance: Tensor, layers: Sequence[ReadLayer]) -> Tensor:
    """Cost of each unit at the moment of its removal, made strictly increasing in this order; shape (size,)."""
    base = importance.double()
    remaining = torch.arange(len(base))
    result = torch.zeros_like(base)
    per_step = -(-len(base) // STEPS)
    highest = 0.0
    while len(remaining):
        # The next units are among those with the lowest costs now. Their mutual effects need only a small submatrix.
        cheapest = remaining[_current_costs(base, remaining, layers).argsort()[: 2 * per_step]]
        submatrices = [layer.restricted_to(cheapest) for layer in layers]
        removed: list[int] = []
        while len(cheapest) and len(removed) < per_step:
            costs = _current_costs(base, cheapest, submatrices)
            lowest = int(costs.argmin())
            highest = max(highest * (1 + 1e-6), float(costs[lowest]))  # larger for the later of equal units
            removed.append(int(cheapest[lowest]))
            result[removed[-1]] = highest
            cheapest = torch.cat([cheapest[:lowest], cheapest[lowest + 1 :]])
            for layer in submatrices if len(cheapest) else ():
                layer.remove(torch.tensor(removed[-1:]))
        remaining = remaining[torch.isin(remaining, torch.tensor(removed), invert=True)]
        for layer in layers if len(remaining) else ():
            layer.remove(torch.tensor(removed))
    return result.float()


def _current_costs(base: Tensor, units: Tensor, layers: Sequence[ReadLayer]) -> Tensor:
    """Cost of each of ``units`` if it were removed next, shape (units,)."""
    return base[units] * torch.stack([layer.unpredicted(units) for layer in layers]).mean(0)
