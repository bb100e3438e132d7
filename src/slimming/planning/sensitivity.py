"""What chunks are worth by measurement: the loss that cutting each adds, in place of its score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from slimming.core.groups import Group
from slimming.planning.candidates import Array, Chunk, of_kind, sequence

Curve = Sequence[tuple[float, float]]
"""What cutting a kind alone does: (share of its units that stays, by how much the loss grows), the largest first."""

SPREADS = ("rank", "score", "none")
"""Ways to lay the loss of a kind on its units, see `Sensitivity`."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What cutting each kind of unit does to the loss, and how plans use it.

    Attributes:
        curves: kind -> what cutting it alone does.
        spread: how a kind's loss is laid on its units. ``"rank"``: by a unit's place among those of its kind, in the
            order of the scores. ``"score"``: in proportion to the scores, in the order of score per price. ``"none"``:
            not at all, units count by their scores.
        joint: spread -> the losses of plans of all kinds together that were made by it, as (share of the MACs, loss).
    """

    curves: Mapping[str, Curve]
    spread: str = "rank"
    joint: Mapping[str, Curve] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        curves, joint = (
            {name: [list(point) for point in curve] for name, curve in group.items()}
            for group in (self.curves, self.joint)
        )
        return {"curves": curves, "spread": self.spread, "joint": joint}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Sensitivity:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        if value.get("spread") not in SPREADS:
            raise ValueError(f"spread {value['spread']!r}")
        curves, joint = (
            {name: tuple((float(at), float(loss)) for at, loss in curve) for name, curve in value[key].items()}
            for key in ("curves", "joint")
        )
        return Sensitivity(curves=curves, spread=value["spread"], joint=joint)


def valued(
    chunks: Sequence[Chunk], groups: Sequence[Group], sensitivity: Sensitivity | None, prices: Array
) -> list[Chunk]:
    """The chunks with the loss that cutting each adds as their score; kinds without a curve keep their scores.

    Args:
        chunks: as they were scored.
        groups: whose units they are.
        sensitivity: what was measured, if it was.
        prices: what each chunk costs, shape (chunks,).
    """
    result = list(chunks)
    if sensitivity is None or sensitivity.spread == "none":
        return result
    for kind, curve in sensitivity.curves.items():
        places = of_kind(chunks, groups, kind)
        if not places or not curve:
            continue
        own = [chunks[place] for place in places]
        sizes = np.array([len(chunk.units) for chunk in own], dtype=float)
        scores = np.array([max(chunk.score, 0.0) for chunk in own]) * sizes
        gone, loss = np.array([(0.0, 0.0), *((1 - kept, loss) for kept, loss in curve)]).T
        gone *= sum(group.size for group in groups if group.kind == kind)
        if sensitivity.spread == "rank" or not scores.any():
            losses = _grown(gone, loss, sizes, range(len(own)))
        else:
            # The loss is a function of the total score that is gone, whichever units had it.
            score = np.interp(gone, [0.0, *np.cumsum(sizes)], [0.0, *np.cumsum(scores)])
            losses = _grown(score, loss, scores, sequence(own, prices[places].tolist()))
        for place, size, one in zip(places, sizes.tolist(), losses.tolist(), strict=True):
            result[place] = replace(chunks[place], score=one / size, worth=one)
    return result


def _grown(at: Array, loss: Array, weights: Array, order: Sequence[int]) -> Array:
    """By how much the loss grows with each weight, when they go in ``order``; shape of ``weights``.

    Args:
        at: total weight that was gone at each measurement, from 0 up.
        loss: at each measurement.
        weights: what goes with each, at least 0.
        order: places of ``weights``.
    """
    slope = _slope(at, loss)
    own = weights[list(order)]
    result = np.empty_like(own)
    result[list(order)] = slope(np.cumsum(own) - own / 2) * own
    return result


def _slope(at: Array, loss: Array) -> Callable[[Array], Array]:
    """Loss per weight by the weight that is gone: never falling, and a little larger where more is gone.

    What goes later is taken to cost no less than what went earlier. Tokens do get cheaper behind a cliff, but only for
    those who pay for the cliff first.
    """
    apart = np.diff(at) > 1e-12 * at[-1]
    slopes = np.maximum(np.maximum.accumulate(np.diff(loss)[apart] / np.diff(at)[apart]), 0.0)
    middles = ((at[1:] + at[:-1]) / 2)[apart]
    least = 1e-4 * max(slopes[-1], 1e-12)
    return lambda here: np.interp(here, [0.0, *middles], [0.0, *slopes]) + least * (1 + here / at[-1])
