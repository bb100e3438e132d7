"""Express integers that were counted in cut copies of a model as products of dimensions.

Every size of a tensor is a product of a few dimensions, each of which is a fixed number plus a multiple of the kept
units of some groups. Which ones is found by comparing integers: a dimension is accepted only if it gives the counted
number, up to one factor, in every copy, and if no other dimension does. There is no rounding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import combinations, compress, takewhile

from slimming.core.formulas import Dim, Product, Ratio

MOST_BRANCHES = 3
"""Most branches on which the presence of something may depend."""
Vector = tuple[int, ...]
"""A number in each of the copies."""
Known = tuple[Vector, Fraction, Dim | Ratio]
"""Numbers in the copies that have them, and the dimension that they are a multiple of, with the factor."""


class Matcher:
    """Finds formulas of numbers that were counted in several copies of a model.

    Args:
        dims: the dimensions that occur in the model.
        counts: for each copy the kept units of every group, the dense model first.
        branches: the groups that are whole branches, which have one unit.
        ratios: sizes that are quotients of dimensions, and become one when they are multiplied by another dimension.
    """

    def __init__(
        self,
        dims: Iterable[Dim],
        counts: Sequence[Mapping[str, int]],
        branches: Collection[str] = (),
        ratios: Iterable[Ratio] = (),
    ) -> None:
        self.counts = counts
        self._ratios = {ratio: tuple(int(ratio.value(kept)) for kept in counts) for ratio in ratios}
        self._dims = list(dict.fromkeys(primitive(dim) for dim in dims if dim.groups))
        self._values = {dim: tuple(dim.value(kept) for kept in counts) for dim in self._dims}
        self._alive = {name: tuple(kept[name] > 0 for kept in counts) for name in branches}
        self._directions: dict[tuple[bool, ...], dict[Vector, list[Dim]]] = {}
        self._ratio_directions: dict[tuple[bool, ...], set[Vector]] = {}

    @property
    def ambiguous(self) -> list[Dim]:
        """The dimensions that are constant, or proportional to another one, in the copies or in those with a branch."""
        patterns = {(True,) * len(self.counts), *self._alive.values()}
        return [
            dim
            for present in patterns
            for values, same in self._by_direction(present).items()
            if len(same) > 1 or len(set(values)) == 1 or values in self._ratios_among(present)
            for dim in same
        ]

    def products(
        self, factors: Sequence[Vector], present: Iterable[bool] | None = None, name: str | None = None
    ) -> tuple[Product, ...] | None:
        """The sum of products of dimensions that equals the product of ``factors``; None if there is none.

        It is one product, or several if there is something as long as one of several branches is there.

        Args:
            factors: numbers in each copy that has them, such as the dimensions of a tensor.
            present: whether each copy has them; by default all do.
            name: name of the module or parameter, whose number is 0 in the copies that do not have it; if there is
                none, these copies say nothing.
        """
        present = tuple(present) if present is not None else (True,) * len(self.counts)
        gates = self.gates(present, name) if name is not None else ((1, ()),)
        if gates is None:
            return None
        constant = Fraction(1)
        known: list[Known] = []
        unknown = [1] * sum(present)
        for factor in factors:
            if len(set(factor)) == 1:
                if (1,) * sum(present) in self._by_direction(present):
                    return None  # a dimension may be constant in these copies by chance
                constant *= factor[0]
            elif (found := self._dim(factor, present)) is not None:
                known.append((factor, *found))
            else:
                unknown = [a * b for a, b in zip(unknown, factor, strict=True)]
        if set(unknown) != {1}:
            known_after = self._resolved(tuple(unknown), known, present)
            if known_after is None:
                return None
            known = known_after
        share = math.prod((scale for _, scale, _ in known), start=constant)
        if share.denominator != 1:
            known = [_divided(*each) for each in known]
            share = math.prod((scale for _, scale, _ in known), start=constant)
        if share.denominator != 1:
            return None
        return tuple((Dim(fixed=sign * int(share)), *(dim for *_, dim in known), *gate) for sign, gate in gates)

    def _resolved(self, unknown: Vector, known: Sequence[Known], present: tuple[bool, ...]) -> list[Known] | None:
        """``known`` and ``unknown`` as dimensions: alone, together with some of ``known``, or as two dimensions.

        The size of a head is no multiple of one dimension, for instance, but together with the number of heads it is.
        """
        for number in range(min(2, len(known)) + 1):
            for chosen in combinations(range(len(known)), number):
                merged = unknown
                for index in chosen:
                    merged = tuple(a * b for a, b in zip(merged, known[index][0], strict=True))
                found = (Fraction(merged[0]), None) if len(set(merged)) == 1 else self._dim(merged, present)
                if found is not None:
                    others = [each for index, each in enumerate(known) if index not in chosen]
                    scale, dim = found
                    return [*others, (merged, scale, dim or Dim(fixed=1))]
        affine = self._affine(unknown, present)
        if affine is not None:
            return [*known, (unknown, Fraction(1), affine)]
        ratio = self._ratio(unknown, present)
        if ratio is not None:
            return [*known, (unknown, *ratio)]
        pairs = []
        for dim in self._dims:
            values = _chosen(self._values[dim], present)
            if all(value and number % value == 0 for number, value in zip(unknown, values, strict=True)):
                rest = tuple(number // value for number, value in zip(unknown, values, strict=True))
                other = self._dim(rest, present)
                if other is not None and (pair := {dim, other[1]}) not in [each for each, *_ in pairs]:
                    pairs.append((pair, dim, values, rest, other))
        if len(pairs) != 1:
            return None
        _, dim, values, rest, (scale, other) = pairs[0]
        return [*known, (values, Fraction(1), dim), (rest, scale, other)]

    def _dim(self, numbers: Vector, present: tuple[bool, ...]) -> tuple[Fraction, Dim] | None:
        """The only dimension that is proportional to ``numbers``, with the factor between them."""
        direction = _direction(numbers)
        found = self._by_direction(present).get(direction, [])
        if len(found) != 1 or direction in self._ratios_among(present):
            return None
        return Fraction(numbers[0], _chosen(self._values[found[0]], present)[0]), found[0]

    def _ratio(self, numbers: Vector, present: tuple[bool, ...]) -> tuple[Fraction, Ratio] | None:
        """The only quotient that is proportional to ``numbers``, with the factor between them."""
        chosen = {ratio: _chosen(values, present) for ratio, values in self._ratios.items()}
        found = [ratio for ratio, values in chosen.items() if _direction(values) == _direction(numbers)]
        return (Fraction(numbers[0], chosen[found[0]][0]), found[0]) if len(found) == 1 else None

    def _affine(self, numbers: Vector, present: tuple[bool, ...]) -> Dim | None:
        """A fixed number plus a multiple of the units of a group that equals ``numbers``, if only one group does."""
        result = []
        for group in {name for dim in self._dims for name, _ in dim.groups}:
            units = _chosen([kept[group] for kept in self.counts], present)
            steps = [(n - numbers[0], u - units[0]) for n, u in zip(numbers, units, strict=True)]
            weights = {Fraction(n, u) for n, u in steps if u}
            if len(weights) == 1 and all(u or not n for n, u in steps) and len(set(units)) > 2:
                weight = weights.pop()
                result.append((group, weight, numbers[0] - weight * units[0]))
        if len(result) != 1 or any(number.denominator != 1 for number in result[0][1:]):
            return None
        ((group, weight, fixed),) = result
        return Dim(fixed=int(fixed), groups=((group, int(weight)),))

    def gates(
        self, present: Sequence[bool], name: str, among: Sequence[bool] | None = None
    ) -> tuple[tuple[int, Product], ...] | None:
        """Factors of 0 or 1 with signs, whose sum is 1 where ``name`` is present; None if branches do not explain it.

        It may need a branch, or all of several, or any of several, as a block that is removed with the last of its
        branches. Branches in the same block are tried first.

        Args:
            present: whether it is there, in each copy.
            name: name of the module or parameter.
            among: the copies that are compared; by default all.
        """
        among = [True] * len(present) if among is None else among
        wanted = [there for there, compared in zip(present, among, strict=True) if compared]
        if all(wanted):
            return ((1, ()),)
        near = {
            branch: _shared_steps(name, branch.rpartition(".")[0])
            for branch, alive in self._alive.items()
            if any(alive) and not all(alive)
        }
        for least in sorted(set(near.values()), reverse=True):
            branches = [branch for branch, steps in near.items() if steps >= least]
            for number in range(1, min(MOST_BRANCHES, len(branches)) + 1):
                for chosen in combinations(branches, number):
                    each_copy = zip(*(self._alive[branch] for branch in chosen), strict=True)
                    together = [alive for alive, compared in zip(each_copy, among, strict=True) if compared]
                    if [all(alive) for alive in together] == wanted:
                        return ((1, _all_of(chosen)),)
                    if [any(alive) for alive in together] == wanted:
                        subsets = [each for size in range(1, number + 1) for each in combinations(chosen, size)]
                        return tuple(((-1) ** (len(each) + 1), _all_of(each)) for each in subsets)
        return None

    def _ratios_among(self, present: tuple[bool, ...]) -> set[Vector]:
        if present not in self._ratio_directions:
            chosen = {_direction(_chosen(values, present)) for values in self._ratios.values()}
            self._ratio_directions[present] = chosen
        return self._ratio_directions[present]

    def _by_direction(self, present: tuple[bool, ...]) -> dict[Vector, list[Dim]]:
        if present not in self._directions:
            result: dict[Vector, list[Dim]] = {}
            for dim, values in self._values.items():
                result.setdefault(_direction(_chosen(values, present)), []).append(dim)
            self._directions[present] = result
        return self._directions[present]


def _divided(numbers: Vector, scale: Fraction, dim: Dim | Ratio) -> Known:
    """The same numbers as a multiple of a quotient, such as what all heads share is of the units of all heads."""
    if scale.denominator == 1 or isinstance(dim, Ratio):
        return numbers, scale, dim
    return numbers, Fraction(scale.numerator), Ratio(total=dim, parts=Dim(fixed=scale.denominator))


def _all_of(branches: Iterable[str]) -> Product:
    return tuple(Dim(groups=((branch, 1),)) for branch in branches)


def _shared_steps(name: str, other: str) -> int:
    """The number of steps from the model to the innermost module around both."""
    pairs = zip(name.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def primitive(dim: Dim) -> Dim:
    """``dim`` divided by the greatest common divisor of its fixed number and its weights; weights of a group summed."""
    weights: dict[str, int] = {}
    for name, weight in dim.groups:
        weights[name] = weights.get(name, 0) + weight
    divisor = math.gcd(dim.fixed, *weights.values()) or 1
    groups = tuple(sorted((name, weight // divisor) for name, weight in weights.items()))
    return Dim(fixed=dim.fixed // divisor, groups=groups)


def _direction(numbers: Vector) -> Vector:
    divisor = math.gcd(*numbers) or 1
    return tuple([number // divisor for number in numbers])


def _chosen(values: Sequence[int], present: Sequence[bool]) -> Vector:
    return tuple(compress(values, present))
