"""Choose the units to keep under a budget, given their scores and the costs.

Candidates for removal are sorted once, independently of the budget. The solver ``"nested"`` removes the shortest prefix
of that order with which all limits hold, so a larger budget keeps all units that a smaller one keeps. Where this ends
more than 1 % below the limit, and for several limits at once, a knapsack is solved and the remaining room is filled.
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
from slimming.planning.candidates import (
    Array,
    Candidate,
    CandidatePool,
    Removed,
    all_candidates,
    removal_order,
    removal_order_of_kind,
)
from slimming.planning.filling import Filling, share_of, shortfall
from slimming.planning.knapsack import GAP, knapsack
from slimming.planning.sensitivity import Sensitivity, with_measured_loss

Measure = Callable[[Mapping[str, int]], Mapping[str, float]]
"""A function from the number of kept units of every group to the costs, named as in `Budget.limits`."""

_ROUNDS = 10
"""Largest number of linearisations of the costs."""
_ORDER = ("macs", "latency", "latency_ms", "params", "memory_bytes")
"""Order of preference of the limit whose greedy plan is the first choice of the exact solver."""


class Planner:
    """Makes plans of one model from one set of scores.

    Args:
        anatomy: the model.
        scores: one score per unit for each group that may be cut, shape (size,).
        layout: sizes that the layers may have.
        measure: returns the costs for given numbers of kept units.
        sensitivity: measured increase of the loss for each kind; used for limits, not for keep ratios.

    Raises:
        PlanError: the scores belong to another model or are not finite.
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
        self._candidates = all_candidates(self._groups, scores, layout)
        self._pool = CandidatePool(anatomy, self._candidates)
        self._measure, self._sensitivity = measure, sensitivity

    def smallest_keep_ratio(self, kind: str) -> float:
        """Return the smallest share of the units of ``kind`` that a plan may keep."""
        return _keep_ratios_along_order(self._groups, self._candidates, kind)[1][-1]

    def smallest(self, metric: str) -> float:
        """Return the share of ``metric`` that is left when every candidate is removed: no budget can be smaller."""
        dense = self._measure({group.name: group.size for group in self._pool.anatomy.groups})
        all_removed = np.ones(len(self._pool.candidates), dtype=bool)
        return self._measure(self._pool.counts(self._pool.kept(all_removed)))[metric] / dense[metric]

    def plan(self, budget: Budget, *, fold: bool, solver: str | None = None) -> Plan:
        """Return the plan that keeps the most valuable units under ``budget``.

        Args:
            budget: what the slim model may cost.
            fold: stored in the plan, see `Plan`.
            solver: ``"nested"`` or ``"exact"``; None takes ``"nested"`` if it reaches 99 % of a single limit or of
                every keep ratio, else ``"exact"``.

        Raises:
            BudgetError: the budget cannot be reached (the message names the smallest that can), or it names a kind
                without scores.
        """
        if budget.keep is not None:
            removed, solution = self._by_keep_ratios(budget, solver)
        else:
            removed, solution = self._under_limits(budget, solver)
        complete = self._pool.complete(removed)
        return Plan(
            kept={group.name: tuple(np.flatnonzero(complete[group.name]).tolist()) for group in self._groups},
            sizes={group.name: group.size for group in self._groups},
            budget=budget.to_dict(),
            solution=solution,
            fold=fold,
        )

    def _under_limits(self, budget: Budget, solver: str | None) -> tuple[Removed, dict[str, Any]]:
        """Return the removed candidates under limits, and how they were chosen."""
        prices = _prices(self._pool, budget, self._measure)
        pool = self._pool.with_candidates(with_measured_loss(self._candidates, self._groups, self._sensitivity, prices))
        dense = self._measure({group.name: group.size for group in pool.anatomy.groups})
        limits = budget.absolute(dense)

        def usage(removed: Removed) -> dict[str, float]:
            cost = self._measure(pool.counts(pool.kept(removed)))
            return {metric: share_of(cost[metric], limit) for metric, limit in limits.items()}

        filling = Filling(pool, removal_order(pool.candidates, prices.tolist()), usage)
        removed, solution = _greedy(pool, budget, self._measure, prices), {"solver": "nested"}
        if solver == "exact" or (solver is None and (len(limits) > 1 or not filling.is_near(removed))):
            exact, solution = _exact(pool, budget, self._measure, removed)
            filled = max(filling.improve(exact), filling.improve(removed), key=filling.kept_value)
            gain = filling.kept_value(filled) - filling.kept_value(exact)
            if "gap" in solution:
                solution["gap"] = max(0.0, solution["gap"] - gain / (float(pool.values.sum()) or 1.0))
            if (filled != exact).any():
                solution["solver"] = "exact"
            removed = filled
        lost, total = float(pool.values[~pool.remaining(removed)].sum()), float(pool.values.sum())
        solution |= {"kept_score": 1 - lost / (total or 1.0), "lost_score": lost}
        return removed, solution | shortfall(filling, removed, _amounts(budget), nested=solver == "nested")

    def _by_keep_ratios(self, budget: Budget, solver: str | None) -> tuple[Removed, dict[str, Any]]:
        """One global ranking per kind over the whole network (ViT-Slim, section 3.3)."""
        keep = budget.keep or {}
        removed = np.zeros(len(self._candidates), dtype=bool)
        solution: dict[str, Any] = {}
        for kind in sorted(keep, key=list(KINDS).index):
            order, ratios = _keep_ratios_along_order(self._groups, self._candidates, kind)
            sizes = {group.name: group.size for group in self._groups if group.kind == kind}
            if not sizes:
                have = ", ".join(sorted({group.kind for group in self._groups}))
                raise BudgetError(f"The budget names kind {kind!r}, but there are scores only for {have}.")
            count = next((i for i, ratio in enumerate(ratios) if ratio <= keep[kind] + 1e-9), None)
            if count is None:
                raise BudgetError(
                    f"Budget keep[{kind!r}]={keep[kind]} cannot be reached; the smallest reachable is "
                    f"{_rounded_up(ratios[-1])}. Give a larger ratio, or allow a smaller layout.multiple."
                )
            removed[order[:count]] = True

            def usage(removed: Removed, kind: str = kind, sizes: Mapping[str, int] = sizes) -> dict[str, float]:
                kept = self._pool.kept(removed)
                units = sum(int(kept[name].sum()) if name in kept else size for name, size in sizes.items())
                return {kind: share_of(units / sum(sizes.values()), keep[kind] + 1e-9)}

            filling = Filling(self._pool, order, usage)
            if solver == "exact" or (solver is None and not filling.is_near(removed)):
                removed = filling.improve(removed)
            found = shortfall(filling, removed, _amounts(budget), nested=solver == "nested")
            if float(found.get("below", 0.0)) > float(solution.get("below", 0.0)):
                solution = found
        return removed, solution


def _amounts(budget: Budget) -> Callable[[str, float], str]:
    """Return a function from a limit and a share of it to the text of this amount."""

    def amount(name: str, share: float) -> str:
        if budget.keep is not None:
            return f"{share * budget.keep[name]:.2%} of the {KINDS[name].units}"
        value = share * budget.limits[name]
        if budget.is_share(name):
            return f"{value:.2%} of the dense model's {METRICS[name].label}"
        return f"{value:.4g} ms" if name == "latency_ms" else f"{value:,.0f} {METRICS[name].label}"

    return amount


def _scored_groups(anatomy: Anatomy, scores: Mapping[str, Tensor]) -> list[Group]:
    groups = [anatomy.group(name) for name in scores]
    for group in groups:
        score = scores[group.name]
        if score.shape != (group.size,):
            raise PlanError(
                f"The scores of {group.name!r} are for {tuple(score.shape)} units, this model has {group.size}: "
                "they are of another model. Score this model, or give the model that was scored."
            )
        if not bool(torch.isfinite(score).all()):
            raise PlanError(f"The scores of {group.name!r} are not all finite: the search diverged. Lower its lr.")
    if not groups:
        raise PlanError("There are no scores to plan with; attach masks and search first.")
    return sorted(groups, key=lambda group: [g.name for g in anatomy.groups].index(group.name))


def _prefix(order: Sequence[int], count: int, candidates: int) -> Removed:
    """The first ``count`` indices of ``order``, as a mask over this number of candidates."""
    removed = np.zeros(candidates, dtype=bool)
    removed[list(order[:count])] = True
    return removed


def _prices(pool: CandidatePool, budget: Budget, measure: Measure) -> Array:
    """The cost of each candidate, as the sum of its shares of the limits, shape (candidates,)."""
    full = {group.name: group.size for group in pool.anatomy.groups}
    dense = measure(full)
    limits = budget.absolute(dense)
    return pool.prices({name: _price_per_unit(pool.anatomy, name, full, dense, limits, measure) for name in pool.names})


def _greedy(pool: CandidatePool, budget: Budget, measure: Measure, prices: Array) -> Removed:
    """Remove the shortest prefix of the removal order (lowest score per price first) with which the limits hold."""
    dense = measure({group.name: group.size for group in pool.anatomy.groups})
    limits = budget.absolute(dense)
    order = removal_order(pool.candidates, prices.tolist())

    def after(count: int) -> Removed:
        return _prefix(order, count, len(order))

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
            f"Budget {wanted} cannot be reached with the groups that have scores; the smallest reachable is {reach} "
            "of the dense model. Give a larger budget, attach more kinds, or allow a smaller layout.multiple."
        )
    return after(bisect_left(range(len(order) + 1), True, key=fits))


def _exact(pool: CandidatePool, budget: Budget, measure: Measure, start: Removed) -> tuple[Removed, dict[str, Any]]:
    """Improve ``start`` to the choice with the largest total value within the limits.

    Where costs are sums over layers, as for hidden units and head dimensions, the result is optimal. Where they are
    products (tokens times dimensions, input channels times output channels), they are linearised around the last
    choice and the problem is solved again, up to `_ROUNDS` times; the gap is then that of the linearised problem. Whole
    attentions and MLPs are removed as by the greedy solver.
    """
    limits = budget.absolute(measure({group.name: group.size for group in pool.anatomy.groups}))
    best, current, bound = start, _first_linearisation(pool, budget, measure, start), None
    branches = current & pool.branch
    free = np.flatnonzero(pool.remaining(branches) & ~pool.branch)
    if not free.size:
        return start, {"solver": "nested"}  # every candidate is a whole branch
    names = list(dict.fromkeys(name for index in free.tolist() for name, _ in pool.candidates[index].units))
    values, precedence = pool.values[free], pool.precedence(free.tolist())
    margin = dict.fromkeys(limits, 0.0)
    for _ in range(_ROUNDS):
        kept = pool.kept(current)
        counts = pool.counts(kept)
        cost = measure(counts)
        unit_costs = {name: _marginal_cost(pool, name, kept, counts, cost, limits, measure) for name in names}
        prices = {
            m: pool.prices({n: unit_costs[n][m] if n in unit_costs else 0.0 for n in pool.names})[free] for m in limits
        }
        room = {m: limit - margin[m] - cost[m] + prices[m][~current[free]].sum() for m, limit in limits.items()}
        solution = knapsack(values, prices, room, precedence)
        if solution is None:
            break
        chosen = branches.copy()
        chosen[free] = ~np.asarray(solution.kept)
        reached = measure(pool.counts(pool.kept(chosen)))
        excess = {m: max(0.0, reached[m] - limit) for m, limit in limits.items()}
        if not any(excess.values()):
            bound = solution.bound
            if any(margin.values()):  # the bound must be that of the given limits, without the margin
                whole_room = {metric: room[metric] + margin[metric] for metric in limits}
                bound = (knapsack(values, prices, whole_room, precedence) or solution).bound
            bound += float(pool.values[pool.branch & ~branches].sum())
            unchanged = bool((chosen == current).all())
            gain = _kept_value(pool, chosen) - _kept_value(pool, best)
            if gain > 0:
                best = chosen
            if unchanged or gain < GAP * _kept_value(pool, best):
                break
        # The next linearisation is closer to costs that are products. A small excess is subtracted from the room.
        small = all(over < 0.01 * limits[m] for m, over in excess.items())
        margin = {m: margin[m] + over if small else 0.0 for m, over in excess.items()}
        current = chosen
    if bound is None:
        return start, {"solver": "nested"}  # no linearised problem gave a choice within the limits
    gap = max(0.0, bound - _kept_value(pool, best))
    return best, {"solver": "exact", "gap": gap / (float(pool.values.sum()) or 1.0)}


def _first_linearisation(pool: CandidatePool, budget: Budget, measure: Measure, start: Removed) -> Removed:
    """The choice around which costs are linearised first.

    With several limits, ``start`` ends far below some of them; a greedy plan for a single one is closer to the optimum.
    """
    if len(budget.limits) == 1:
        return start
    single = budget.alone(next(name for name in _ORDER if name in budget.limits))
    return _greedy(pool, single, measure, _prices(pool, single, measure))


def _kept_value(pool: CandidatePool, removed: Removed) -> float:
    """Total value of the candidates that are kept."""
    return float(pool.values[pool.remaining(removed)].sum())


def _marginal_cost(
    pool: CandidatePool,
    name: str,
    kept: Mapping[str, Mask],
    counts: Mapping[str, int],
    cost: Mapping[str, float],
    limits: Mapping[str, float],
    measure: Measure,
) -> dict[str, float]:
    """The cost per metric of one more unit of a group, or of one less if all are kept.

    Args:
        pool: the candidates.
        name: the group.
        kept: kept units of the groups that have candidates.
        counts: number of kept units of every group.
        cost: cost of these.
        limits: metrics to return.
        measure: see `Planner`.
    """
    if _is_independent(pool.anatomy.group(name)):
        return independent_unit_cost(pool.anatomy, name, counts, limits, measure)
    changed = kept[name].copy()
    unit = int(changed.argmin())  # the first that is removed, or unit 0 if all are kept
    changed[unit] = not changed[unit]
    after = measure(pool.counts({**kept, name: changed}))
    return {metric: float(abs(cost[metric] - after[metric])) for metric in limits}


def _rounded_up(share: float) -> str:
    """A share for a message, rounded up so that the budget that the message names can be reached."""
    return f"{math.ceil(share * 1e4) / 1e4:.4f}"


def _is_independent(group: Group) -> bool:
    """Whether removing one unit of a complete group removes no units of other groups.

    Tokens are removed from the deepest block up, so one more token costs its own block only.
    """
    if group.role in ("qk", "v"):
        return min(group.limits.parts, default=0) > 1
    return group.role in ("mlp", "token", "width")


def _price_per_unit(
    anatomy: Anatomy,
    name: str,
    full: Mapping[str, int],
    dense: Mapping[str, float],
    limits: Mapping[str, float],
    measure: Measure,
) -> float:
    """The cost of one unit of a group in the dense model, as the sum of its shares of the limits."""
    if _is_independent(anatomy.group(name)):
        unit_cost = independent_unit_cost(anatomy, name, full, limits, measure)
        return sum(unit_cost[metric] / limit for metric, limit in limits.items())
    kept = np.ones(full[name], dtype=bool)
    kept[0] = False
    less = measure({group: int(units.sum()) for group, units in anatomy.couplings.left({name: kept}).items()})
    return sum((dense[metric] - less[metric]) / limit for metric, limit in limits.items())


def independent_unit_cost(
    anatomy: Anatomy, name: str, counts: Mapping[str, int], limits: Mapping[str, float], measure: Measure
) -> dict[str, float]:
    """The cost per metric of one unit of an independent group, when every group keeps ``counts`` units.

    Measured times have steps, such as that of a token selection, which are not the cost of a single unit: times are
    averaged over a quarter of the group.
    """
    group = anatomy.group(name)
    count = max(1, group.size // 4) if any(METRICS[metric].timed for metric in limits) else 1
    before = dict(counts)
    if group.token is not None:
        # Tokens that are removed here have been removed in all deeper blocks before.
        for other in anatomy.groups:
            site = other.token
            if site is not None and site.sequence == group.token.sequence and site.depth > group.token.depth:
                before[other.name] = max(1, before[other.name] - count)
    then = before[name] - count if before[name] > count else before[name] + count
    after = measure({**before, name: then})
    return {metric: abs(value - after[metric]) / count for metric, value in measure(before).items() if metric in limits}


def _keep_ratios_along_order(
    groups: Sequence[Group], candidates: Sequence[Candidate], kind: str
) -> tuple[list[int], list[float]]:
    """The removal order of one kind, and the share of its units that is kept after 0, 1, … candidates."""
    total = sum(group.size for group in groups if group.kind == kind)
    order = removal_order_of_kind(candidates, groups, kind)
    removed: set[tuple[str, int]] = set()
    ratios = [1.0]
    for index in order:
        removed.update(candidates[index].units)
        ratios.append((total - len(removed)) / total)
    return order, ratios
