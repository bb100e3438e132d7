"""Put candidates back into a plan that ends below its limit, and say why a plan ends below it.

A solver that removes a prefix of one order, or that works with linearised costs, stops where the next candidate does
not fit. Smaller candidates may still fit, and an exchange may make room for a more valuable one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from slimming.planning.candidates import CandidatePool, Removed

Usage = Callable[[Removed], Mapping[str, float]]
"""A function from the removed candidates to the cost under each limit, as a share of that limit."""
NEAR = 0.99
"""Share of a limit that a plan must use; one that uses less is filled, and says why if it still uses less."""
_TRIALS = 1000
"""Largest number of plans whose cost is computed while candidates are exchanged."""


def share_of(cost: float, limit: float) -> float:
    """Return ``cost`` as a share of ``limit``: above 1 if and only if the cost is above the limit, despite rounding."""
    return cost / limit if cost <= limit else max(cost / limit, 1 + 1e-12)


class Filling:
    """Fills the room that a choice of candidates leaves under its limits.

    Args:
        pool: the candidates.
        order: indices of the candidates that may be removed, in removal order.
        usage: the cost of a choice; the limits hold if no share is above 1.
    """

    def __init__(self, pool: CandidatePool, order: Sequence[int], usage: Usage) -> None:
        self._pool, self._order, self.usage = pool, order, usage
        self._required = pool.required()
        self._trials = 0

    def improve(self, removed: Removed) -> Removed:
        """Put back the candidates that fit; if the result is not near a limit, exchange some candidates as well."""
        removed = self._filled(removed)
        while not self.is_near(removed) and self._trials < _TRIALS:
            better = next(self._exchanges(removed), None)
            if better is None:
                break
            removed = better
        return removed

    def is_near(self, removed: Removed) -> bool:
        """Whether the cost is within 1 % of a limit, or nothing is removed."""
        return max(self.usage(removed).values()) >= NEAR or not removed.any()

    def additions(self, removed: Removed) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Yield each candidate that could be put back next, with the usage that this would give."""
        for index in reversed(self._order):
            if self._is_next(removed, index):
                yield index, self.usage_with(removed, index)

    def usage_with(self, removed: Removed, index: int) -> Mapping[str, float]:
        """The usage if the candidate ``index`` is put back."""
        more = removed.copy()
        more[index] = False
        return self.usage(more)

    def last(self, removed: Removed) -> int:
        """The candidate that was removed last."""
        return next(index for index in reversed(self._order) if removed[index])

    def words(self, index: int) -> str:
        """A candidate in words, such as ``"8 units of 'layer1.0.conv1'"``."""
        units = self._pool.candidates[index].units
        groups = {name: self._pool.anatomy.group(name) for name, _ in units}
        name = next(iter(groups)) if len(groups) == 1 else next(iter(groups.values())).site
        return f"{len(units)} unit{'s' if len(units) > 1 else ''} of {name!r}"

    def _is_next(self, removed: Removed, index: int) -> bool:
        """Whether a candidate is removed, and all that must be kept with it is kept."""
        return bool(removed[index]) and not any(removed[other] for other in self._required[index])

    def _fits(self, removed: Removed) -> bool:
        self._trials += 1
        return max(self.usage(removed).values()) <= 1

    def _filled(self, removed: Removed, without: frozenset[int] = frozenset()) -> Removed:
        """Put back, from the end of the removal order, every candidate that fits and is not in ``without``."""
        removed, added = removed.copy(), True
        while added:
            added = False
            for index in reversed(self._order):
                if index not in without and self._is_next(removed, index):
                    removed[index] = False
                    if self._fits(removed):
                        added = True
                    else:
                        removed[index] = True
        return removed

    def _exchanges(self, removed: Removed) -> Iterator[Removed]:
        """Yield choices of more value: the next candidates of one chain make room for those of other chains."""
        value = self.kept_value(removed)
        chains: dict[tuple[str, int], list[int]] = {}
        for index in self._order:
            if not removed[index]:
                chains.setdefault(self._pool.candidates[index].chain, []).append(index)
        for chain in chains.values():
            for count in range(1, len(chain) + 1):
                if self._trials >= _TRIALS:
                    return
                fewer = removed.copy()
                fewer[chain[:count]] = True
                filled = self._filled(self._filled(fewer, frozenset(chain[:count])))
                if self.kept_value(filled) > value * (1 + 1e-9):
                    yield filled

    def kept_value(self, removed: Removed) -> float:
        """Total value of the candidates that are kept."""
        return float(self._pool.values[self._pool.remaining(removed)].sum())


def shortfall(
    filling: Filling, removed: Removed, amount: Callable[[str, float], str], *, nested: bool
) -> dict[str, float | str]:
    """Say how far a plan ends below its closest limit, and why; empty if it is within 1 %.

    Args:
        filling: the candidates and limits.
        removed: the removed candidates of the plan.
        amount: returns the text for a share of a limit, such as ``"45.00% of the dense model's MACs"``.
        nested: whether the plan had to be nested, so that its room was not filled.

    Returns:
        ``below``, the unused share of the closest limit, and ``note``, the sentences.
    """
    if filling.is_near(removed):
        return {}
    usage = filling.usage(removed)
    closest = max(usage, key=lambda metric: usage[metric])
    note = f"The plan keeps {amount(closest, usage[closest])}, {1 - usage[closest]:.1%} less than its limit allows."
    additions = dict(filling.additions(removed))
    fitting = [index for index, after in additions.items() if max(after.values()) <= 1]
    if nested and fitting:
        step, reason = filling.last(removed), "The next units in the fixed order of nested plans do not fit"
    else:
        step = min(additions, key=lambda index: max(additions[index].values()))
        reason = "No further units fit"
        if not nested:
            reason += ", and no exchange of units was found that keeps more of the score"
    after = filling.usage_with(removed, step)
    worst = max(after, key=lambda metric: after[metric])
    note += f" {reason}: with {filling.words(step)} more, it would keep {amount(worst, after[worst])}."
    if nested and fitting:
        note += " Plans of the default solver fill the room with other units."
    return {"below": 1 - usage[closest], "note": note}
