"""Order units for removal, assuming that the layers that read them are refitted after each step.

A unit whose values can be predicted from those of other units costs little once the layers that read it are compensated
(see `slimming.pruning.compensation`): only the unpredictable part is lost, so its importance is multiplied by that
part's share of its power. Two identical units predict each other, and only one of them may go. Units are therefore
removed a few at a time, and the inverse covariance of those that are left is updated after each step: its diagonal
holds the reciprocals of the unpredicted variances (Hassibi and Stork, NeurIPS 1992; for structures, ZipLM,
NeurIPS 2023).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
"""In so many steps the units of a group go."""
READERS = 4
"""Of the layers that read one group, at most so many are looked at, spread over the model."""


@torch.no_grad()
def redundancy_scores(
    model: nn.Module, groups: Sequence[Group], importance: Mapping[str, Tensor], images: Sequence[Tensor]
) -> dict[str, Tensor]:
    """What cutting each unit costs at its turn, when the units of its group go one after the other.

    Args:
        model: plain, in evaluation mode.
        groups: of that model.
        importance: what cutting each unit alone costs without compensation, at least 0, shape (size,) per group.
        images: batches of shape (B, C, H, W), the same on every process.

    Returns:
        Per group the costs, shape (size,); the importance itself where no layer reads the units directly, as with
        queries, tokens, features of the embedding and whole branches.
    """
    result = {group.name: importance[group.name] for group in groups}
    found = {group.name: _readers(model, group) for group in groups}

    def gigabytes(group: Group) -> float:
        return sum(8 * model.get_parameter(one.tensor).shape[1] ** 2 for one in found[group.name]) / 2**30

    for part in in_parts((group for group in groups if found[group.name]), gigabytes):
        # In one order on every process, which a set of words has not.
        names = list(dict.fromkeys(one.tensor.rpartition(".")[0] for group in part for one in found[group.name]))
        covariances = _covariances(model, names, images)
        for group in part:
            layers = [
                ReadLayer(covariances[name], one.index)
                for one in found[group.name]
                if (name := one.tensor.rpartition(".")[0]) in covariances
            ]
            if layers:
                result[group.name] = _costs(importance[group.name], layers)
    return result


def _readers(model: nn.Module, group: Group) -> list[Slices]:
    """The slices by which layers read the units of ``group``, as many as are looked at."""
    if not feeds_layers(group):
        return []
    every = [one for one in layers_reading(model, group) if all(one.index)]
    return every[:: -(-len(every) // READERS)] if every else []


def _covariances(
    model: nn.Module, names: Iterable[str], images: Sequence[Tensor]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Covariance (C, C) with its ridge, second moments (C,), and the ridge, of what each layer reads, if it ran."""
    like = next(model.parameters())
    sums: dict[str, Moments] = {}
    for name in names:
        weight = model.get_submodule(name).get_parameter("weight")
        sums[name] = Moments(weight.shape[1], weight.device)
    with inputs_of(model, sums) as read:
        for batch in own_share(images):
            model(batch.to(like.device, like.dtype))
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
            # The constant part is made up for by the bias, if there is one.
            centred = getattr(model.get_submodule(name), "bias", None) is not None
            covariance = xx / count - torch.outer(x, x) / count**2 if centred else xx / count
            scale = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
            added = ridge(len(x), count) * scale
            covariance.diagonal().add_(added)
            result[name] = covariance, power, added
    return result


class ReadLayer:
    """How well each unit of a group is predicted from all else that one layer reads.

    Args:
        statistics: covariance (C, C) with its ridge, second moments (C,), and the ridge, of what the layer reads.
        index: the places of each unit among the layer's inputs.
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
        """Share of the power of each of ``units`` that nothing else predicts, 0 to 1, shape (units,)."""
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
        """Take units away: from now on they predict nothing."""
        gone = torch.zeros(len(self._inverse), dtype=torch.bool, device=self._inverse.device)
        gone[self._rows(units)] = True
        stays, goes = (~gone).nonzero()[:, 0], gone.nonzero()[:, 0]
        across = self._inverse[goes][:, stays]
        known = torch.linalg.solve(self._inverse[goes][:, goes], across)
        self._inverse = self._inverse[stays][:, stays] - across.T @ known
        moved = (torch.cumsum(~gone, 0) - 1).clamp_min(0)
        self._row = moved[self._row]  # those of inputs that are gone are never asked for again

    def only(self, units: Tensor) -> ReadLayer:
        """The same layer for a few units, whose removal among themselves costs little."""
        result = copy.copy(self)
        rows = self._rows(units)
        result._inverse = self._inverse[rows][:, rows]
        found = torch.zeros(len(self._inverse), dtype=torch.int64, device=rows.device)
        found[rows] = torch.arange(len(rows), device=rows.device)
        result._row = found[self._row]
        return result

    def _rows(self, units: Tensor) -> Tensor:
        """Rows of the inverse that belong to ``units``."""
        inputs = self._inputs[units].flatten()
        return self._row[inputs[inputs < len(self._row)]]


def _costs(importance: Tensor, layers: Sequence[ReadLayer]) -> Tensor:
    """What each unit costs at its turn, never less than those before it; shape (size,)."""
    base = importance.double()
    left = torch.arange(len(base))
    result = torch.zeros_like(base)
    at_once = -(-len(base) // STEPS)
    highest = 0.0
    while len(left):
        # The next ones are among those that cost least now; what they cost after each other, few numbers say.
        some = left[_now(base, left, layers).argsort()[: 2 * at_once]]
        few = [layer.only(some) for layer in layers]
        gone: list[int] = []
        while len(some) and len(gone) < at_once:
            costs = _now(base, some, few)
            place = int(costs.argmin())
            highest = max(highest * (1 + 1e-6), float(costs[place]))  # of equals, too, the later one is worth more
            gone.append(int(some[place]))
            result[gone[-1]] = highest
            some = torch.cat([some[:place], some[place + 1 :]])
            for layer in few if len(some) else ():
                layer.remove(torch.tensor(gone[-1:]))
        left = left[torch.isin(left, torch.tensor(gone), invert=True)]
        for layer in layers if len(left) else ():
            layer.remove(torch.tensor(gone))
    return result.float()


def _now(base: Tensor, units: Tensor, layers: Sequence[ReadLayer]) -> Tensor:
    """What each of ``units`` would cost next, shape (units,)."""
    return base[units] * torch.stack([layer.unpredicted(units) for layer in layers]).mean(0)
