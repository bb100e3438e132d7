"""Group units into candidates for removal, and order the candidates by their scores.

A candidate holds as many units as the layout requires: 8 hidden units, for example. Candidates that must be removed in
order form a chain. Nothing here depends on a budget.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from slimming.core.groups import Anatomy, Group, Mask
from slimming.core.layout import Layout

DEFAULT_MULTIPLE, _FEWEST_SIZES = 8, 4
Array = npt.NDArray[np.float64]
Removed = npt.NDArray[np.bool_]
"""For each candidate of a pool, whether it is removed; shape (candidates,)."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Units that are removed together.

    Attributes:
        units: pairs of a group's name and a unit of that group.
        score: score per unit that decides the removal order; it never decreases along a chain.
        value: what is lost by removing the units: the sum of their scores, or the measured increase of the loss.
        chain: the chain that the candidate belongs to; its candidates are removed one after the other.
    """

    units: tuple[tuple[str, int], ...]
    score: float
    value: float
    chain: tuple[str, int]


class CandidatePool:
    """The candidates of a model as arrays.

    Attributes:
        candidates: everything that may be removed.
        values: value of each candidate, at least 0, shape (candidates,).
        branch: for each candidate, whether it is a whole attention or MLP, shape (candidates,).
    """

    def __init__(self, anatomy: Anatomy, candidates: Sequence[Candidate]) -> None:
        self.anatomy, self.candidates = anatomy, candidates
        self.values = _values(candidates)
        groups = {group.name: group for group in anatomy.groups}
        first = [candidate.units[0][0] for candidate in candidates]
        self.branch = np.array([groups[name].role == "branch" for name in first], dtype=bool)
        branches = {name: index for index, name in enumerate(first) if self.branch[index]}
        # Pairs of a candidate and a branch that it is in.
        inside = [(i, branches[b]) for i, name in enumerate(first) for b in anatomy.around[name] if b in branches]
        self._inside = np.array(inside, dtype=int).reshape(-1, 2)
        units_and_owners: dict[str, tuple[list[int], list[int]]] = {}
        first_owner: dict[tuple[str, int], int] = {}
        shared: set[tuple[int, int]] = set()
        for index, candidate in enumerate(candidates):
            for name, unit in candidate.units:
                units, owners = units_and_owners.setdefault(name, ([], []))
                units.append(unit)
                owners.append(index)
                if (owner := first_owner.setdefault((name, unit), index)) != index:
                    shared.add((owner, index))
        self._shared = np.array(sorted(shared), dtype=int).reshape(-1, 2)
        self._owned = {name: (np.array(units), np.array(owners)) for name, (units, owners) in units_and_owners.items()}
        self._sizes = {name: groups[name].size for name in units_and_owners}

    def with_candidates(self, candidates: Sequence[Candidate]) -> CandidatePool:
        """Return the pool with the same units in each candidate, and other scores and values."""
        result = copy.copy(self)
        result.candidates, result.values = candidates, _values(candidates)
        return result

    @property
    def names(self) -> list[str]:
        """Names of the groups that have candidates."""
        return list(self._owned)

    def kept(self, removed: Removed) -> dict[str, Mask]:
        """Return, for each group with candidates, the units that are in no removed candidate."""
        result = {}
        for name, (units, owners) in self._owned.items():
            result[name] = np.ones(self._sizes[name], dtype=bool)
            result[name][units[removed[owners]]] = False
        return result

    def complete(self, removed: Removed) -> dict[str, Mask]:
        """Return the kept units of every group of the model."""
        return self.anatomy.couplings.left(self.kept(removed))

    def counts(self, kept: Mapping[str, Mask]) -> dict[str, int]:
        """Return the number of kept units of every group of the model."""
        return {name: int(mask.sum()) for name, mask in self.anatomy.couplings.left(kept).items()}

    def remaining(self, removed: Removed) -> Removed:
        """Return the candidates that are kept: not removed themselves, nor within a removed head, attention or MLP."""
        gone = removed.copy()
        gone[self._inside[removed[self._inside[:, 1]], 0]] = True
        gone[self._shared[removed[self._shared[:, 1]], 0]] = True
        return ~gone

    def precedence(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Return pairs (first, then) of positions in ``indices``: if the first is kept, the second must be kept too."""
        position = {index: number for number, index in enumerate(indices)}
        last: dict[tuple[str, int], int] = {}
        pairs = [(position[first], position[then]) for first, then in self._shared.tolist() if first in position]
        for number, index in enumerate(indices):
            chain = self.candidates[index].chain
            if chain in last:
                pairs.append((last[chain], number))
            last[chain] = number
        return pairs

    def required(self) -> list[list[int]]:
        """Return, for each candidate, those that must be kept if it is: the rest of its chain, its head, its branch."""
        result: list[list[int]] = [[] for _ in self.candidates]
        for first, then in self.precedence(range(len(self.candidates))):
            result[first].append(then)
        for index, branch in self._inside.tolist():
            result[index].append(branch)
        return result

    def prices(self, unit_prices: Mapping[str, float]) -> Array:
        """Return the price of each candidate, shape (candidates,), given the price of one unit of each group."""
        result = np.zeros(len(self.candidates))
        for name, (_, owners) in self._owned.items():
            result += unit_prices[name] * np.bincount(owners, minlength=len(result))
        return result


def _values(candidates: Sequence[Candidate]) -> Array:
    return np.array([max(candidate.value, 0.0) for candidate in candidates])


def all_candidates(groups: Sequence[Group], scores: Mapping[str, Tensor], layout: Layout) -> list[Candidate]:
    """Return every candidate, given one score per unit of each group, in the sizes that ``layout`` allows."""
    candidates: list[Candidate] = []
    by_site: dict[str, dict[str, Group]] = {}
    for group in groups:
        by_site.setdefault(group.site, {})[group.role] = group
    for roles in by_site.values():
        candidates += _attention_candidates(roles, scores, layout)
        for role in ("mlp", "channel", "width"):
            if role in roles:
                scarcity = layout.scarcity if role == "channel" else 0.0
                candidates += _plain_candidates(roles[role], scores, _multiple(roles[role].size, layout), scarcity)
        if "head" in roles:
            candidates += _plain_candidates(roles["head"], scores, 1)
        if "branch" in roles:
            name = roles["branch"].name
            score = float(scores[name][0])
            candidates.append(Candidate(units=((name, 0),), score=score, value=score, chain=(name, 0)))
    tokens: dict[str, list[Group]] = {}
    for group in groups:
        if group.token is not None:
            tokens.setdefault(group.token.sequence, []).append(group)
    for sequence, blocks in tokens.items():
        candidates += _token_candidates(blocks, scores, f"tokens {sequence}")
    return candidates


def removal_order(candidates: Sequence[Candidate], prices: Sequence[float]) -> list[int]:
    """Return the indices of the candidates in removal order: lowest score per price first, chains kept in order."""
    floor: dict[tuple[str, int], float] = {}
    keyed = []
    for index, (candidate, price) in enumerate(zip(candidates, prices, strict=True)):
        density = candidate.score * len(candidate.units) / max(price, 1e-30)
        floor[candidate.chain] = density = max(density, floor.get(candidate.chain, -float("inf")))
        keyed.append((density, index))
    return [index for _, index in sorted(keyed)]


def removal_order_of_kind(candidates: Sequence[Candidate], groups: Sequence[Group], kind: str) -> list[int]:
    """Return the indices of the candidates of one kind, in removal order when only this kind is pruned."""
    names = {group.name for group in groups if group.kind == kind}
    indices = [index for index, candidate in enumerate(candidates) if candidate.units[0][0] in names]
    of_kind = [candidates[index] for index in indices]
    return [indices[number] for number in removal_order(of_kind, [len(candidate.units) for candidate in of_kind])]


def _multiple(size: int, layout: Layout) -> int:
    """The multiple for ``size`` units: halved until it divides them into at least `_FEWEST_SIZES` parts."""
    multiple = DEFAULT_MULTIPLE if layout.multiple is None else layout.multiple
    while multiple > 1 and (size % multiple or size // multiple < _FEWEST_SIZES):
        multiple //= 2
    return multiple


def _ascending(score: Tensor, units: Sequence[int]) -> list[int]:
    values = score.tolist()
    return sorted(units, key=lambda unit: (values[unit], unit))


def _bundles(units: Sequence[int], multiple: int) -> list[list[int]]:
    return [list(units[start : start + multiple]) for start in range(0, len(units), multiple)]


def chain_of(
    name: str, number: int, bundles: Iterable[Sequence[tuple[str, int]]], scores: Mapping[str, list[float]]
) -> list[Candidate]:
    """Return the candidates of one chain, their scores made non-decreasing so that sorting keeps their order."""
    candidates: list[Candidate] = []
    floor = -float("inf")
    for bundle in bundles:
        total = sum(scores[group][unit] for group, unit in bundle)
        floor = max(floor, total / len(bundle))
        candidates.append(Candidate(units=tuple(bundle), score=floor, value=total, chain=(name, number)))
    return candidates


def _plain_candidates(
    group: Group, scores: Mapping[str, Tensor], multiple: int, scarcity: float = 0.0
) -> list[Candidate]:
    """Bundles in ascending order of score; the last is always kept. See `Layout` for ``scarcity``."""
    order = _ascending(scores[group.name], range(group.size))
    values = scores[group.name].tolist()
    for removed, unit in enumerate(order):
        values[unit] /= (1 - removed / group.size) ** scarcity
    bundles = [[(group.name, unit) for unit in bundle] for bundle in _bundles(order, multiple)]
    return chain_of(group.name, 0, bundles[:-1], {group.name: values})


def _attention_candidates(roles: Mapping[str, Group], scores: Mapping[str, Tensor], layout: Layout) -> list[Candidate]:
    present = {group.name for group in roles.values()}
    # A group that must keep the size of another cannot be cut without it.
    members = [
        roles[role]
        for role in ("qkv", "qk", "v")
        if role in roles and (role == "qkv" or roles[role].limits.same_as in (None, *present))
    ]
    if not members:
        return []
    values = {group.name: scores[group.name].tolist() for group in members}
    held = members[0].limits.equal
    apart = held and not (layout.equal_heads or layout.equal_qkv or members[0].limits.same_as)
    if layout.equal_heads or held:
        sizes = {size * group.width for group in members for size in group.limits.parts}
        if len(sizes) == 1 and not apart:
            return _equal_candidates(members[0].site, members, scores, values, layout)
        if held:
            return [
                candidate
                for group in members
                for candidate in _equal_candidates(group.name, [group], scores, values, layout)
            ]
    return _uneven_candidates(roles, scores, values, layout)


def _equal_candidates(
    name: str,
    members: Sequence[Group],
    scores: Mapping[str, Tensor],
    values: Mapping[str, list[float]],
    layout: Layout,
) -> list[Candidate]:
    """Candidates that remove equally many units from every head of ``members``, which have one size."""
    per_head, width = members[0].limits.parts[0] * members[0].width, max(group.width for group in members)
    multiple = max(width, _multiple(per_head, layout))
    heads = [bundles for g in members for bundles in _head_bundles(g, scores[g.name], multiple // g.width)]
    steps = [[pair for bundles in heads for pair in bundles[step]] for step in range(per_head // multiple - 1)]
    return chain_of(name, 0, steps, values)


def _head_bundles(group: Group, score: Tensor, multiple: int) -> list[list[list[tuple[str, int]]]]:
    """For each head, its units in bundles, in ascending order of score; of the score of all heads if they are alike."""
    owner = group.part_of_unit
    if group.limits.alike:
        by_head = score.view(len(group.limits.parts), -1)
        score = by_head.sum(0).expand_as(by_head).flatten()
    heads = []
    for head in range(len(group.limits.parts)):
        order = _ascending(score, [unit for unit in range(group.size) if owner[unit] == head])
        heads.append([[(group.name, unit) for unit in bundle] for bundle in _bundles(order, multiple)])
    return heads


def _uneven_candidates(
    roles: Mapping[str, Group], scores: Mapping[str, Tensor], values: Mapping[str, list[float]], layout: Layout
) -> list[Candidate]:
    """Candidates of heads of different sizes. Removing the last V of a head removes its QK; one head is always kept."""
    bundles = {
        role: _head_bundles(roles[role], scores[roles[role].name], _multiple(min(roles[role].limits.parts), layout))
        for role in ("qkv", "qk", "v")
        if role in roles
    }
    carrier = "qkv" if "qkv" in bundles else "v"
    if layout.equal_qkv and {"qk", "v"} <= bundles.keys() and roles["qk"].limits.parts == roles["v"].limits.parts:
        pairs = zip(bundles.pop("qk"), bundles["v"], strict=True)
        bundles["v"] = [[[*qk, *v] for qk, v in zip(*both, strict=True)] for both in pairs]
    candidates: list[Candidate] = []
    if "qk" in bundles:
        for head, of_head in enumerate(bundles["qk"]):
            candidates += chain_of(roles["qk"].name, head, of_head[:-1], values)
    if carrier not in bundles:
        return candidates
    if "head" in roles:
        # The head that is always kept must be the one that the candidates of whole heads keep, also if scores tie.
        last = _ascending(scores[roles["head"].name], range(roles["head"].size))[-1]
    else:
        best = [max(values[name][unit] for name, unit in of_head[-1]) for of_head in bundles[carrier]]
        last = best.index(max(best))
    for head, of_head in enumerate(bundles[carrier]):
        steps = [list(bundle) for bundle in of_head]
        if head == last:
            steps = steps[:-1]
        elif "qk" in bundles:
            steps[-1] = [*steps[-1], *bundles["qk"][head][-1]]
        chain = chain_of(roles[carrier].name, head, steps, values)
        if head != last and "qk" in bundles:
            rest = tuple(pair for bundle in bundles["qk"][head][:-1] for pair in bundle)
            final = chain[-1]
            chain[-1] = replace(final, units=final.units + rest)
        candidates += chain
    return candidates


def _token_candidates(groups: Sequence[Group], scores: Mapping[str, Tensor], chain: str) -> list[Candidate]:
    """One chain per position, from the deepest block up: a token removed in one block is missing in deeper ones.

    The score of a position is made non-increasing with depth, so that scores ascend along the chain.
    """
    at: dict[int, list[tuple[str, int, float]]] = {}
    for group in groups:
        assert group.token is not None
        for unit, position in enumerate(group.token.positions):
            at.setdefault(position, []).append((group.name, unit, float(scores[group.name][unit])))
    protected = _kept_position(groups, at)
    candidates: list[Candidate] = []
    for position, visits in at.items():
        if position == protected:
            continue
        low = float("inf")
        capped = []
        for name, unit, score in visits:
            low = min(low, score)
            capped.append((name, unit, low, score))
        for name, unit, low, score in reversed(capped):
            candidates.append(Candidate(units=((name, unit),), score=low, value=score, chain=(chain, position)))
    return candidates


def _kept_position(groups: Sequence[Group], at: Mapping[int, list[tuple[str, int, float]]]) -> int | None:
    """The position that is always kept: of those present in every block, the one whose lowest score is the highest."""
    lowest = {p: min(score for *_, score in visits) for p, visits in at.items() if len(visits) == len(groups)}
    return max(lowest, key=lambda position: (lowest[position], -position)) if lowest else None
