"""From scores, costs and a budget to a plan: pure functions.

Everything that may go is put into one order, a sequence of *chunks*, that does not depend on the budget. A
budget takes the shortest beginning of the sequence that is cheap enough, so a larger budget always keeps all
that a smaller one keeps. For several limits at once, chunks are chosen as a knapsack instead.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimming.chunks import Chunk, all_chunks
from slimming.errors import BudgetError, PlanError
from slimming.groups import Anatomy, Group, resolve
from slimming.plan import KINDS, Budget, Layout, Plan
from slimming.solve import GAP, knapsack

Measure = Callable[[Mapping[str, int]], Mapping[str, float]]
"""From kept units per group (complete) to what that costs, by the names that `Budget.limits` uses."""

_ROUNDS = 10
"""How often costs are made linear anew, at most."""


_FIRST = ("macs", "latency", "latency_ms", "params", "memory_bytes")
"""Of several limits, the one by whose order the exact solver begins."""


def make_plan(
    anatomy: Anatomy,
    scores: Mapping[str, Tensor],
    budget: Budget,
    layout: Layout,
    measure: Measure,
    *,
    fold: bool,
    solver: str = "nested",
) -> Plan:
    """The plan that keeps the most valuable units under ``budget``.

    Args:
        anatomy: the model.
        scores: one score per unit for each group that may be cut, shape (size,).
        budget: what the slim model may cost.
        layout: which sizes the layers may get.
        measure: what a choice costs.
        fold: stored in the plan, see `Plan`.
        solver: ``"nested"`` or ``"exact"``; keep ratios need neither.

    Raises:
        PlanError: scores of another model, or scores that are not finite.
        BudgetError: the budget cannot be reached (the message says what can), or names a kind without scores.
    """
    groups = _scored_groups(anatomy, scores)
    chunks = all_chunks(groups, scores, layout)
    solution: dict[str, Any] = {}
    if budget.keep is not None:
        dropped = _for_keep_ratios(groups, chunks, budget)
    else:
        dropped, solution = _for_limits(anatomy, chunks, budget, measure), {"solver": "nested"}
        if solver == "exact":
            dropped, solution = _exactly(anatomy, chunks, budget, measure, dropped)
    kept = {g.name: tuple(unit for unit in range(g.size) if unit not in dropped.get(g.name, ())) for g in groups}
    complete = resolve(anatomy.groups, kept)
    return Plan(
        kept={group.name: complete[group.name] for group in groups},
        sizes={group.name: group.size for group in groups},
        budget=budget.to_dict(),
        solution=solution,
        fold=fold,
    )


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


def _sequence(chunks: Sequence[Chunk], price: Callable[[Chunk], float]) -> list[Chunk]:
    """All chunks in the order in which they go: lowest score per price first, chains kept in order."""
    floor: dict[tuple[str, int], float] = {}
    keyed = []
    for place, chunk in enumerate(chunks):
        density = chunk.score * len(chunk.units) / max(price(chunk), 1e-30)
        floor[chunk.chain] = density = max(density, floor.get(chunk.chain, -float("inf")))
        keyed.append((density, place, chunk))
    return [chunk for _, _, chunk in sorted(keyed, key=lambda item: item[:2])]


def _dropped(chunks: Iterable[Chunk]) -> dict[str, set[int]]:
    result: dict[str, set[int]] = {}
    for chunk in chunks:
        for name, unit in chunk.units:
            result.setdefault(name, set()).add(unit)
    return result


def _counts(anatomy: Anatomy, dropped: Mapping[str, set[int]]) -> dict[str, int]:
    """How many units of every group stay when ``dropped`` goes."""
    sizes = {group.name: group.size for group in anatomy.groups}
    kept = {name: [unit for unit in range(sizes[name]) if unit not in units] for name, units in dropped.items()}
    return {name: len(units) for name, units in resolve(anatomy.groups, kept).items()}


def _for_limits(anatomy: Anatomy, chunks: Sequence[Chunk], budget: Budget, measure: Measure) -> dict[str, set[int]]:
    full = {group.name: group.size for group in anatomy.groups}
    dense = measure(full)
    limits = budget.absolute(dense)
    names = {name for chunk in chunks for name, _ in chunk.units}
    price = {name: _unit_price(anatomy, name, full, dense, limits, measure) for name in names}
    order = _sequence(chunks, lambda chunk: sum(price[name] for name, _ in chunk.units))

    def cost_after(count: int) -> Mapping[str, float]:
        return measure(_counts(anatomy, _dropped(order[:count])))

    def fits(count: int) -> bool:
        cost = cost_after(count)
        return all(cost[name] <= limit for name, limit in limits.items())

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
            "of the dense model. Give a larger budget, attach more kinds, or allow smaller layout multiples."
        )
    count = bisect_left(range(len(order) + 1), True, key=fits)
    return _dropped(order[:count])


def _exactly(
    anatomy: Anatomy, chunks: Sequence[Chunk], budget: Budget, measure: Measure, start: dict[str, set[int]]
) -> tuple[dict[str, set[int]], dict[str, Any]]:
    """Improve ``start`` to the choice of the largest total score within the limits.

    Where costs are sums over layers, as of hidden units and head dimensions, it is the best there is. Tokens times
    dimensions, or channels in times channels out, are made linear at the last answer and solved again, a few times;
    the gap is then that of the linear problem. Which whole attentions and MLPs go is left as one order has it.
    """
    full = {group.name: group.size for group in anatomy.groups}
    limits = budget.absolute(measure(full))
    site = {group.name: group.site for group in anatomy.groups}

    def value(chunk: Chunk) -> float:
        return max(chunk.score, 0.0) * len(chunk.units)

    def stay(dropped: Mapping[str, set[int]]) -> list[Chunk]:
        return [c for c in chunks if not _gone(c, dropped) and f"{site[c.units[0][0]]}.branch" not in dropped]

    def worth(dropped: Mapping[str, set[int]]) -> float:
        return sum(map(value, stay(dropped)))

    def change(name: str, dropped: Mapping[str, set[int]], here: Mapping[str, int], now: Mapping[str, float]) -> Any:
        """What one more unit of a group costs, or one less where all are there, per metric."""
        if _goes_alone(anatomy.group(name)):
            return _each(anatomy, name, here, limits, measure)
        gone = dropped.get(name, set())
        then = measure(_counts(anatomy, {**dropped, name: gone - {next(iter(gone))} if gone else {0}}))
        return {metric: float(abs(now[metric] - then[metric])) for metric in limits}

    best, current, bound = start, start, None
    if len(limits) > 1:
        # The one order that holds all ends far below some of them, a poor place to make costs linear at.
        first = next(name for name in _FIRST if name in limits)
        current = _for_limits(anatomy, chunks, budget.alone(first), measure)
    branches = {group.name for group in anatomy.groups if group.role == "branch"}
    whole = {name: units for name, units in current.items() if name in branches}
    chosen_from = [c for c in chunks if c.units[0][0] not in branches and f"{site[c.units[0][0]]}.branch" not in whole]
    names = list(dict.fromkeys(name for chunk in chosen_from for name, _ in chunk.units))
    values = [value(chunk) for chunk in chosen_from]
    before = _before(chosen_from)
    tight = dict.fromkeys(limits, 0.0)
    for _ in range(_ROUNDS):
        here = _counts(anatomy, current)
        now = measure(here)
        unit = {name: change(name, current, here, now) for name in names}
        prices = {m: [sum(unit[name][m] for name, _ in chunk.units) for chunk in chosen_from] for m in limits}
        stays = [not _gone(chunk, current) for chunk in chosen_from]
        room = {
            m: limit - tight[m] - now[m] + sum(p for p, stay in zip(prices[m], stays, strict=True) if stay)
            for m, limit in limits.items()
        }
        found = knapsack(values, prices, room, before)
        if found is None:
            break
        goes = (chunk for chunk, stay in zip(chosen_from, found.kept, strict=True) if not stay)
        chosen = {**_dropped(goes), **whole}
        reached = measure(_counts(anatomy, chosen))
        over = {m: max(0.0, reached[m] - limit) for m, limit in limits.items()}
        if not any(over.values()):
            bound = found.bound
            if any(tight.values()):  # of the limits themselves
                wide = {metric: room[metric] + tight[metric] for metric in limits}
                bound = (knapsack(values, prices, wide, before) or found).bound
            bound += sum(value(chunk) for chunk in chunks if chunk.units[0][0] in branches.difference(whole))
            settled = chosen == current
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
    total = sum(map(value, chunks)) or 1.0
    gap = max(0.0, bound - worth(best))
    return best, {"solver": "exact", "kept_score": worth(best) / total, "gap": gap / total}


def _gone(chunk: Chunk, dropped: Mapping[str, set[int]]) -> bool:
    name, unit = chunk.units[0]
    return unit in dropped.get(name, ())


def _before(chunks: Sequence[Chunk]) -> list[tuple[int, int]]:
    """Pairs of neighbours in one chain: if the first stays, so does the second, which goes later."""
    last: dict[tuple[str, int], int] = {}
    pairs = []
    for place, chunk in enumerate(chunks):
        if chunk.chain in last:
            pairs.append((last[chunk.chain], place))
        last[chunk.chain] = place
    return pairs


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
    kept = resolve(anatomy.groups, {name: range(1, full[name])})
    less = measure({group: len(units) for group, units in kept.items()})
    return sum((dense[metric] - less[metric]) / limit for metric, limit in limits.items())


def _each(
    anatomy: Anatomy, name: str, here: Mapping[str, int], limits: Mapping[str, float], measure: Measure
) -> dict[str, float]:
    """What one unit of a group that goes alone costs per metric, when ``here`` is there.

    Time has steps, such as that of a token selection, which must not be the price of a single unit: it is the
    average over a quarter of the group.
    """
    group = anatomy.group(name)
    count = max(1, group.size // 4) if any(metric.startswith("latency") for metric in limits) else 1
    before = dict(here)
    if group.token is not None:
        # What leaves here has left in all deeper blocks before.
        for other in anatomy.groups:
            if other.token is not None and other.token.depth > group.token.depth:
                before[other.name] = max(1, before[other.name] - count)
    then = before[name] - count if before[name] > count else before[name] + count
    after = measure({**before, name: then})
    return {metric: abs(value - after[metric]) / count for metric, value in measure(before).items() if metric in limits}


def _for_keep_ratios(groups: Sequence[Group], chunks: Sequence[Chunk], budget: Budget) -> dict[str, set[int]]:
    """One global ranking per kind over the whole network (ViT-Slim, section 3.3)."""
    kind_of = {group.name: group.kind for group in groups}
    dropped: dict[str, set[int]] = {}
    assert budget.keep is not None
    for kind in sorted(budget.keep, key=KINDS.index):
        total = sum(group.size for group in groups if group.kind == kind)
        if not total:
            have = ", ".join(sorted(set(kind_of.values())))
            raise BudgetError(f"The budget names kind {kind!r}, but there are scores only for {have}.")
        order = _sequence([c for c in chunks if kind_of[c.units[0][0]] == kind], lambda chunk: len(chunk.units))
        allowed = budget.keep[kind] * total
        counts = [0]
        gone: set[tuple[str, int]] = set()
        for chunk in order:
            gone.update(chunk.units)
            counts.append(len(gone))
        count = next((i for i, number in enumerate(counts) if total - number <= allowed + 1e-9), None)
        if count is None:
            raise BudgetError(
                f"Budget keep[{kind!r}]={budget.keep[kind]} cannot be reached; the smallest reachable is "
                f"{_rounded_up((total - counts[-1]) / total)}. Give a larger ratio, or allow smaller layout multiples."
            )
        for name, units in _dropped(order[:count]).items():
            dropped[name] = units
    return dropped
