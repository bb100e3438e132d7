"""From scores to chunks: units that go together, in chains that go in order.

A layout decides how many units a chunk has; nothing here depends on a budget.
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
Choice = npt.NDArray[np.bool_]
"""For each chunk of a pool, whether it goes; shape (chunks,)."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Units that go together. Chunks of one chain go in order: a later one never goes before an earlier one.

    Attributes:
        units: names of groups and units in them.
        score: average score of a unit for the order in which chunks go: along a chain it never falls.
        worth: total score of the units themselves.
        chain: what goes in order.
    """

    units: tuple[tuple[str, int], ...]
    score: float
    worth: float
    chain: tuple[str, int]


class Pool:
    """Chunks of a model to choose from, as arrays.

    Attributes:
        chunks: what may go.
        values: what each chunk is worth, at least 0, shape (chunks,).
        branch: for each chunk, whether it is a whole attention or MLP, shape (chunks,).
    """

    def __init__(self, anatomy: Anatomy, chunks: Sequence[Chunk]) -> None:
        self.anatomy, self.chunks = anatomy, chunks
        self.values = _values(chunks)
        groups = {group.name: group for group in anatomy.groups}
        first = [chunk.units[0][0] for chunk in chunks]
        self.branch = np.array([groups[name].role == "branch" for name in first], dtype=bool)
        # The last place is for chunks that no branch takes along.
        places = {name: place for place, name in enumerate(first) if self.branch[place]}
        self._inside = np.array([places.get(f"{groups[name].site}.branch", len(chunks)) for name in first], dtype=int)
        found: dict[str, tuple[list[int], list[int]]] = {}
        homes: dict[tuple[str, int], int] = {}
        shared: set[tuple[int, int]] = set()
        for place, chunk in enumerate(chunks):
            for name, unit in chunk.units:
                units, owners = found.setdefault(name, ([], []))
                units.append(unit)
                owners.append(place)
                if (home := homes.setdefault((name, unit), place)) != place:
                    shared.add((home, place))
        self._shared = np.array(sorted(shared), dtype=int).reshape(-1, 2)
        self._owned = {name: (np.array(units), np.array(owners)) for name, (units, owners) in found.items()}
        self._sizes = {name: groups[name].size for name in found}

    def revalued(self, chunks: Sequence[Chunk]) -> Pool:
        """The pool with the same chunks at other scores."""
        result = copy.copy(self)
        result.chunks, result.values = chunks, _values(chunks)
        return result

    @property
    def names(self) -> list[str]:
        """Groups that lose units with some chunk."""
        return list(self._owned)

    def kept(self, goes: Choice) -> dict[str, Mask]:
        """Per group with chunks, the units that no chunk takes along."""
        result = {}
        for name, (units, owners) in self._owned.items():
            result[name] = np.ones(self._sizes[name], dtype=bool)
            result[name][units[goes[owners]]] = False
        return result

    def complete(self, goes: Choice) -> dict[str, Mask]:
        """The units that stay in every group of the model."""
        return self.anatomy.couplings.left(self.kept(goes))

    def counts(self, kept: Mapping[str, Mask]) -> dict[str, int]:
        """How many units of every group of the model stay."""
        return {name: int(mask.sum()) for name, mask in self.anatomy.couplings.left(kept).items()}

    def stays(self, goes: Choice) -> Choice:
        """Chunks that do not go, neither by themselves nor with a whole head, attention or MLP."""
        gone = goes | np.append(goes, False)[self._inside]
        gone[self._shared[goes[self._shared[:, 1]], 0]] = True
        return ~gone

    def before(self, places: Sequence[int]) -> list[tuple[int, int]]:
        """Pairs (first, then) in ``places``: if the first stays, so does the second, which goes later."""
        number = {place: index for index, place in enumerate(places)}
        last: dict[tuple[str, int], int] = {}
        pairs = [(number[first], number[then]) for first, then in self._shared.tolist() if first in number]
        for index, place in enumerate(places):
            chain = self.chunks[place].chain
            if chain in last:
                pairs.append((last[chain], index))
            last[chain] = index
        return pairs

    def priced(self, prices: Mapping[str, float]) -> Array:
        """Price of each chunk, shape (chunks,), given that of one unit per group."""
        result = np.zeros(len(self.chunks))
        for name, (_, owners) in self._owned.items():
            result += prices[name] * np.bincount(owners, minlength=len(result))
        return result


def _values(chunks: Sequence[Chunk]) -> Array:
    return np.array([max(chunk.worth, 0.0) for chunk in chunks])


def all_chunks(groups: Sequence[Group], scores: Mapping[str, Tensor], layout: Layout) -> list[Chunk]:
    """Everything that may go, given one score per unit of each group, in the sizes that ``layout`` allows."""
    chunks: list[Chunk] = []
    by_site: dict[str, dict[str, Group]] = {}
    for group in groups:
        by_site.setdefault(group.site, {})[group.role] = group
    for roles in by_site.values():
        chunks += _attention_chunks(roles, scores, layout)
        for role in ("mlp", "channel", "width"):
            if role in roles:
                scarcity = layout.scarcity if role == "channel" else 0.0
                chunks += _plain_chunks(roles[role], scores, _multiple(roles[role].size, layout), scarcity)
        if "head" in roles:
            chunks += _plain_chunks(roles["head"], scores, 1)
        if "branch" in roles:
            name = roles["branch"].name
            own = float(scores[name][0])
            chunks.append(Chunk(units=((name, 0),), score=own, worth=own, chain=(name, 0)))
    tokens = [group for group in groups if group.token is not None]
    return chunks + _token_chunks(tokens, scores)


def sequence(chunks: Sequence[Chunk], prices: Sequence[float]) -> list[int]:
    """Places of all chunks in the order in which they go: lowest score per price first, chains kept in order."""
    floor: dict[tuple[str, int], float] = {}
    keyed = []
    for place, (chunk, price) in enumerate(zip(chunks, prices, strict=True)):
        density = chunk.score * len(chunk.units) / max(price, 1e-30)
        floor[chunk.chain] = density = max(density, floor.get(chunk.chain, -float("inf")))
        keyed.append((density, place))
    return [place for _, place in sorted(keyed)]


def of_kind(chunks: Sequence[Chunk], groups: Sequence[Group], kind: str) -> list[int]:
    """Places of the chunks of one kind, in the order in which they go when nothing else does."""
    names = {group.name for group in groups if group.kind == kind}
    places = [place for place, chunk in enumerate(chunks) if chunk.units[0][0] in names]
    own = [chunks[place] for place in places]
    return [places[place] for place in sequence(own, [len(chunk.units) for chunk in own])]


def _multiple(size: int, layout: Layout) -> int:
    """The multiple to use for ``size`` units: halved until it divides them into enough pieces."""
    multiple = DEFAULT_MULTIPLE if layout.multiple is None else layout.multiple
    while multiple > 1 and (size % multiple or size // multiple < _FEWEST_SIZES):
        multiple //= 2
    return multiple


def _ascending(score: Tensor, units: Sequence[int]) -> list[int]:
    values = score.tolist()
    return sorted(units, key=lambda unit: (values[unit], unit))


def _bundles(units: Sequence[int], multiple: int) -> list[list[int]]:
    return [list(units[start : start + multiple]) for start in range(0, len(units), multiple)]


def in_chain(
    name: str, number: int, bundles: Iterable[Sequence[tuple[str, int]]], scores: Mapping[str, list[float]]
) -> list[Chunk]:
    """Chunks of one chain, their scores made non-decreasing so that sorting keeps their order."""
    chunks: list[Chunk] = []
    floor = -float("inf")
    for bundle in bundles:
        own = sum(scores[group][unit] for group, unit in bundle)
        floor = max(floor, own / len(bundle))
        chunks.append(Chunk(units=tuple(bundle), score=floor, worth=own, chain=(name, number)))
    return chunks


def _plain_chunks(group: Group, scores: Mapping[str, Tensor], multiple: int, scarcity: float = 0.0) -> list[Chunk]:
    """Bundles from the lowest score up; the best bundle always stays. Scores grow as the group shrinks."""
    order = _ascending(scores[group.name], range(group.size))
    own = scores[group.name].tolist()
    for gone, unit in enumerate(order):
        own[unit] /= (1 - gone / group.size) ** scarcity
    bundles = [[(group.name, unit) for unit in bundle] for bundle in _bundles(order, multiple)]
    return in_chain(group.name, 0, bundles[:-1], {group.name: own})


def _attention_chunks(roles: Mapping[str, Group], scores: Mapping[str, Tensor], layout: Layout) -> list[Chunk]:
    members = [roles[role] for role in ("qkv", "qk", "v") if role in roles]
    if not members:
        return []
    values = {group.name: scores[group.name].tolist() for group in members}
    same = all(len(set(group.limits.parts)) == 1 for group in members)
    if layout.equal_heads and same and len({group.limits.parts for group in members}) == 1:
        per_head = members[0].limits.parts[0]
        multiple = _multiple(per_head, layout)
        heads = [bundles for g in members for bundles in _head_bundles(g, scores[g.name], multiple)]
        steps = [[pair for bundles in heads for pair in bundles[step]] for step in range(per_head // multiple - 1)]
        return in_chain(members[0].site, 0, steps, values)
    return _uneven_chunks(roles, scores, values, layout)


def _head_bundles(group: Group, score: Tensor, multiple: int) -> list[list[list[tuple[str, int]]]]:
    """Per head, its units from the lowest score up in bundles."""
    owner = group.part_of_unit
    heads = []
    for head in range(len(group.limits.parts)):
        order = _ascending(score, [unit for unit in range(group.size) if owner[unit] == head])
        heads.append([[(group.name, unit) for unit in bundle] for bundle in _bundles(order, multiple)])
    return heads


def _uneven_chunks(
    roles: Mapping[str, Group], scores: Mapping[str, Tensor], values: Mapping[str, list[float]], layout: Layout
) -> list[Chunk]:
    """Each head on its own. The last V of a head takes its QK along; one head always stays."""
    bundles = {
        role: _head_bundles(roles[role], scores[roles[role].name], _multiple(min(roles[role].limits.parts), layout))
        for role in ("qkv", "qk", "v")
        if role in roles
    }
    carrier = "qkv" if "qkv" in bundles else "v"
    if layout.equal_qkv and {"qk", "v"} <= bundles.keys() and roles["qk"].limits.parts == roles["v"].limits.parts:
        pairs = zip(bundles.pop("qk"), bundles["v"], strict=True)
        bundles["v"] = [[[*qk, *v] for qk, v in zip(*both, strict=True)] for both in pairs]
    chunks: list[Chunk] = []
    if "qk" in bundles:
        for head, own in enumerate(bundles["qk"]):
            chunks += in_chain(roles["qk"].name, head, own[:-1], values)
    if carrier not in bundles:
        return chunks
    if "head" in roles:
        # The head that the chunks of whole heads leave, ties included.
        last = _ascending(scores[roles["head"].name], range(roles["head"].size))[-1]
    else:
        best = [max(values[name][unit] for name, unit in own[-1]) for own in bundles[carrier]]
        last = best.index(max(best))
    for head, own in enumerate(bundles[carrier]):
        steps = [list(bundle) for bundle in own]
        if head == last:
            steps = steps[:-1]
        elif "qk" in bundles:
            steps[-1] = [*steps[-1], *bundles["qk"][head][-1]]
        chain = in_chain(roles[carrier].name, head, steps, values)
        if head != last and "qk" in bundles:
            rest = tuple(pair for bundle in bundles["qk"][head][:-1] for pair in bundle)
            final = chain[-1]
            chain[-1] = replace(final, units=final.units + rest)
        chunks += chain
    return chunks


def _token_chunks(groups: Sequence[Group], scores: Mapping[str, Tensor]) -> list[Chunk]:
    """One chain per position, from the deepest block up: a token that leaves a block is gone in all deeper ones.

    A position's score in a block is at most what it is in shallower blocks, so that the chain is ascending.
    """
    at: dict[int, list[tuple[str, int, float]]] = {}
    for group in groups:
        assert group.token is not None
        for unit, position in enumerate(group.token.positions):
            at.setdefault(position, []).append((group.name, unit, float(scores[group.name][unit])))
    protected = _last_positions(groups, at)
    chunks: list[Chunk] = []
    for position, visits in at.items():
        if position == protected:
            continue
        low = float("inf")
        capped = []
        for name, unit, score in visits:
            low = min(low, score)
            capped.append((name, unit, low, score))
        for name, unit, low, own in reversed(capped):
            chunks.append(Chunk(units=((name, unit),), score=low, worth=own, chain=("tokens", position)))
    return chunks


def _last_positions(groups: Sequence[Group], at: Mapping[int, list[tuple[str, int, float]]]) -> int | None:
    """The position that always stays: the one present in every block with the best lowest score."""
    candidates = {p: min(score for *_, score in visits) for p, visits in at.items() if len(visits) == len(groups)}
    return max(candidates, key=lambda position: (candidates[position], -position)) if candidates else None
