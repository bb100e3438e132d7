"""Replace the scores of candidates by the measured increase of the loss when units of each kind are removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from slimming.core.groups import Group
from slimming.planning.candidates import Array, Candidate, removal_order, removal_order_of_kind

Curve = tuple[tuple[float, float], ...]
"""Measurements of one kind: pairs (share of its units that is kept, increase of the loss), the largest share first."""

SPREADS = ("rank", "score", "none")
"""Ways to distribute the loss of a kind over its units, see `Sensitivity`."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Increase of the loss when units of each kind are removed, and how plans use it.

    Attributes:
        curves: kind -> measurements with units of this kind alone removed.
        spread: how the loss of a kind is distributed over its units. ``"rank"``: by the rank of the unit within its
            kind. ``"score"``: in proportion to the scores, in the order of score per price. ``"none"``: not at all;
            plans use the scores.
        joint: spread -> measurements of plans with all kinds, as pairs (share of the MACs, increase of the loss).
    """

    curves: Mapping[str, Curve]
    spread: str = "rank"
    joint: Mapping[str, Curve] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as JSON values."""
        curves, joint = (
            {name: [list(point) for point in curve] for name, curve in group.items()}
            for group in (self.curves, self.joint)
        )
        return {"curves": curves, "spread": self.spread, "joint": joint}


def with_measured_loss(
    candidates: Sequence[Candidate], groups: Sequence[Group], sensitivity: Sensitivity | None, prices: Array
) -> list[Candidate]:
    """Return the candidates with their share of the measured loss as score and value.

    Kinds that were not measured keep their scores.

    Args:
        candidates: candidates with their original scores.
        groups: the groups that have candidates.
        sensitivity: the measurements; None returns the candidates unchanged.
        prices: cost of each candidate, shape (candidates,).
    """
    result = list(candidates)
    if sensitivity is None or sensitivity.spread == "none":
        return result
    for kind, curve in sensitivity.curves.items():
        indices = removal_order_of_kind(candidates, groups, kind)
        if not indices or not curve:
            continue
        of_kind = [candidates[index] for index in indices]
        sizes = np.array([len(candidate.units) for candidate in of_kind], dtype=float)
        scores = np.array([max(candidate.score, 0.0) for candidate in of_kind]) * sizes
        removed, loss = np.array([(0.0, 0.0), *((1 - kept, loss) for kept, loss in curve)]).T
        removed *= sum(group.size for group in groups if group.kind == kind)
        if sensitivity.spread == "rank" or not scores.any():
            losses = _loss_increments(removed, loss, sizes, range(len(of_kind)))
        else:
            # The loss is taken as a function of the total score that is removed, whichever units it belongs to.
            removed_score = np.interp(removed, [0.0, *np.cumsum(sizes)], [0.0, *np.cumsum(scores)])
            order = removal_order(of_kind, prices[indices].tolist())
            losses = _loss_increments(removed_score, loss, scores, order)
        for index, size, increment in zip(indices, sizes.tolist(), losses.tolist(), strict=True):
            result[index] = replace(candidates[index], score=increment / size, value=increment)
    return result


def _loss_increments(removed: Array, loss: Array, weights: Array, order: Sequence[int]) -> Array:
    """Increase of the loss with each weight when the weights are removed in ``order``; shape of ``weights``.

    Args:
        removed: total weight that was removed at each measurement, ascending from 0.
        loss: increase of the loss at each measurement.
        weights: weight of each candidate, at least 0.
        order: indices of ``weights``.
    """
    derivative = _derivative(removed, loss)
    ordered = weights[list(order)]
    result = np.empty_like(ordered)
    result[list(order)] = derivative(np.cumsum(ordered) - ordered / 2) * ordered
    return result


def _derivative(removed: Array, loss: Array) -> Callable[[Array], Array]:
    """Loss per weight as a function of the removed weight, made strictly increasing.

    Units that are removed later are assumed to cost at least as much as those before. Measured losses can flatten once
    many tokens are removed, but a plan that relied on this would first have to pay for the steep part.
    """
    apart = np.diff(removed) > 1e-12 * removed[-1]
    slopes = np.maximum(np.maximum.accumulate(np.diff(loss)[apart] / np.diff(removed)[apart]), 0.0)
    middles = ((removed[1:] + removed[:-1]) / 2)[apart]
    least = 1e-4 * max(slopes[-1], 1e-12)
    return lambda at: np.interp(at, [0.0, *middles], [0.0, *slopes]) + least * (1 + at / removed[-1])
