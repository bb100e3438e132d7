"""From scores, costs and a budget to a plan: pure functions.

Everything that may go is put into one order, a sequence of *chunks*, that does not depend on the budget. A
budget takes the shortest beginning of the sequence that is cheap enough, so a larger budget always keeps all
that a smaller one keeps. For several limits at once, chunks are chosen as a knapsack instead.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimming.core.budget import METRICS, Budget
from slimming.core.groups import Anatomy, Group, Mask
from slimming.core.kinds import KINDS
from slimming.core.layout import Layout
from slimming.core.pruning_plan import Plan
from slimming.errors import BudgetError, PlanError
from slimming.planning.candidates import Array, Choice, Chunk, Pool, all_chunks, of_kind, sequence
from slimming.planning.knapsack import GAP, knapsack
from slimming.planning.sensitivity import Sensitivity, valued

Measure = Callable[[Mapping[str, int]], Mapping[str, float]]
"""From kept units per group (complete) to what that costs, by the names that `Budget.limits` uses."""

_ROUNDS = 10
"""How often costs are made linear anew, at most."""
NEAR = 0.99
"""The share of a limit that plans of one order are to reach."""
_ORDER = ("macs", "latency", "latency_ms", "params", "memory_bytes")
"""Of several limits, the one by whose order the exact solver begins."""


class Planner:
    """Makes plans of one model from one set of scores.

    Args:
        anatomy: the model.
        scores: one score per unit for each group that may be cut, shape (size,).
        layout: which sizes the layers may get.
        measure: what a choice costs.
        sensitivity: what cutting each kind does to the loss, if it was measured: limits weigh kinds by it, keep ratios
            do not.

    Raises:
        PlanError: scores of another model, or scores that are not finite.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        scores: Mapping[str, Tensor],
        layout: Layout,
        measure: Measure,
        sensitivity: Sensitivity | None = None,
    ) -> None:
        self._groups = _scored_groups(anatomy, scores)
        self._ranked = all_chunks(self._groups, scores, layout)
        self._pool = Pool(anatomy, self._ranked)
        self._measure, self._sensitivity = measure, sensitivity

    def least(self, kind: str) -> float:
        """The smallest share of the units of ``kind`` that a plan may keep."""
        return _shares_left(self._groups, self._ranked, kind)[1][-1]

    def smallest(self, metric: str) -> float:
        """The share of ``metric`` that is left when all goes that may go: no budget reaches less."""
        dense = self._measure({group.name: group.size for group in self._pool.anatomy.groups})
        nothing_stays = np.ones(len(self._pool.chunks), dtype=bool)
        return self._measure(self._pool.counts(self._pool.kept(nothing_stays)))[metric] / dense[metric]

    def plan(self, budget: Budget, *, fold: bool, solver: str | None = None) -> Plan:
        """The plan that keeps the most valuable units under ``budget``.

        Args:
            budget: what the slim model may cost.
            fold: stored in the plan, see `Plan`.
            solver: ``"nested"`` or ``"exact"``; None for the first where it ends near enough to a single limit, else
                for the second. Keep ratios need neither.

        Raises:
            BudgetError: the budget cannot be reached (the message says what can), or names a kind without scores.
        """
        solution: dict[str, Any] = {}
        if budget.keep is not None:
            goes = _for_keep_ratios(self._groups, self._ranked, budget)
        else:
            prices = _prices(self._pool, budget, self._measure)
            pool = self._pool.revalued(valued(self._ranked, self._groups, self._sensitivity, prices))
            goes, solution = _for_limits(pool, budget, self._measure, prices), {"solver": "nested"}
            if solver == "exact" or (solver is None and not self._near(goes, budget)):
                goes, solution = _exactly(pool, budget, self._measure, goes)
            lost, total = float(pool.values[~pool.stays(goes)].sum()), float(pool.values.sum())
            solution |= {"kept_score": 1 - lost / (total or 1.0), "lost_score": lost}
        complete = self._pool.complete(goes)
        return Plan(
            kept={group.name: tuple(np.flatnonzero(complete[group.name]).tolist()) for group in self._groups},
            sizes={group.name: group.size for group in self._groups},
            budget=budget.to_dict(),
            solution=solution,
            fold=fold,
        )

    def _near(self, goes: Choice, budget: Budget) -> bool:
        """Whether a choice ends at the only limit of ``budget``."""
        dense = self._measure({group.name: group.size for group in self._pool.anatomy.groups})
        limits = budget.absolute(dense)
        found = self._measure(self._pool.counts(self._pool.kept(goes)))
        return len(limits) == 1 and all(found[name] >= NEAR * min(limit, dense[name]) for name, limit in limits.items())


def _scored_groups(anatomy: Anatomy, scores: Mapping[str, Tensor]) -> list[Group]:
    groups = [anatomy.group(name) for name in scores]
    for group in groups:
        score = scores[group.name]
        if score.shape != (group.size,):
            raise PlanError(
                f"The scores of {group.name!r} are for {tuple(score.shape)} units, this model has {group.size}: "
                "they are of another model."
            )
        if not bool(torch.isfinite(score).all()):
            raise PlanError(f"The scores of {group.name!r} are not all finite: the search diverged. Lower its lr.")
    if not groups:
        raise PlanError("There are no scores to plan with; attach masks and search first.")
    return sorted(groups, key=lambda group: [g.name for g in anatomy.groups].index(group.name))


def _first(order: Sequence[int], count: int, chunks: int) -> Choice:
    """The first ``count`` of an order of some of the ``chunks``."""
    goes = np.zeros(chunks, dtype=bool)
    goes[list(order[:count])] = True
    return goes


def _prices(pool: Pool, budget: Budget, measure: Measure) -> Array:
    """What each chunk costs, as the sum of its shares of the limits, shape (chunks,)."""
    full = {group.name: group.size for group in pool.anatomy.groups}
    dense = measure(full)
    limits = budget.absolute(dense)
    return pool.priced({name: _unit_price(pool.anatomy, name, full, dense, limits, measure) for name in pool.names})


def _for_limits(pool: Pool, budget: Budget, measure: Measure, prices: Array) -> Choice:
    """The shortest beginning of one order, lowest score per price first, after which the limits hold."""
    dense = measure({group.name: group.size for group in pool.anatomy.groups})
    limits = budget.absolute(dense)
    order = sequence(pool.chunks, prices.tolist())

    def after(count: int) -> Choice:
        return _first(order, count, len(order))

    def cost_after(count: int) -> Mapping[str, float]:
        return measure(pool.counts(pool.kept(after(count))))

    def fits(count: int) -> bool:
        cost = cost_after(count)
        return all(cost[name] <= limit for name, limit in limits.items())

    if fits(0):
        return after(0)
    if not fits(len(order)):
        least = cost_after(len(order))
        reach = ", ".join(
            f"{name} {_rounded_up(least[name] / dense[name])}"
            + ("" if budget.is_share(name) else f" ({least[name]:,.10g})")
            for name in limits
        )
        wanted = ", ".join(f"{name} {limit:,.10g}" for name, limit in budget.limits.items())
        raise BudgetError(
            f"Budget {wanted} cannot be reached with the groups that have masks; the smallest reachable is {reach} "
            "of the dense model. Give a larger budget, attach more kinds, or allow a smaller layout.multiple."
        )
    return after(bisect_left(range(len(order) + 1), True, key=fits))


def _exactly(pool: Pool, budget: Budget, measure: Measure, start: Choice) -> tuple[Choice, dict[str, Any]]:
    """Improve ``start`` to the choice of the largest total score within the limits.

    Where costs are sums over layers, as of hidden units and head dimensions, it is the best there is. Tokens times
    dimensions, or channels in times channels out, are made linear at the last answer and solved again, a few times;
    the gap is then that of the linear problem. Which whole attentions and MLPs go is left as one order has it.
    """
    anatomy = pool.anatomy
    limits = budget.absolute(measure({group.name: group.size for group in anatomy.groups}))

    def worth(goes: Choice) -> float:
        return float(pool.values[pool.stays(goes)].sum())

    def change(name: str, kept: Mapping[str, Mask], here: Mapping[str, int], now: Mapping[str, float]) -> Any:
        """What one more unit of a group costs, or one less where all are there, per metric."""
        if _goes_alone(anatomy.group(name)):
            return _each(anatomy, name, here, limits, measure)
        one = kept[name].copy()
        place = int(one.argmin())  # the first that is gone, or the first
        one[place] = not one[place]
        then = measure(pool.counts({**kept, name: one}))
        return {metric: float(abs(now[metric] - then[metric])) for metric in limits}

    best, current, bound = start, start, None
    if len(limits) > 1:
        # The one order that holds all ends far below some of them, a poor place to make costs linear at.
        first = next(name for name in _ORDER if name in limits)
        alone = budget.alone(first)
        current = _for_limits(pool, alone, measure, _prices(pool, alone, measure))
    whole = current & pool.branch
    free = np.flatnonzero(pool.stays(whole) & ~pool.branch)
    if not free.size:
        return start, {"solver": "nested"}  # nothing but whole branches
    names = list(dict.fromkeys(name for place in free.tolist() for name, _ in pool.chunks[place].units))
    values = pool.values[free]
    before = pool.before(free.tolist())
    tight = dict.fromkeys(limits, 0.0)
    for _ in range(_ROUNDS):
        kept = pool.kept(current)
        here = pool.counts(kept)
        now = measure(here)
        unit = {name: change(name, kept, here, now) for name in names}
        prices = {m: pool.priced({n: unit[n][m] if n in unit else 0.0 for n in pool.names})[free] for m in limits}
        room = {m: limit - tight[m] - now[m] + prices[m][~current[free]].sum() for m, limit in limits.items()}
        found = knapsack(values, prices, room, before)
        if found is None:
            break
        chosen = whole.copy()
        chosen[free] = ~np.asarray(found.kept)
        reached = measure(pool.counts(pool.kept(chosen)))
        over = {m: max(0.0, reached[m] - limit) for m, limit in limits.items()}
        if not any(over.values()):
            bound = found.bound
            if any(tight.values()):  # of the limits themselves
                wide = {metric: room[metric] + tight[metric] for metric in limits}
                bound = (knapsack(values, prices, wide, before) or found).bound
            bound += float(pool.values[pool.branch & ~whole].sum())
            settled = bool((chosen == current).all())
            gained = worth(chosen) - worth(best)
            if gained > 0:
                best = chosen
            if settled or gained < GAP * worth(best):
                break
        # Where costs are products, the next linear problem is nearer to them; a small excess is taken off the room.
        near = all(excess < 0.01 * limits[m] for m, excess in over.items())
        tight = {m: tight[m] + excess if near else 0.0 for m, excess in over.items()}
        current = chosen
    if bound is None:
        return start, {"solver": "nested"}  # no linear problem led to a choice that holds
    total = float(pool.values.sum()) or 1.0
    gap = max(0.0, bound - worth(best))
    return best, {"solver": "exact", "gap": gap / total}


def _rounded_up(share: float) -> str:
    """A share as messages give it, never below ``share``, so that the named budget can be reached."""
    return f"{math.ceil(share * 1e4) / 1e4:.4f}"


def _goes_alone(group: Group) -> bool:
    """Whether one unit of a whole group takes nothing of other groups along.

    Tokens go from the deepest block up, so that one more token costs its own block only.
    """
    if group.role in ("qk", "v"):
        return min(group.limits.parts, default=0) > 1
    return group.role in ("mlp", "token", "width")


def _unit_price(
    anatomy: Anatomy,
    name: str,
    full: Mapping[str, int],
    dense: Mapping[str, float],
    limits: Mapping[str, float],
    measure: Measure,
) -> float:
    """What one unit of a group costs, as the sum of its shares of the limits."""
    if _goes_alone(anatomy.group(name)):
        each = _each(anatomy, name, full, limits, measure)
        return sum(each[metric] / limit for metric, limit in limits.items())
    kept = np.ones(full[name], dtype=bool)
    kept[0] = False
    less = measure({group: int(units.sum()) for group, units in anatomy.couplings.left({name: kept}).items()})
    return sum((dense[metric] - less[metric]) / limit for metric, limit in limits.items())


def _each(
    anatomy: Anatomy, name: str, here: Mapping[str, int], limits: Mapping[str, float], measure: Measure
) -> dict[str, float]:
    """What one unit of a group that goes alone costs per metric, when ``here`` is there.

    Time has steps, such as that of a token selection, which must not be the price of a single unit: it is the
    average over a quarter of the group.
    """
    group = anatomy.group(name)
    count = max(1, group.size // 4) if any(METRICS[metric].timed for metric in limits) else 1
    before = dict(here)
    if group.token is not None:
        # What leaves here has left in all deeper blocks before.
        for other in anatomy.groups:
            if other.token is not None and other.token.depth > group.token.depth:
                before[other.name] = max(1, before[other.name] - count)
    then = before[name] - count if before[name] > count else before[name] + count
    after = measure({**before, name: then})
    return {metric: abs(value - after[metric]) / count for metric, value in measure(before).items() if metric in limits}


def _for_keep_ratios(groups: Sequence[Group], chunks: Sequence[Chunk], budget: Budget) -> Choice:
    """One global ranking per kind over the whole network (ViT-Slim, section 3.3)."""
    goes = np.zeros(len(chunks), dtype=bool)
    assert budget.keep is not None
    for kind in sorted(budget.keep, key=list(KINDS).index):
        order, left = _shares_left(groups, chunks, kind)
        if not any(group.kind == kind for group in groups):
            have = ", ".join(sorted({group.kind for group in groups}))
            raise BudgetError(f"The budget names kind {kind!r}, but there are scores only for {have}.")
        count = next((i for i, share in enumerate(left) if share <= budget.keep[kind] + 1e-9), None)
        if count is None:
            raise BudgetError(
                f"Budget keep[{kind!r}]={budget.keep[kind]} cannot be reached; the smallest reachable is "
                f"{_rounded_up(left[-1])}. Give a larger ratio, or allow a smaller layout.multiple."
            )
        goes[order[:count]] = True
    return goes


def _shares_left(groups: Sequence[Group], chunks: Sequence[Chunk], kind: str) -> tuple[list[int], list[float]]:
    """Places of the chunks of one kind in their order, and the share of its units that each beginning of it leaves."""
    total = sum(group.size for group in groups if group.kind == kind)
    order = of_kind(chunks, groups, kind)
    gone: set[tuple[str, int]] = set()
    left = [1.0]
    for place in order:
        gone.update(chunks[place].units)
        left.append((total - len(gone)) / total)
    return order, left
